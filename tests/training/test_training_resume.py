"""Exact resume, with real processes and real signals: the final bytes are those of an undisturbed training."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from fixtures_training import SmallTask, settings, train_small

from bifrost_cli.artifacts.files import sha256_file
from bifrost_cli.training.loop import fit

# A server that has imported torch once and forks: real processes, real kills, without seconds of start-up for each.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torch._dynamo", "torch.optim.swa_utils"])


def start(folder: Path, *, pause: float = 0.0, die: int = 0, **changes: object) -> multiprocessing.Process:
    process = SERVER.Process(target=train_small, args=(folder, changes, pause, die))
    process.start()
    return process


def end(process: multiprocessing.Process) -> int:
    process.join(timeout=60)
    return process.exitcode


def wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.01)


def fingerprint(folder: Path) -> dict[str, str]:
    """Digests of all that must not depend on interruptions (train.log and state.json hold times)."""
    final = max((folder / "checkpoints").glob("step-*"))
    names = [folder / "losses.csv", folder / "validation.csv", *final.glob("*.safetensors")]
    return {path.name: sha256_file(path) for path in names}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert end(start(folder)) == 0
    return fingerprint(folder)


def test_ten_steps_a_kill_and_ten_more_are_twenty(tmp_path, undisturbed):
    process = start(tmp_path, pause=0.02, checkpoint_every=10)
    wait_for(tmp_path / "checkpoints" / "step-0000010")
    process.kill()
    assert end(process) == -signal.SIGKILL
    assert end(start(tmp_path, checkpoint_every=10)) == 0
    assert fingerprint(tmp_path) == undisturbed


def test_kills_in_the_save_and_at_random_moments(tmp_path, undisturbed):
    chance = random.Random(11)
    for number, fsync in enumerate((2, 9, 30, 61)):
        process = start(tmp_path, checkpoint_every=1, die=fsync, save_in_background=number % 2 == 1)
        assert end(process) == -signal.SIGKILL
    ends = []
    for _ in range(10):
        process = start(tmp_path, checkpoint_every=1, pause=0.4, save_in_background=len(ends) % 2 == 1)
        time.sleep(0.2 + chance.uniform(0.0, 0.4))
        process.kill()
        ends.append(end(process))
    assert ends == [-signal.SIGKILL] * 10  # none had finished before it was killed
    assert end(start(tmp_path, checkpoint_every=3)) == 0
    assert fingerprint(tmp_path) == undisturbed
    assert not list(tmp_path.rglob(".bifrost-tmp-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_stops_with_75_and_continues(tmp_path, undisturbed, number):
    process = start(tmp_path, pause=0.05, checkpoint_every=0)
    wait_for(tmp_path / "losses.csv")
    os.kill(process.pid, number)
    assert end(process) == 75
    assert "run the same command again" in (tmp_path / "error.txt").read_text()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    assert end(start(tmp_path, checkpoint_every=0)) == 0
    assert fingerprint(tmp_path) == undisturbed


def test_a_second_signal_stops_at_once_with_130(tmp_path):
    process = start(tmp_path, pause=2.0)
    wait_for(tmp_path / "train.log")
    time.sleep(0.5)
    for _ in range(2):
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.2)
    assert end(process) == 130
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").iterdir())


def test_the_canary_a_generator_that_is_not_a_function_of_the_step_is_noticed(tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr("bifrost_cli.training.loop.micro_seed", lambda *parts: int.from_bytes(os.urandom(4), "big"))
    fit(SmallTask(settings()), settings(), tmp_path)
    assert fingerprint(tmp_path)["model.safetensors"] != undisturbed["model.safetensors"]
