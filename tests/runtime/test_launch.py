"""`--gpus N`, torchrun, SLURM: who a process is, how a job ends, and what its exit code says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fixtures_stage_training import mllm_store, save_mllm

from bifrost_cli.errors import EnvironmentProblem, UsageError
from bifrost_cli.runtime import launch
from bifrost_cli.training.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "MASTER_ADDR")


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PLACE:
        monkeypatch.delenv(name, raising=False)


# ---- who this is -----------------------------------------------------------------------------------------------------

SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    "given, place",
    [
        ({}, (0, 1, 0)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, (1, 2, 0)),
        (SLURM, (0, 1, 0)),  # a job's script itself, not a step of it
        ({**SLURM, "MASTER_ADDR": "node1"}, (3, 8, 1)),
        ({**SLURM, "MASTER_ADDR": "node1", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (1, 2, 1)),
    ],
)
def test_the_environment_says_who_this_is(given, place, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29500")  # so that the default that `place` sets does not stay
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert launch.distributed_env() == place


@pytest.mark.parametrize("given", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}])
def test_an_environment_that_names_nobody_is_refused(given, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="no process of a job"):
        launch.distributed_env()


# ---- how torchrun is started, without it -----------------------------------------------------------------------------


def started(monkeypatch: pytest.MonkeyPatch, code: int, *told: int) -> tuple[int, list[str]]:
    """`start` with a torchrun that returns `code` after processes left the codes `told`."""
    seen: list[str] = []

    def fake(arguments: list[str], environment: dict[str, str]) -> int:
        seen.extend(arguments)
        for own in told:
            monkeypatch.setenv("BIFROST_STATUS_FILE", environment["BIFROST_STATUS_FILE"])
            launch.leave_status(own)
        return code

    monkeypatch.setattr(launch, "_torchrun", fake)
    with pytest.raises(SystemExit) as ended:
        launch.start(3, ["train", "branch", "--gpus", "3", "-q", "--gpus=3"])
    return ended.value.code, seen


def test_the_exit_code_is_that_of_the_first_process_to_end_badly(monkeypatch):
    code, seen = started(monkeypatch, 1, 75, 75, 3)
    assert code == 75
    assert seen == ["--standalone", "--nproc-per-node=3", "-m", "bifrost_cli", "train", "branch", "-q"]
    assert started(monkeypatch, 0)[0] == 0


def test_killed_processes_have_a_message(monkeypatch):
    with pytest.raises(EnvironmentProblem, match="were killed"):
        started(monkeypatch, 1)


def test_gpus_inside_a_job_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one of several already"):
        launch.start(2, [])


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1", "mps", "xpu", "xpu:0"])
def test_one_device_for_several_processes_is_refused(device, monkeypatch):
    with pytest.raises(UsageError, match=f"--device {device} is one device, and there are 8 processes"):
        launch.require_shared_device(device, 8)
    launch.require_shared_device(device, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):  # refused before the processes meet, and said by one of them
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(UsageError, match="2 processes") as caught:
            launch.together(lambda **options: pytest.fail("the stage ran"))(device=device)
        assert caught.value.elsewhere == (rank == 1)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_each_process_takes_its_own_device(device):
    launch.require_shared_device(device, 8)


# ---- whole jobs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    mllm_store(folder / "latents")
    save_mllm(folder / "mllm")
    return folder


def command(folder: Path, *more: str) -> list[str]:
    """train branch, of many small steps, on the folder's store."""
    keys = {"models.mllm": folder / "mllm", "images.input_size": 64, "branch.plan_share": 0}
    train = {"steps": 3000, "batch_size": 4, "checkpoint_every": 20, "validate_every": 0, "sample_every": 0, "keep": 1}
    keys |= {f"branch.train.{name}": value for name, value in train.items()}
    sets = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    latents = ["--latents", str(folder / "latents"), "-o", str(folder / "branch"), "--device", "cpu"]
    return [sys.executable, "-m", "bifrost_cli", "train", "branch", *latents, *sets, *more]


