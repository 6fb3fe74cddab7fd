"""One job in several processes: who this is by torchrun's or SLURM's environment, and starting torchrun for `--gpus`.

In: environment variables, a command line. Out: the place of this process, a stage that first meets the others, an exit
code. No launcher of ours: `--gpus N` runs PyTorch's. Imports torch only when there is more than one process.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bifrost_cli.artifacts.files import append
from bifrost_cli.errors import BifrostError, EnvironmentProblem, Interrupted, UsageError

_STATUS = "BIFROST_STATUS_FILE"  # where the first process that ends with an error leaves its exit code
_GRACE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # torchrun kills 30 s after a signal, and a large checkpoint takes longer


class DistributedEnv(NamedTuple):
    """Which process this is, of how many, and which of those on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0


def distributed_env() -> DistributedEnv:
    """From RANK, WORLD_SIZE and LOCAL_RANK (torchrun), else SLURM_* when a MASTER_ADDR says where to meet (srun)."""
    given = os.environ
    if "RANK" in given and "WORLD_SIZE" in given:
        return _from_variables("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "SLURM_PROCID" in given and "MASTER_ADDR" in given:
        os.environ.setdefault("MASTER_PORT", "29500")
        return _from_variables("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    return DistributedEnv()


def _from_variables(*names: str) -> DistributedEnv:
    try:
        found = DistributedEnv(*(int(os.environ.get(name, "0")) for name in names))
    except ValueError:
        found = DistributedEnv(-1)
    if not 0 <= found.rank < found.world:
        variables = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
        raise UsageError(
            "the environment names no process of a job", at=variables, fix="start it with torchrun or srun"
        )
    return found


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
    """Refuse a single device for several processes, which each take the GPU of their own number.

    Raises:
        UsageError: `device` is one such as cuda:1 or mps, and `processes` is more than one.
    """
    if processes > 1 and device not in ("auto", "cpu", "cuda"):
        error = UsageError(
            f"--device {device} is one device, and there are {processes} processes",
            fix="--device cuda: each process takes the GPU of its own number; CUDA_VISIBLE_DEVICES chooses among them",
        )
        error.elsewhere = distributed_env().rank > 0
        raise error


# ---- --gpus N --------------------------------------------------------------------------------------------------------


def start(count: int, arguments: list[str]) -> None:
    """Give the command line `arguments`, without --gpus, to `count` processes under torchrun; end as they do.

    torchrun returns 1 whatever its processes returned, so the first to fail leaves its code in a file. No process looks
    for modules in the current folder, which may be a data set's.
    """
    if distributed_env().world > 1:
        raise UsageError("--gpus starts processes, and this is one of several already", fix="leave --gpus out")
    with tempfile.TemporaryDirectory(prefix="bifrost-") as folder:
        status = Path(folder) / "status"
        environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)), _GRACE: "3600", **os.environ,
                       _STATUS: str(status), "PYTHONSAFEPATH": "1"}  # fmt: skip
        launch = ["--standalone", f"--nproc-per-node={count}", "-m", "bifrost_cli"]
        code = _torchrun([*launch, *_without_gpus(arguments)], environment)
        status_of_job = int(status.read_text().split()[0]) if status.exists() else None
    if code == 0 and status_of_job is None:
        raise SystemExit(0)
    if status_of_job is None:
        raise _unexplained(code)
    raise SystemExit(status_of_job)


def _without_gpus(arguments: list[str]) -> list[str]:
    pairs = zip(["", *arguments], arguments, strict=False)
    return [own for before, own in pairs if before != "--gpus" and own != "--gpus" and not own.startswith("--gpus=")]


def _torchrun(arguments: list[str], environment: dict[str, str]) -> int:
    """Run it, passing SIGTERM and SIGINT on; torchrun's own report of failed processes is not shown."""
    command = [
        sys.executable,
        "-c",
        "import logging, sys; logging.disable(logging.CRITICAL);"
        " from torch.distributed.run import main; sys.excepthook = lambda *error: None; main()",
        *arguments,
    ]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    before = {number: signal.signal(number, lambda number, frame: process.send_signal(number))
              for number in (signal.SIGTERM, signal.SIGINT)}  # fmt: skip
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _unexplained(code: int) -> BifrostError:
    if code in (-signal.SIGTERM, -signal.SIGINT):
        return Interrupted("interrupted before anything could be saved", fix="give the same command again")
    return EnvironmentProblem(
        "the processes of this job were killed",
        fix="see whether memory ran out (dmesg), then give the same command again to continue",
        code="BF-ENV-031",
    )


def leave_status(code: int) -> None:
    """For `start` and SLURM: how this process ended, a line; the first is that of the process that ended first."""
    path = os.environ.get(_STATUS)
    if code and path:
        append(Path(path), f"{code}\n")
