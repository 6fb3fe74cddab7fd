"""A store under everything at once: extractions that are killed and resumed, lost files, flipped bits, in any order.

The model is one sentence: a store is refused, or its rows are exactly what was computed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from faults import Recorder, Watched, disk
from fixtures_targets import OUT, TARGETS, broken_promises, kept, result
from harness import undisturbed
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from bifrost_cli.artifacts import Artifact
from bifrost_cli.artifacts.lock import LOCK_NAME
from bifrost_cli.artifacts.manifest import payload_files
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.errors import BifrostError

EXTRACT = TARGETS["extract"]


class Killed(BaseException):
    """The process is no more: nothing that it still does reaches the disk."""


class Dies:
    """The hook of a disk that kills the process at its `number`-th call, and lets no later one through."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, kind: str, name: str, arguments: tuple[Any, ...]) -> None:
        self.left -= 1
        if self.left <= 0:
            raise Killed


def refusal(error: BifrostError) -> bool:
    """Damaged; or, where both the manifest and the draft are lost, a folder that cannot be known for ours."""
    return error.exit_code == 5 or error.code == "BF-USE-002"


def rows_of(path: Path) -> Any:
    store = LatentsStore.open(path)
    return store.latents(range(store.rows)).tobytes(), store.keys, store.captions, store.mean_C.tolist()


class StoreMachine(RuleBasedStateMachine):
    """`harmed` is True since something was done to the files that no crash does."""

    @initialize()
    def begin(self) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="bifrost-machine-"))
        self.folder, self.harmed = self.place / "extract", False
        self.wanted = undisturbed(EXTRACT, self.place)
        self.rows = rows_of(self.folder / OUT)
        self.start_again()

    def teardown(self) -> None:
        if hasattr(self, "place"):
            shutil.rmtree(self.place)

    @rule()
    def start_again(self) -> None:
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        self.harmed = False

    @rule(call=st.integers(1, 140))
    def extract_and_be_killed(self, call: int) -> None:
        before = kept(EXTRACT, self.folder)
        with disk(Watched(Dies(call))):
            try:
                EXTRACT.run(self.folder, lambda: None)
            except (Killed, BifrostError) as error:
                assert isinstance(error, Killed) or self.harmed and refusal(error), error
        assert self.harmed or kept(EXTRACT, self.folder) >= before

    @precondition(lambda self: not any(self.folder.iterdir()))
    @rule(share=st.floats(0, 1), how=st.sampled_from(["least", "most", "zeros", "some"]), seed=st.integers(0, 99))
    def extract_and_lose_power(self, share: float, how: str, seed: int) -> None:
        recorder = Recorder(self.folder)
        with disk(recorder):
            EXTRACT.run(self.folder, lambda: None)
        recorder.cut(int(share * len(recorder)), how, seed)

    @rule()
    def extract(self) -> None:
        try:
            with disk(Watched()):
                EXTRACT.run(self.folder, lambda: None)
        except BifrostError as error:
            assert self.harmed and refusal(error), error
        else:
            assert self.harmed or result(self.folder) == self.wanted

    @precondition(lambda self: self.files())
    @rule(data=st.data())
    def lose_a_file(self, data: st.DataObject) -> None:
        os.unlink(data.draw(st.sampled_from(self.files())))
        self.harmed = True

    @precondition(lambda self: self.files())
    @rule(data=st.data(), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
    def flip_a_bit(self, data: st.DataObject, where: float, bit: int) -> None:
        path = data.draw(st.sampled_from(self.files()))
        harmed = bytearray(path.read_bytes())
        if harmed:
            harmed[int(where * len(harmed))] ^= 1 << bit
            path.write_bytes(harmed)
            self.harmed = True

    @rule()
    def verify(self) -> None:
        try:
            whole = Artifact.open(self.folder / OUT).verify() == []
        except BifrostError as error:
            assert error.exit_code == 5
            return
        assert not whole or rows_of(self.folder / OUT) == self.rows

    @invariant()
    def refused_or_exact(self) -> None:
        if not hasattr(self, "rows"):
            return
        try:
            found = rows_of(self.folder / OUT)
        except BifrostError as error:
            assert error.exit_code == 5, error
        else:
            assert found == self.rows
        assert self.harmed or not broken_promises(EXTRACT, self.folder)

    def files(self) -> list[Path]:
        out = self.folder / OUT
        names = [*payload_files(out), "draft.json", "manifest.json"] if out.exists() else []
        return [out / name for name in sorted(names) if name != LOCK_NAME and (out / name).is_file()]


def run(examples: int, steps: int) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    budget = settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=checks)
    run_state_machine_as_test(StoreMachine, settings=budget)


def test_a_store_is_refused_or_exact():
    run(examples=12, steps=15)


@pytest.mark.crash
@pytest.mark.timeout(1800)
def test_a_store_is_refused_or_exact_for_long():
    run(examples=400, steps=30)
