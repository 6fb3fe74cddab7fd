"""Nothing is lost: an error at any call to the disk, and a power cut after any change of it, end in the same bytes."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from faults import KINDS, Watched, disk
from fixtures_targets import TARGETS, result
from harness import errors, power_cuts, second_writer, undisturbed

CODES = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=TARGETS)
def target(request):
    return TARGETS[request.param]


def test_an_error_at_any_call_is_told_and_loses_nothing(target, tmp_path):
    """ENOSPC where the disk is asked for room, EIO where it is asked to keep its word."""
    wanted = undisturbed(target, tmp_path)
    step = {"train": 5, "extract": 2, "halves": 2}.get(target.name, 1)
    for kind in KINDS:
        code = CODES["ENOSPC" if kind in ("open", "write", "mkdir") else "EIO"]
        assert errors(target, tmp_path, wanted, kind, code, step=step) > 0


def test_a_power_cut_after_any_change_loses_nothing(target, tmp_path):
    wanted = undisturbed(target, tmp_path)
    assert power_cuts(target, tmp_path, wanted, step=13 if target.name == "train" else 4) > 30


def test_a_second_writer_is_refused_and_harms_nothing(target, tmp_path):
    second_writer(target, tmp_path, undisturbed(target, tmp_path))


@pytest.mark.crash
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("code", CODES)
def test_every_error_at_every_call(target, tmp_path, code, for_good):
    wanted = undisturbed(target, tmp_path)
    done = {kind: errors(target, tmp_path, wanted, kind, CODES[code], for_good=for_good) for kind in KINDS}
    print(f"{target.name}: {sum(done.values())} faults ({code}) {done}")


@pytest.mark.crash
def test_a_power_cut_after_every_change(target, tmp_path):
    wanted = undisturbed(target, tmp_path)
    print(f"{target.name}: {power_cuts(target, tmp_path, wanted)} power cuts")


def test_what_has_finished_changes_nothing(target, tmp_path):
    """Also on a disk that is mounted read-only: the same command says that it is there."""
    wanted = undisturbed(target, tmp_path)

    def read_only(kind: str, name: str, arguments: tuple) -> None:
        if kind != "open" or arguments[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(arguments[0]))

    with disk(Watched(read_only)):
        target.run(tmp_path / target.name, lambda: pytest.fail("it works again"))
    assert result(tmp_path / target.name) == wanted