def run(arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(folder: Path, beyond: int) -> None:
    checkpoints, until = Checkpoints(folder / "branch" / "work" / "checkpoints"), time.monotonic() + 120
    while max(checkpoints.steps(), default=0) <= beyond and time.monotonic() < until:
        time.sleep(0.1)


def workers(folder: Path) -> dict[int, int]:
    """Process ids of the running job in `folder`, by their number."""
    found = {}
    for process in Path("/proc").iterdir():
        try:
            told = dict(entry.split("=", 1) for entry in (process / "environ").read_text().split("\0") if "=" in entry)
            if "RANK" in told and str(folder) in (process / "cmdline").read_text():
                found[int(told["RANK"])] = int(process.name)
        except (OSError, ValueError):
            continue
    return found


def test_a_signal_saves_in_all_and_one_process_goes_on(folder):
    job = run(command(folder, "--gpus", "2"))
    wait_for_step(folder, 0)
    job.send_signal(signal.SIGTERM)
    out, said = job.communicate(timeout=120)
    assert job.returncode == 75, said
    assert out == "" and said.count("error[BF-STOP-001]") == 1 and "by 2 processes (ddp), 2 rows each" in said
    stopped = Checkpoints(folder / "branch" / "work" / "checkpoints").newest().step
    alone = run(command(folder))
    wait_for_step(folder, stopped)
    alone.send_signal(signal.SIGTERM)
    _, said = alone.communicate(timeout=120)
    assert alone.returncode == 75 and f"continues at step {stopped} of 3000" in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_process_ends_the_job_with_a_message_and_a_checkpoint(folder, number):
    before = max(Checkpoints(folder / "branch" / "work" / "checkpoints").steps(), default=0)
    job = run(command(folder, "--gpus", "2", "--set", "branch.train.parallel=fsdp"))
    wait_for_step(folder, before)
    os.kill(workers(folder)[number], signal.SIGKILL)
    _, said = job.communicate(timeout=120)
    assert job.returncode == 3 and said.count("error[") == 1 and "killed or lost" in said, said
    assert Checkpoints(folder / "branch" / "work" / "checkpoints").newest().step > before


@pytest.mark.slow
def test_a_second_job_is_told_who_writes_there(folder):
    first = run(command(folder, "--gpus", "2"))
    wait_for_step(folder, max(Checkpoints(folder / "branch" / "work" / "checkpoints").steps(), default=0))
    _, said = (second := run(command(folder, "--gpus", "2"))).communicate(timeout=120)
    assert second.returncode == 5 and said.count("error[BF-ART-006]") == 1 and "locked by pid" in said
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=120)
    assert first.returncode == 75


# ---- SLURM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status, code", [("75", 75), ("3", 3), ("", 0)])
@pytest.mark.parametrize("name", ["branch", "controlnet", "extract", "generate"])
def test_a_slurm_job_is_queued_again_only_when_it_stopped_on_request(name, status, code, tmp_path):
    """With a srun and a scontrol that only write down how they were called; srun kills a process that was slow."""
    tools = tmp_path / "bin"
    tools.mkdir()
    ends = f'echo {status} >> "$BIFROST_STATUS_FILE"; exit 143' if status else "exit 0"
    scripts = {"srun": f'echo "srun $MASTER_ADDR $MASTER_PORT $@" >> calls; {ends}',
               "scontrol": 'echo "scontrol $@" >> calls; [ "$1" != show ] || printf "node7\\nnode8\\n"'}  # fmt: skip
    for tool, body in scripts.items():
        (tools / tool).write_text(f"#!/bin/bash\n{body}\n")
        (tools / tool).chmod(0o755)
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[7-8]",
                   "SLURM_CPUS_PER_TASK": "8"}  # fmt: skip
    script = ROOT / "recipes" / "slurm" / f"{name}.sbatch"
    done = subprocess.run(["bash", script, "--recipe", "my recipe"], env=environment, cwd=tmp_path, timeout=20)
    assert done.returncode == code
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[1].startswith("srun node7 20017 --kill-on-bad-exit=1 bifrost ") and "--recipe my recipe" in calls[1]
    assert ("scontrol requeue 17" in calls) == (code == 75)
    assert "--signal=TERM@300" in script.read_text() and not (tmp_path / ".bifrost-status-17").exists()


def test_a_terminal_that_closes_stops_as_a_signal_does_unless_it_is_ignored():
    with launch.StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    try:
        with launch.StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_job_that_cannot_start_is_not_called_killed(monkeypatch):
    plain = launch._torchrun
    broken = ["--rdzv-backend=nonsense", "--rdzv-endpoint=localhost:1", "--nnodes=1:2", "-m", "bifrost_cli"]
    monkeypatch.setattr(launch, "_torchrun", lambda arguments, environment: plain(broken, environment))
    with pytest.raises(EnvironmentProblem, match="cannot start, or not meet") as caught:
        launch.start(2, ["doctor"])
    assert caught.value.code == "BF-ENV-032" and "nonsense" in str(caught.value.at)
