"""Big stores, and what is done with them, each in a process of its own whose memory is measured.

In: a size and a number of rows. Out: how far the process's memory rose, and how long it took. Encoders are stubs, and
nothing waits for the disk; what plans, writes, hashes, reads and trains is the program's own.
"""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from faults import Watched, disk
from fixtures_mllm import random_mllm
from fixtures_stage_training import recipe
from fixtures_targets import Means
from memory_meter import resident_peak

from bifrost_cli.artifacts import Artifact
from bifrost_cli.config import Latents, Recipe
from bifrost_cli.data import store
from bifrost_cli.data.store import LatentsStore
from bifrost_cli.stages import extract
from bifrost_cli.stages.branch import new_branch
from bifrost_cli.training.branch import BranchTask
from bifrost_cli.training.loop import fit

STORE = Path("runs") / "store"
FORK = multiprocessing.get_context("fork")  # everything is imported


class Repeated(Means):
    """The means of a picture on a grid of 16x16 patches of 3584 channels, under a fixed noise: the paper's size."""

    grid, channels = (16, 16), 3584
    identity = {"name": "repeated", "weights": "b" * 64, "grid": [16, 16], "channels": 3584}
    noise_PC = np.random.default_rng(0).normal(size=(256, 3584)).astype(np.float16)

    def encode(self, pixels_BSS3: Any) -> torch.Tensor:
        means_B = super().encode(pixels_BSS3).mean((1, 2)).half()
        return torch.from_numpy(self.noise_PC) * (1 + means_B[:, None, None])


@dataclass(frozen=True)
class Size:
    """A kind of store: its stub encoder, the recipe's numbers, and bytes of a row's latents."""

    encoder: type[Means]
    rules: dict[str, int]
    row_bytes: int


TINY = Size(Means, {"shard_rows": 1024, "chunk_rows": 16, "batch_size": 64}, 2 * 4 * 8)
FULL = Size(Repeated, {"shard_rows": 32, "chunk_rows": 4, "batch_size": 8}, 2 * 256 * 3584)


def extraction(size: Size, folder: Path, rows: int) -> None:
    """Encode `rows` pictures of the built-in world into `folder`."""
    made = Recipe(latents=Latents(image_size=32, vae=False, **size.rules))
    with mock.patch.object(extract, "load_encoder", lambda *rest, **more: size.encoder(lambda: None)):
        extract.extract_latents(made, source=f"shapes:{rows}:3", output=folder / STORE)


def verification(size: Size, folder: Path, rows: int) -> None:
    assert Artifact.open(folder / STORE).verify() == []


def opening(size: Size, folder: Path, rows: int) -> None:
    assert LatentsStore.open(folder / STORE, verify=False).rows == rows


def reading(size: Size, folder: Path, rows: int) -> None:
    """Rows anywhere, as many from every store."""
    opened, chance = LatentsStore.open(folder / STORE), np.random.default_rng(1)
    for _ in range(READS):
        assert np.isfinite(opened.latents(chance.integers(0, rows, 4))).all()


def training(size: Size, folder: Path, rows: int) -> None:
    """The branch of a random MLLM, for as many steps on every store."""
    made = recipe(steps=READS, batch_size=4, checkpoint_every=READS, validate_every=0, sample_every=0)
    opened, mllm = LatentsStore.open(folder / STORE), random_mllm()
    task = BranchTask(new_branch(made, opened, mllm), mllm, opened, made.branch)
    fit(task, made.branch.train, folder / "work")


READS = 12
WORK: dict[str, Callable[[Size, Path, int], None]] = {
    work.__name__: work for work in (extraction, verification, opening, reading, training)
}


def measured(size: Size, folder: Path, rows: int) -> dict[str, tuple[int, float]]:
    """(peak bytes, seconds) of all that is done with a store of that many rows; the store is removed."""
    receive, send = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_body, args=(size, folder, rows, send))
    process.start()
    send.close()
    found = {name: receive.recv() for name in WORK}
    process.join()
    assert process.exitcode == 0
    shutil.rmtree(folder)
    return found


def _body(size: Size, folder: Path, rows: int, send: Any) -> None:
    """What a store that fits may keep of itself in memory (2 GB) is left out: what grows then should not."""
    torch.set_num_threads(1)
    store._KEPT_IN_MEMORY = 0
    for work in WORK.values():
        began = time.monotonic()
        with disk(Watched()):
            peak = resident_peak(partial(work, size, folder, rows))
        send.send((peak, time.monotonic() - began))
