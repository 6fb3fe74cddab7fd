"""Nothing is lost when processes are killed: real processes, SIGKILL and SIGTERM, at random moments and inside saves.

Eight kills in the ordinary suite; `pytest -m crash` has 200.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from faults import Watched, disk
from fixtures_targets import OUT, TARGETS, kept, result
from harness import fresh, undisturbed

from bifrost_cli.cli.main import explain

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["fixtures_targets", "torch._dynamo", "torch.optim.swa_utils"])
STOPPED = {75, 130}  # at the next step; at once, with a second signal or where nothing had begun


def body(name: str, folder: Path, number: int, at_call: int, pause: float) -> None:
    """A process that runs a target; it sends itself the signal at that call to the disk, unless `at_call` is 0."""
    torch.set_num_threads(1)
    calls = iter(range(1, at_call))

    def hook(kind: str, name: str, arguments: tuple) -> None:
        if at_call and next(calls, None) is None and at_call not in done:
            done.add(at_call)
            os.kill(os.getpid(), number)

    done: set[int] = set()
    with disk(Watched(hook)):
        try:
            (folder / "begun").touch()
            TARGETS[name].run(folder, lambda: time.sleep(pause))
        except BaseException as error:
            raise SystemExit(explain(error).exit_code) from None


def start(name: str, folder: Path, number: int = 0, at_call: int = 0, pause: float = 0.0) -> multiprocessing.Process:
    process = SERVER.Process(target=body, args=(name, folder, number, at_call, pause))
    process.start()
    return process
