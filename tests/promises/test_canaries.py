"""Is the harness awake? Programs that are wrong on purpose must fail it."""

from __future__ import annotations

import contextlib
import errno
import os

import pytest
from faults import Recorder
from fixtures_store import make_store
from fixtures_targets import TARGETS
from harness import errors, flips, power_cuts, second_writer, undisturbed

from bifrost_cli.artifacts import files, lock
from bifrost_cli.data.latents import shard_file, writer
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.training import loop
from bifrost_cli.training.checkpoint import Checkpoints

EXTRACT, TRAIN, GENERATE = (TARGETS[name] for name in ("extract", "train", "generate"))


@pytest.fixture
def seen(tmp_path):
    """`with seen(target) as wanted:` a harness function must find something. The undisturbed run is of the canary."""

    @contextlib.contextmanager
    def check(target):
        wanted = undisturbed(target, tmp_path)
        with pytest.raises(AssertionError) as caught:
            yield wanted
        print(caught.value)  # what it found

    return check


@pytest.mark.parametrize("target", [EXTRACT, TRAIN, GENERATE], ids=lambda target: target.name)
def test_fsync_left_out(seen, tmp_path, monkeypatch, target):
    monkeypatch.setattr(Recorder, "fsync", lambda self, descriptor: None)
    with seen(target) as wanted:
        power_cuts(target, tmp_path, wanted, step=7)


def test_fsync_of_the_folder_left_out(seen, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "sync", lambda path: None)
    with seen(EXTRACT) as wanted:
        power_cuts(EXTRACT, tmp_path, wanted, step=7)


def test_a_failed_fsync_taken_for_done(seen, tmp_path, monkeypatch):
    real = files.open_file

    @contextlib.contextmanager
    def deaf(path, flags):
        with contextlib.suppress(OSError), real(path, flags) as descriptor:
            yield descriptor

    monkeypatch.setattr(files, "open_file", deaf)
    with seen(GENERATE) as wanted:
        errors(GENERATE, tmp_path, wanted, "fsync", errno.EIO)


def test_written_in_place(seen, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def in_place(path, size=0):
        with files.disk_errors(path), files.open_file(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
            yield lambda data: files.write_all(descriptor, data)
            files.os.fsync(descriptor)

    monkeypatch.setattr(files, "new_file", in_place)
    with seen(EXTRACT) as wanted:
        errors(EXTRACT, tmp_path, wanted, "write", errno.ENOSPC)


def test_random_state_not_restored(seen, tmp_path, monkeypatch):
    drawn, start = [], loop._start
    monkeypatch.setattr(loop, "_start", lambda *rest: drawn.clear() or start(*rest))
    monkeypatch.setattr(loop, "micro_seed", lambda *parts: drawn.append(1) or len(drawn))
    with seen(TRAIN) as wanted:
        errors(TRAIN, tmp_path, wanted, "rename", errno.EIO)


def test_a_lock_that_does_not_lock(seen, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_try_lock", lambda descriptor: True)
    with seen(EXTRACT) as wanted:
        second_writer(EXTRACT, tmp_path, wanted)


def test_an_index_before_its_shard(seen, tmp_path, monkeypatch):
    late, new_file, index = [], writer.new_file, writer.write_index

    def early(*rest):
        index(*rest)
        while late:
            path, data = late.pop()
            with new_file(path) as write:
                write(data)

    @contextlib.contextmanager
    def put_off(path, size, write_out):
        data = bytearray()
        yield data.extend
        late.append((path, bytes(data)))

    monkeypatch.setattr(writer, "new_file", put_off)
    monkeypatch.setattr(writer, "write_index", early)
    with seen(EXTRACT) as wanted:
        power_cuts(EXTRACT, tmp_path, wanted, step=2)


def test_the_old_checkpoint_dropped_before_the_new_one(seen, tmp_path, monkeypatch):
    save = Checkpoints.save

    def hasty(self, checkpoint, **rest):
        for step in self.steps():
            files.remove(self.path(step))
        return save(self, checkpoint, **rest)

    monkeypatch.setattr(Checkpoints, "save", hasty)
    with seen(TRAIN) as wanted:
        power_cuts(TRAIN, tmp_path, wanted, step=5)


def test_checksums_that_are_not_compared(tmp_path, monkeypatch):
    unchecked = lambda self, chunk, offset, out: shard_file.read_into(self.place, offset, out)  # noqa: E731
    monkeypatch.setattr(shard_file.ShardReader, "_read_checked", unchecked)
    store = make_store(tmp_path / "a", rows=3, grid=(1, 2), channels=2, shard_rows=2, chunk_rows=1)
    files = [store.path / name for name in store.files if "/c/" in name]

    def read():
        opened = LatentsStore.open(store.path)
        return opened.latents(range(opened.rows)).tobytes()

    with pytest.raises(AssertionError, match="other numbers"):
        flips(files, read, read())
