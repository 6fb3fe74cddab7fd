"""A small regression task for the tests of the training loop, and the body of a process that trains it in a folder."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from bifrost_cli.errors import BifrostError
from bifrost_cli.training.loop import fit
from bifrost_cli.training.order import batch_indices

SETTINGS = {
    "steps": 20, "batch_size": 8, "accumulate": 1, "optimizer": "adamw", "lr": 1e-2, "betas": (0.9, 0.95),
    "weight_decay": 0.01, "warmup": 4, "clip": 1.0, "ema": 0.9,
    "precision": "fp32", "seed": 3, "checkpoint_every": 5, "keep": 2, "log_every": 0,
    "validate_every": 10, "sample_every": 0, "tensorboard": False, "parallel": "ddp",
}  # fmt: skip


def settings(**changes: object) -> SimpleNamespace:
    return SimpleNamespace(**{**SETTINGS, **changes})


class Small(nn.Module):
    """A network with everything that can go wrong on resume: dropout, batch statistics, a one-dimensional parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 3))
        for number, parameter in enumerate(self.parameters()):
            values = torch.sin(torch.arange(parameter.numel()) * 0.7 + number)
            parameter.data = (0.3 * values).reshape(parameter.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class SmallTask:
    """Fits a fixed map of formula-made rows; `poison` makes one row NaN, `pause` slows each step down (seconds)."""

    def __init__(self, train: SimpleNamespace, rows: int = 40, poison: int | None = None, pause: float = 0.0) -> None:
        self.module, self.train, self.pause = Small(), train, pause
        self.x = torch.cos(torch.arange(rows * 6) * 1.3).reshape(rows, 6)
        self.y = torch.sin(self.x @ torch.arange(18.0).reshape(6, 3))
        if poison is not None:
            self.x[poison] = float("nan")

    def batch(self, step: int, micro: int) -> list[int]:
        number = step * self.train.accumulate + micro
        return batch_indices(self.train.seed, number, self.train.batch_size, len(self.x))

    def loss(self, batch: list[int], generator: torch.Generator) -> tuple[torch.Tensor, dict]:
        time.sleep(self.pause)
        noise = 0.01 * torch.randn(len(batch), 6, generator=generator)
        loss = (self.module(self.x[batch] + noise) - self.y[batch]).square().mean()
        return loss, {"noise": noise.abs().mean()}

    def keys(self, batch: list[int]) -> list[str]:
        return [f"row-{row}" for row in batch]

    def validate(self) -> dict[str, float]:
        return {"loss": (self.module(self.x) - self.y).square().mean()}


def die_at_fsync(count: int) -> None:
    """SIGKILL ourselves at the `count`-th fsync: before its file counts as written."""
    calls, fsync = iter(range(1, count)), os.fsync

    def counted(descriptor: int) -> None:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = counted


def train_small(folder: Path, changes: dict[str, Any], pause: float = 0.0, die: int = 0) -> None:
    """The body of a process: train in `folder`, exit with the code of the error. `pause` slows each step down
    (seconds), `die` is for `die_at_fsync`."""
    torch.set_num_threads(1)
    if die:
        die_at_fsync(die)
    train = settings(**changes)
    try:
        fit(SmallTask(train, pause=pause), train, folder)
    except BifrostError as error:
        (folder / "error.txt").write_text(str(error))
        raise SystemExit(error.exit_code) from None
