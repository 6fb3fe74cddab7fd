"""Reading ahead: the same batches in the same order, never too many, errors in the step they belong to."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from fixtures_mllm import random_mllm
from fixtures_stage_training import mllm_store, recipe
from fixtures_training import SmallTask, settings

from bifrost_cli.config.schema import Train
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.errors import BifrostError, StoreError
from bifrost_cli.training.batch_loader import BatchLoader
from bifrost_cli.training.loop import fit
from bifrost_cli.training.train_branch import BranchTask, build_branch

CPU = torch.device("cpu")


class ReadingTask(SmallTask):
    """The small task with its rows read in a half that may run ahead; `pause` slows the reads down (seconds)."""

    def __init__(self, train, pause: float = 0.0, bad: tuple[int, BaseException] | None = None) -> None:
        super().__init__(train)
        self.pause, self.slow, self.bad = 0.0, pause, bad
        self.read, self.used, self.most = [], 0, 0

    def fetch(self, step, micro):
        time.sleep(self.slow)
        if self.bad is not None and step == self.bad[0]:
            raise self.bad[1]
        self.read.append((step, micro))
        self.most = max(self.most, len(self.read) - self.used)
        return SmallTask.batch(self, step, micro)

    def assemble(self, fetched):
        self.used += 1
        return fetched

    def batch(self, step, micro):
        return self.assemble(self.fetch(step, micro))


def trained(folder, **changes):
    train = settings(**changes)
    task = ReadingTask(train)
    result = fit(task, train, folder)
    return task, result.ema_state, (folder / "losses.csv").read_bytes()


def test_what_is_read_ahead_changes_no_bit(tmp_path):
    _, weights, losses = trained(tmp_path / "in the step", read_ahead=0, accumulate=2)
    for ahead, overlap in ((1, False), (3, False), (3, True), (100, True)):
        task, again, other = trained(tmp_path / f"{ahead}-{overlap}", read_ahead=ahead, overlap=overlap, accumulate=2)
        assert other == losses and all(torch.equal(weights[name], again[name]) for name in weights)
        assert sorted(task.read) == [(step, micro) for step in range(20) for micro in range(2)]


def test_a_branch_is_the_same_with_the_next_batch_encoded_beside_the_step(tmp_path):
    mllm_store(tmp_path / "latents-a")
    tables = []
    for changes in ({"read_ahead": 0}, {"read_ahead": 2}, {"read_ahead": 2, "overlap": True}):
        made, store, mllm = recipe(steps=6, **changes), LatentsStore.open(tmp_path / "latents-a"), random_mllm()
        fit(BranchTask(build_branch(made, store, mllm), mllm, store, made.branch), made.branch.train,
            tmp_path / str(len(tables)))  # fmt: skip
        tables.append([(tmp_path / str(len(tables)) / name).read_bytes() for name in ("losses.csv", "validation.csv")])
    assert tables[0] == tables[1] == tables[2]


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_batches_lie_read_than_the_recipe_says(tmp_path, ahead):
    task, *_ = trained(tmp_path, read_ahead=ahead)
    assert task.most <= ahead + 1  # and the one in use


@pytest.mark.parametrize("ahead", [0, 3])
def test_an_error_of_a_read_arrives_in_its_step(tmp_path, ahead):
    train = settings(read_ahead=ahead)
    with pytest.raises(StoreError, match="a flipped chunk"):
        fit(ReadingTask(train, bad=(7, StoreError("a flipped chunk"))), train, tmp_path)
    assert len((tmp_path / "losses.csv").read_text().splitlines()) == 1 + 7
    assert (tmp_path / "checkpoints" / "step-0000005").is_dir()


def test_a_thread_that_dies_is_an_error_and_no_hang(tmp_path):
    train = settings()
    with pytest.raises(BifrostError, match="thread that read batch 3 ahead ended") as found:
        fit(ReadingTask(train, bad=(3, SystemExit(0))), train, tmp_path)
    assert "read_ahead=0" in found.value.fix


def test_a_stop_does_not_wait_for_a_disk_that_hangs(monkeypatch):
    monkeypatch.setattr("bifrost_cli.training.batch_loader.LEFT_ALONE", 0.1)
    hangs, train = threading.Event(), settings()
    task = ReadingTask(train)
    task.fetch = lambda step, micro: hangs.wait() if step else []
    began = time.monotonic()
    with BatchLoader(task, 20, 1, 2, CPU) as loader:
        loader.get(0, 0)
    assert time.monotonic() - began < 5
    hangs.set()


def test_slow_reads_run_beside_the_steps_and_what_is_left_of_them_is_said(tmp_path):
    seconds, said = {}, {}
    for ahead in (0, 2):
        train = settings(steps=12, read_ahead=ahead, checkpoint_every=100, validate_every=0)
        task, lines = ReadingTask(train, pause=0.06), []
        plain = task.loss
        task.loss = lambda *given, loss=plain: (time.sleep(0.06), loss(*given))[1]  # a device that needs as long
        task.validate = dict
        began = time.monotonic()
        fit(task, train, tmp_path / str(ahead), ui=SimpleNamespace(say=lines.append))
        seconds[ahead], said[ahead] = time.monotonic() - began, [line for line in lines if "data_wait" in line]
    assert seconds[2] < 0.95 * seconds[0], seconds  # all of it hidden would be 0.54, on a machine that is not busy
    waits = {ahead: float(lines[-1].split()[1]) for ahead, lines in said.items()}
    assert said[0][-1].startswith("data_wait ") and "%" in said[0][-2]
    assert waits[0] > 11 * 0.06 and waits[2] < 0.8 * waits[0], waits  # said with two digits


def test_one_thread_at_a_time_is_in_the_tokenizer(tmp_path):
    """A fast tokenizer keeps how it reads special tokens in itself: two threads would change it under each other."""
    mllm_store(tmp_path / "latents-a")
    made, store, mllm = recipe(), LatentsStore.open(tmp_path / "latents-a"), random_mllm()
    task, inside = BranchTask(build_branch(made, store, mllm), mllm, store, made.branch), []
    most, ids = [], type(mllm.template).ids

    def watched(template, text):
        inside.append(text)
        most.append(len(inside))
        time.sleep(0.005)
        found = ids(template, text)
        inside.remove(text)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(mllm.template), "ids", watched)
        threads = [threading.Thread(target=task.fetch, args=(step, 0)) for step in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert max(most) == 1


def test_overlap_without_reading_ahead_is_refused():
    with pytest.raises(ValueError, match="read_ahead is 0"):
        Train(overlap=True, read_ahead=0)
