"""A process and its job: who it is by torchrun's or SLURM's environment, how `--gpus` starts others, how it is stopped.

Imports torch only when there is more than one process.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from bifrost_cli.artifacts.files import append
from bifrost_cli.errors import EnvironmentProblem, Interrupted, UsageError

_STATUS = "BIFROST_STATUS_FILE"  # where the first process that ends with an error leaves its exit code
_WATCHED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
_FAILURE = "BIFROST_FAILURE_FILE"  # where torchrun says why it failed itself
_GRACE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # torchrun kills 30 s after a signal, and a large checkpoint takes longer


class DistributedEnv(NamedTuple):
    """Which process this is, of how many, and which of those on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0


def distributed_env() -> DistributedEnv:
    """From RANK, WORLD_SIZE and LOCAL_RANK (torchrun), else SLURM_* when a MASTER_ADDR says where to meet (srun)."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_PROCID" in os.environ and "MASTER_ADDR" in os.environ:
        os.environ.setdefault("MASTER_PORT", "29500")
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    else:
        return DistributedEnv()
    with contextlib.suppress(ValueError):
        found = DistributedEnv(*(int(os.environ.get(name, "0")) for name in names))
        if 0 <= found.rank < found.world:
            return found
    variables = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
    raise UsageError("the environment names no process of a job", at=variables, fix="start it with torchrun or srun")


def together(stage: Callable[..., Any]) -> Callable[..., Any]:
    """The stage, for a job of any number of processes; the others are met before anything else happens."""

    @functools.wraps(stage)
    def run(*args: Any, **options: Any) -> Any:
        here = distributed_env()
        if here.world == 1:
            return stage(*args, **options)
        require_shared_device(options.get("device", "auto"), here.world)
        from bifrost_cli.runtime import distributed

        distributed.join(*here, options.get("device", "auto"))
        if here.rank:
            options = {**options, "ui": None}  # the first process speaks
        with distributed.fail_together():
            return stage(*args, **options)

    return run


def require_shared_device(device: str, processes: int) -> None:
    """UsageError for a single device (cuda:1, mps) and several processes, which each take the GPU of their number."""
    if processes > 1 and device not in ("auto", "cpu", "cuda"):
        fix = "--device cuda: each process takes the GPU of its own number; CUDA_VISIBLE_DEVICES chooses among them"
        error = UsageError(f"--device {device} is one device, and there are {processes} processes", fix=fix)
        error.elsewhere = distributed_env().rank > 0
        raise error


def start(count: int, arguments: list[str]) -> None:
    """Give the command line `arguments`, without --gpus, to `count` processes under torchrun; end as they do.

    The first process to fail leaves its code in a file. None looks for modules in the current folder.
    """
    if distributed_env().world > 1:
        raise UsageError("--gpus starts processes, and this is one of several already", fix="leave --gpus out")
    with tempfile.TemporaryDirectory(prefix="bifrost-") as folder:
        status = Path(folder) / "status"
        environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)), _GRACE: "3600", **os.environ,
                       _STATUS: str(status), _FAILURE: str(Path(folder) / "failure"),
                       "PYTHONSAFEPATH": "1"}  # fmt: skip
        words = zip(["", *arguments], arguments, strict=False)
        own = [word for before, word in words if "--gpus" not in (before, word) and not word.startswith("--gpus=")]
        code = _torchrun(["--standalone", f"--nproc-per-node={count}", "-m", "bifrost_cli", *own], environment)
        status_of_job = int(status.read_text().split()[0]) if status.exists() else None
        kind, _, why = (failure.read_text() if (failure := Path(folder) / "failure").exists() else "").partition(": ")
    if status_of_job is not None or code == 0:
        raise SystemExit(status_of_job or 0)
    if -code in _WATCHED:
        raise Interrupted("interrupted before anything could be saved", fix="give the same command again")
    if kind not in ("", "ChildFailedError", "SignalException"):  # no process of ours was there to be killed
        raise EnvironmentProblem("the processes of this job cannot start, or not meet", at=f"torchrun: {kind}: {why}",
                                 fix="see whether this machine reaches itself by its own name and by localhost",
                                 code="BF-ENV-032")  # fmt: skip
    fix = "see whether memory ran out (dmesg), then give the same command again to continue"
    raise EnvironmentProblem("the processes of this job were killed", fix=fix, code="BF-ENV-031")


def _torchrun(arguments: list[str], environment: dict[str, str]) -> int:
    """Run it, passing signals on; torchrun's own report of failed processes goes into a file."""
    script = f"""import logging, os, sys
def hook(kind, error, trace):
    with open(os.environ["{_FAILURE}"], "w") as file:
        file.write(kind.__name__ + ": " + str(error).strip().split("\\n")[0][:300])
logging.disable(logging.CRITICAL)
from torch.distributed.run import main
sys.excepthook = hook
main()"""
    command = [sys.executable, "-c", script, *arguments]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    before = {number: signal.signal(number, lambda number, frame: process.send_signal(number)) for number in _heard()}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _heard() -> list[int]:
    """The signals that stop a run: not SIGHUP where it is ignored already, as under nohup."""
    return [n for n in _WATCHED if n.name != "SIGHUP" or signal.getsignal(n) is not signal.SIG_IGN]


def leave_status(code: int) -> None:
    """For `start` and SLURM: how this process ended, a line; the first is that of the process that ended first."""
    if code and (path := os.environ.get(_STATUS)):
        append(Path(path), f"{code}\n")


class StopFlag:
    """Context manager: SIGTERM, Ctrl-C or a terminal that closes sets `requested`; a second one raises `Interrupted`.

    Outside the main thread Python does not deliver signals, so there the flag simply stays False.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on_signal) for number in _heard()}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise Interrupted("stopped by a second signal; the checkpoint before this one is intact")
        self.requested = True
