"""What the harness asks of a target after each harm: the right error, nothing lost, and then the same bytes.

In: a target of fixtures_targets, a folder, a harm. Out: AssertionError when a promise is broken; the number of harms
done. The canaries run these same functions on programs that are wrong on purpose.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from faults import FailsAt, Recorder, Watched, disk
from fixtures_targets import OUT, Target, broken_promises, kept, result

from bifrost_cli.cli.main import explain
from bifrost_cli.errors import BifrostError

WAYS = ("least", "most", "zeros", "some")  # the first is what is sure; the others may have more


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def undisturbed(target: Target, place: Path) -> dict[str, Any]:
    folder = fresh(place / target.name)
    target.run(folder, lambda: None)
    return result(folder)


# ---- an error at a call ----------------------------------------------------------------------------------------------


def errors(target: Target, place: Path, wanted: Any, kind: str, code: int, step: int = 1, **more: Any) -> int:
    """An error at the first, second, ... call of `kind` (every `step`-th), until the command passes; how many."""
    before, number = 0, 1
    while True:
        folder = fresh(place / target.name)
        hook = FailsAt(kind, number, code, **more)
        told = _failure(target, folder, hook)
        if not hook.failed:
            assert told is None
            return (number - 1) // step
        assert told is not None and told.exit_code == 3, f"{kind} {number}: {told or 'it was not told'}"
        have = kept(target, folder)
        assert have >= before, f"{kind} {number}: {have} of {target.whole} are left, {before} were"
        assert not broken_promises(target, folder), f"{kind} {number}"
        _again(target, folder, wanted, have, f"{kind} {number}")
        before, number = have, number + step


def _failure(target: Target, folder: Path, hook: Any) -> Any:
    with disk(Watched(hook)):
        try:
            target.run(folder, lambda: None)
        except BaseException as error:  # noqa: BLE001 what the command line would say of it
            return explain(error)
    return None


def _again(target: Target, folder: Path, wanted: Any, have: int, when: str) -> None:
    """The same command once more: it does only what is missing, and ends in the same bytes."""
    work: list[int] = []
    with disk(Watched()):
        try:
            target.run(folder, lambda: work.append(1))
        except BifrostError as error:
            raise AssertionError(f"{when}: the same command again fails: {error}") from error
    assert result(folder) == wanted, when
    assert len(work) <= target.whole - have, f"{when}: {len(work)} of {target.whole} done again, {have} were there"


# ---- a second writer -------------------------------------------------------------------------------------------------


def second_writer(target: Target, place: Path, wanted: Any) -> None:
    """The same command, begun while the first one works, is refused at once with the owner's name."""
    folder, told = fresh(place / target.name), []

    def meanwhile() -> None:
        if not told:
            told.append("begun")
            with torch.random.fork_rng():  # one process stands for two: the second draws nothing from the first
                told.append(_failure(target, folder, lambda kind, name, arguments: None))

    target.run(folder, meanwhile)
    assert told[1] is not None and (told[1].code, told[1].exit_code) == ("BF-ART-006", 5), told[1]
    assert f"locked by pid {os.getpid()} on " in told[1].message
    assert result(folder) == wanted


# ---- a power cut -----------------------------------------------------------------------------------------------------


def power_cuts(target: Target, place: Path, wanted: Any, step: int = 1) -> int:
    """The power fails after the first, second, ... change of the disk (every `step`-th); how many cuts."""
    folder, cuts = fresh(place / target.name), 0
    recorder = Recorder(folder)
    with disk(recorder):
        target.run(folder, lambda: None)
    before = 0
    for after in sorted({*range(0, len(recorder), step), len(recorder)}):
        for how in WAYS:
            recorder.cut(after, how, seed=after)
            when = f"power cut after {after} of {len(recorder)} changes ({how})"
            have, cuts = kept(target, folder), cuts + 1
            assert have >= before, f"{when}: {have} of {target.whole} are left, {before} were"
            before = have if how == "least" else before  # what more there is, is luck
            assert not broken_promises(target, folder), f"{when}: {broken_promises(target, folder)}"
            if after == len(recorder):
                assert (folder / OUT / "manifest.json").exists(), f"{when}: the command had ended"
            _again(target, folder, wanted, have, when)
    return cuts


# ---- a flipped bit ---------------------------------------------------------------------------------------------------


def flips(files: Iterable[Path], read: Callable[[], Any], wanted: Any, step: int = 1) -> Counter[str]:
    """Flip each bit of the files (every `step`-th), one at a time: `read` gives `wanted` or refuses with exit code 5.

    Returns how often it refused and how often it gave the same.
    """
    outcomes: Counter[str] = Counter()
    for file in files:
        whole = file.read_bytes()
        for bit in range(0, 8 * len(whole), step):
            harmed = bytearray(whole)
            harmed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(harmed)
            try:
                found = read()
            except BifrostError as error:
                assert error.exit_code == 5, f"{file} bit {bit}: {error}"
                outcomes["refused"] += 1
            else:
                assert found == wanted, f"{file} bit {bit}: other numbers"
                outcomes["same"] += 1
        file.write_bytes(whole)
    return outcomes
