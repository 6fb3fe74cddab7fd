"""Nothing is lost when processes are killed: real processes, SIGKILL and SIGTERM, at random moments and inside saves.

Eight kills in the ordinary suite; `pytest -m crash` has 200.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from faults import Watched, disk
from fixtures_stage_training import mllm_store, recipe, save_flux, save_mllm
from fixtures_targets import OUT, TARGETS, Target, inputs, kept, kept_steps, result
from harness import fresh, undisturbed

from bifrost_cli.cli.app import explain
from bifrost_cli.runtime import distributed
from bifrost_cli.training.train_branch import train_branch
from bifrost_cli.training.train_controlnet import train_controlnet

FORK = multiprocessing.get_context("fork")  # everything is imported, so that the moments fall into the work
PAUSE = 0.03  # seconds of work for each batch, step or image, so that a run lasts
TERMINATED = {0, 75, -signal.SIGTERM}  # whole all the same; stopped at the next step; nothing was to be saved


def run_branch(folder: Path, work, **changes) -> None:
    made, store = _frozen(folder, "mllm", save_mllm), _latents(folder)
    train_branch(recipe(mllm=made, **changes), latents=store, output=folder / OUT, device="cpu")


def run_controlnet(folder: Path, work) -> None:
    made, store = _frozen(folder, "flux", save_flux), _latents(folder)
    train_controlnet(recipe(flux=made), latents=store, output=folder / OUT, device="cpu")


def _frozen(folder: Path, name: str, save) -> Path:
    path = inputs(folder) / name
    return path if path.exists() else save(path)


def _latents(folder: Path) -> Path:
    path = inputs(folder) / "latents"
    return path if path.exists() else mllm_store(path).path


ALL = {
    **TARGETS,
    "branch": Target("branch", run_branch, kept_steps, 12),
    "branch in parts": Target("branch-in-parts", partial(run_branch, parallel="fsdp"), kept_steps, 12),
    "controlnet": Target("controlnet", run_controlnet, kept_steps, 12),
}


def body(name: str, folder: Path, number: int, at_call: int) -> None:
    """A process that runs a target, and sends itself the signal at that call to the disk, unless `at_call` is 0."""
    torch.set_num_threads(1)
    calls: list[str] = []

    def hook(kind: str, name: str, arguments: tuple) -> None:
        calls.append(kind)
        if len(calls) == at_call:
            os.kill(os.getpid(), number)

    with disk(Watched(hook)):
        try:
            ALL[name].run(folder, lambda: time.sleep(PAUSE))
        except BaseException as error:
            os._exit(explain(error).exit_code)
    (folder.parent / f"{name}-calls").write_text(str(len(calls)))
    os._exit(0)


def body_of_two(name: str, folder: Path, rank: int, port: int, at_call: int) -> None:
    """One of two processes of a job; it kills itself at that call to the disk, unless `at_call` is 0."""
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    distributed.join(rank, 2, rank, "cpu")
    body(name, folder, signal.SIGKILL, at_call)


def two(name: str, folder: Path, rank: int = 0, at_call: int = 0, after: float | None = None) -> list[int]:
    """Run a job of two; kill the process `rank` at a call to the disk or after a while. Their exit codes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    calls = [at_call if number == rank else 0 for number in range(2)]
    job = [FORK.Process(target=body_of_two, args=(name, folder, n, port, calls[n])) for n in range(2)]
    for process in job:
        process.start()
    if after is not None:
        job[rank].join(after)
        signalled(job[rank], signal.SIGKILL)
    for process in job:
        process.join(60)
        assert process.exitcode is not None, "the other process of the job waits for ever"
    return [process.exitcode for process in job]


def start(name: str, folder: Path, number: int = 0, at_call: int = 0) -> multiprocessing.Process:
    process = FORK.Process(target=body, args=(name, folder, number, at_call))
    process.start()
    return process


def signalled(process: multiprocessing.Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.kill(process.pid, number)


def killed(name: str, place: Path, count: int, seed: int) -> int:
    """Kill runs of a target `count` times; each second time let the same command end, and compare every byte."""
    target, chance, folder = ALL[name], random.Random(seed), place / name
    wanted = undisturbed(target, place)
    seconds, calls = _measured(name, folder)
    kills = trial = 0
    while kills < count or trial % 2:
        assert trial < 4 * count + 8, f"only {kills} kills came in time"
        if trial % 2 == 0:
            fresh(folder)
        before, number = kept(target, folder), chance.choice((signal.SIGKILL, signal.SIGTERM))
        inside = chance.random() < 0.5
        process = start(name, folder, number, chance.randint(1, calls) if inside else 0)
        if not inside:
            time.sleep(chance.uniform(0.05, 1.0) * seconds)
            signalled(process, number)
        process.join()
        kills += process.exitcode != 0
        assert process.exitcode in ({0, -number} | (TERMINATED if number == signal.SIGTERM else set()))
        assert kept(target, folder) >= before
        if trial % 2:
            with disk(Watched()):
                target.run(folder, lambda: None)
            assert result(folder) == wanted, f"trial {trial} of seed {seed}"
        trial += 1
    return kills


def _measured(name: str, folder: Path) -> tuple[float, int]:
    """How long a whole run takes as a process of its own, and how many calls to the disk it makes."""
    fresh(folder)
    began = time.monotonic()
    process = start(name, folder)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - began, int((folder.parent / f"{name}-calls").read_text())


@pytest.mark.parametrize("name", TARGETS)
def test_two_kills_and_the_same_bytes(name, tmp_path):
    assert killed(name, tmp_path, 2, seed=1) >= 2


@pytest.mark.crash
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "count"), [("extract", 40), ("train", 40), ("generate", 40), ("eval", 20),
                                             ("branch", 30), ("controlnet", 30)])  # fmt: skip
