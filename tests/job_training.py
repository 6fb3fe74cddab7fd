"""One process of a job of several, started in tests/test_ranks.py: many small things, one after another.

What is trained goes into FOLDER/NAME-PARALLEL-PROCESSES, so that a later job continues
what one of another size has left; what else was seen goes into FOLDER/facts-PROCESSES-NUMBER.json.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from fixtures_stage_training import recipe
from fixtures_training import SmallTask, settings
from torch import Tensor

from bifrost_cli.config import Latents, Recipe
from bifrost_cli.data.store import LatentsStore
from bifrost_cli.data.weights import save_tensors
from bifrost_cli.errors import BifrostError, DataError, RecipeError, Stopped
from bifrost_cli.stages import extract
from bifrost_cli.stages.branch import new_branch
from bifrost_cli.stages.loading import load_mllm, load_painter
from bifrost_cli.stages.ui import Ui
from bifrost_cli.training import loop, ranks
from bifrost_cli.training.branch import BranchTask
from bifrost_cli.training.controlnet import ControlNetTask

ROWS = {"batch_size": 6, "steps": 4, "checkpoint_every": 2, "validate_every": 2, "sample_every": 0, "ema": 0.5}
CPU = torch.device("cpu")
HALF = 3  # the step in which a training is asked to stop, to be continued by another number of processes
TRAINED = {  # by number of processes: what is trained, and which way
    1: ("linear-ddp", "flow-ddp", "controlnet-ddp", "small-ddp"),
    2: ("linear-ddp", "flow-ddp", "controlnet-ddp", "small-ddp", "flow-fsdp", "controlnet-fsdp"),
    3: ("controlnet-ddp", "linear-fsdp"),
}
STOPPED = {1: ("ddp",), 2: ("ddp", "fsdp"), 3: ("fsdp",)}
CONTINUED = {2: (), 3: (("ddp-1", "ddp"), ("fsdp-2", "fsdp"), ("ddp-2", "fsdp"))}
EXTRACTED = {"image_size": 32, "shard_rows": 16, "chunk_rows": 4, "batch_size": 8, "vae": False}


class SharedSmall(SmallTask):
    """The small task with its rows shared, BatchNorm and all; without dropout, which no two processes share."""

    def __init__(self, train: Any) -> None:
        super().__init__(train)
        self.module.layers[2].p = 0.0

    def batch(self, step: int, micro: int) -> list[int]:
        return super().batch(step, micro)[ranks.share(self.train.batch_size, "batch_size")]

    def loss(self, batch: list[int], generator: torch.Generator) -> tuple[Tensor, dict]:
        return (self.module(self.x[batch]) - self.y[batch]).square().mean(), {}


class Averages:
    """An encoder of nothing but means of pixels: 2x2 patches of 32 px."""

    image_size, grid, channels = 32, (2, 2), 3
    identity = {"name": "averages", "weights": "a" * 64, "grid": [2, 2], "channels": 3}

    def encode(self, pixels_BSS3: Any) -> Tensor:
        parts = torch.as_tensor(pixels_BSS3).float().unflatten(1, (2, 16)).unflatten(3, (2, 16)).mean((2, 4))
        return parts.flatten(1, 2)


class Said(Ui):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


# ---- trainings -------------------------------------------------------------------------------------------------------


def branch(folder: Path, **changes: Any) -> BranchTask:
    made, mllm = recipe(**{**ROWS, **changes}), load_mllm(str(folder / "mllm"), CPU, torch.float32)
    store = LatentsStore.open(folder / "latents")
    module = new_branch(made, store, mllm)
    if made.branch.train.gradient_checkpointing:
        module.enable_gradient_checkpointing()
    return BranchTask(module, mllm, store, made.branch)


def controlnet(folder: Path, **changes: Any) -> ControlNetTask:
    made, store = recipe(**{**ROWS, **changes}), LatentsStore.open(folder / "latents")
    painter = load_painter(str(folder / "flux"), CPU, torch.float32)
    torch.manual_seed(0)
    module = painter.new_controlnet(1, 1, store.channels).float()
    return ControlNetTask(module, painter, store, made.controlnet, 16)


def task(folder: Path, name: str, parallel: str) -> Any:
    """Each thing that could depend on the number of processes is in one of these."""
    if name == "linear":
        return branch(folder, accumulate=2, parallel=parallel)
    if name == "flow":
        return branch(folder, head="flow", loss_on="masked", gradient_checkpointing=True, sample_every=4,
                      parallel=parallel)  # fmt: skip
    if name == "controlnet":
        return controlnet(folder, latent_noise=0.3, parallel=parallel)
    return SharedSmall(settings(**{**ROWS, "parallel": parallel}))


class Stop:
    """A stop flag that is set by hand."""

    requested = False

    def __enter__(self) -> Stop:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def fit(task: Any, folder: Path, stop_at: int | None = None) -> bool:
    """Train; with `stop_at` the last process alone is asked to stop in that step. True when it went to the end."""
    stop, batch, watched = Stop(), task.batch, loop.StopFlag

    def asking(step: int, micro: int) -> Any:
        stop.requested = step + 1 == stop_at and ranks.rank() == ranks.world() - 1
        return batch(step, micro)

    task.batch, loop.StopFlag = asking, lambda: stop
    train = task.train if isinstance(task, SharedSmall) else task._settings.train
    try:
        result = loop.fit(task, train, folder)
    except Stopped:
        return False
    finally:
        loop.StopFlag = watched
    if ranks.rank() == 0:
        save_tensors(folder / "final.safetensors", result.ema_state)
    return True


def go_on(folder: Path, half: str, parallel: str) -> None:
    """Continue a stopped training in this number of processes."""
    copy = folder / f"rest-{half}-{parallel}-{ranks.world()}"
    ranks.first_does(lambda: shutil.copytree(folder / f"half-{half}", copy) and None)
    assert fit(branch(folder, parallel=parallel), copy)


# ---- what else can be seen only by several ---------------------------------------------------------------------------


def full_disk(folder: Path) -> str:
    """A training in parts whose last process has no room for its second checkpoint."""
    sync = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    made, calls = branch(folder, parallel="fsdp", validate_every=0, sample_every=0), loop._save

    def saving(state: Any, checkpoints: Any, digests: Any) -> None:
        os.fsync = full if state.step == 4 and ranks.rank() == ranks.world() - 1 else sync
        calls(state, checkpoints, digests)

    loop._save = saving
    try:
        return told(lambda: fit(made, folder / "full"))
    finally:
        loop._save, os.fsync = calls, sync


def told(work: Any) -> str:
    try:
        work()
    except BifrostError as error:
        return f"{type(error).__name__} {error.code} {error.exit_code}"
    return "nothing"


def raising(error: BifrostError) -> None:
    raise error


def one_bad_part() -> None:
    with ranks.all_or_none():
        if ranks.rank() == ranks.world() - 1:
            raise DataError("one row is bad", code="BF-DATA-003")


def extracted(folder: Path, name: str, rows: int) -> list[str]:
    extract.load_encoder = lambda recipe, device: Averages()
    ui, place = Said(), folder / f"{name}-{ranks.world()}"
    extract.extract_latents(Recipe(latents=Latents(**EXTRACTED)), source=f"shapes:{rows}:3", output=place, ui=ui)
    return ui.lines


def facts(folder: Path) -> dict[str, Any]:
    seen = {
        "share": told(lambda: ranks.share(7, "branch.train.batch_size")),
        "first": told(lambda: ranks.first_does(lambda: raising(RecipeError("no", code="BF-RECIPE-004")))),
        "bad part": told(one_bad_part),
        "said": extracted(folder, "store", 90),
        "said of few": extracted(folder, "few", 20),
    }
    if ranks.world() == 2:
        seen["full disk"] = full_disk(folder)
    return seen


def everything(folder: Path) -> None:
    world = ranks.world()
    for name in TRAINED[world]:
        assert fit(task(folder, *name.split("-")), folder / f"{name}-{world}")
    for parallel in STOPPED[world]:
        assert not fit(branch(folder, parallel=parallel), folder / f"half-{parallel}-{world}", HALF)


def main(folder: Path, number: int, of: int, port: int) -> None:
    """The body of process `number` of `of`, which meet at `port`."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(number), WORLD_SIZE=str(of), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ranks.join(number, of, number, "cpu")
    everything(folder)
    for half, parallel in CONTINUED[of]:
        go_on(folder, half, parallel)
    (folder / f"facts-{of}-{number}.json").write_text(json.dumps(facts(folder)))