def test_many_kills_and_the_same_bytes(name, count, tmp_path):
    print(f"{name}: {killed(name, tmp_path, count, seed=20)} kills")


@pytest.mark.crash
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["extract", "branch", "branch in parts"])
def test_kills_of_one_process_of_two(name, tmp_path):
    """The other one ends too; the same job again ends in the bytes of an undisturbed job of two."""
    target, folder, chance = ALL[name], tmp_path / name.replace(" ", "-"), random.Random(5)
    target.run(fresh(folder), lambda: None)  # makes the inputs
    began = time.monotonic()
    assert two(name, fresh(folder)) == [0, 0]
    seconds, wanted = time.monotonic() - began, result(folder)
    kills = 0
    for _ in range(10):
        fresh(folder)
        rank, inside = chance.randrange(2), chance.random() < 0.5
        moment = {"at_call": chance.randint(5, 60)} if inside else {"after": chance.uniform(0.3, 1.0) * seconds}
        ends = two(name, folder, rank, **moment)
        kills += ends[rank] == -signal.SIGKILL
        assert ends == [0, 0] or ends[1 - rank] in (0, 3), ends
        assert two(name, folder) == [0, 0]
        assert result(folder) == wanted
    print(f"{name}: {kills} kills in jobs of two processes")
    assert kills > 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("name", "units"), [("extract", 3), ("train", 6), ("generate", 3)])
def test_a_signal_inside_a_save_lets_it_finish_and_stops_with_75(name, units, number, tmp_path):
    target, folder = ALL[name], tmp_path / name
    wanted = undisturbed(target, tmp_path)
    _, calls = _measured(name, folder)
    stopped = []
    for at_call in range(calls // 3, calls // 2, calls // 16):
        fresh(folder)
        process = start(name, folder, number, at_call)
        process.join()
        stopped.append(process.exitcode)
        assert 0 < kept(target, folder) and not (folder / OUT / "manifest.json").exists() or process.exitcode == 0
        target.run(folder, lambda: None)
        assert result(folder) == wanted
    assert set(stopped) <= {0, 75} and 75 in stopped


def test_a_signal_while_a_batch_is_read_stops_after_the_step(tmp_path, monkeypatch):
    from fixtures_targets import Regression

    target, folder = ALL["train"], tmp_path / "train"
    wanted, read = undisturbed(target, tmp_path), Regression.batch

    def batch(self, step: int, micro: int):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, step, micro)

    with monkeypatch.context() as patch:
        patch.setattr(Regression, "batch", batch)
        fresh(folder)
        with pytest.raises(BaseException) as caught:
            target.run(folder, lambda: None)
    assert explain(caught.value).exit_code == 75 and kept(target, folder) == 3
    target.run(folder, lambda: None)
    assert result(folder) == wanted


def test_ctrl_c_at_a_prompt_file_keeps_the_pictures(tmp_path):
    target, folder = ALL["generate"], tmp_path / "generate"
    wanted = undisturbed(target, tmp_path)
    fresh(folder)
    process = start("generate", folder)
    while not kept(target, folder):
        time.sleep(0.005)
    signalled(process, signal.SIGINT)
    process.join()
    have = kept(target, folder)
    assert process.exitcode == 75 and have in (1, 2)
    work: list[int] = []
    target.run(folder, lambda: work.append(1))
    assert result(folder) == wanted and len(work) == 3 - have


def test_two_signals_stop_at_once_and_lose_nothing(tmp_path):
    target, folder = ALL["train"], tmp_path / "train"
    wanted = undisturbed(target, tmp_path)
    fresh(folder)
    process = start("train", folder)
    while not kept(target, folder):
        time.sleep(0.005)
    for _ in range(2):
        signalled(process, signal.SIGTERM)
    process.join()
    assert process.exitcode in (75, 130, 0) and kept(target, folder) >= 2
    target.run(folder, lambda: None)
    assert result(folder) == wanted
