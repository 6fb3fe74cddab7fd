"""Random frozen bases in folders, small recipes and stores for the tests of the two training stages."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fixtures_flux import save_painter, tiny_painter
from fixtures_mllm import random_mllm
from fixtures_store import make_store

from bifrost_cli.artifacts import Artifact
from bifrost_cli.config import Branch, ControlNet, Latents, Models, Recipe, Train
from bifrost_cli.errors import BifrostError
from bifrost_cli.models.encoders import MllmEncoder, VaeEncoder

# A server that has imported the libraries once and forks: real processes and signals, without their start-up.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["bifrost_cli.stages.branch", "bifrost_cli.stages.controlnet", "torch._dynamo"])

CAPTIONS = ("a red circle", "a blue square above a red circle", "The image shows a green circle", "two squares")
PLANS = ("circle red", "square blue above circle red", "circle green", "square square")
TRAIN = {
    "steps": 12, "batch_size": 4, "lr": 1e-3, "warmup": 2, "ema": 0.5, "precision": "fp32", "checkpoint_every": 4,
    "validate_every": 6, "validation_rows": 4, "sample_every": 12,
}  # fmt: skip


def save_mllm(folder: Path) -> Path:
    """A random MLLM in the layout that `from_pretrained` reads."""
    mllm = random_mllm()
    for part in (mllm.model, mllm.tokenizer, mllm.image_processor):
        part.save_pretrained(folder)
    return folder


def save_flux(folder: Path) -> Path:
    return save_painter(tiny_painter(), folder)


def recipe(mllm: Path = Path("none"), flux: Path = Path("none"), **changes: Any) -> Recipe:
    """A recipe of the smallest sizes; `changes` are fields of the branch and ControlNet sections or their training."""
    train = Train(**{**TRAIN, **{name: value for name, value in changes.items() if name in Train.model_fields}})
    rest = {name: value for name, value in changes.items() if name not in Train.model_fields}
    branch, controlnet = (
        kind(train=train, **{name: value for name, value in fields.items() if name in kind.model_fields})
        for kind, fields in ((Branch, rest), (ControlNet, {"double_blocks": 1, "single_blocks": 1, **rest}))
    )
    models = Models(mllm=str(mllm), painter=str(flux), dtype="float32")
    return Recipe(
        name="test",
        models=models,
        latents=Latents(image_size=64, paint_size=64, encoder=rest.get("encoder", "mllm")),
        branch=branch,
        controlnet=controlnet,
        generate={"painter_tokens": 16},
    )


def mllm_store(path: Path, encoder: dict[str, Any] | None = None, channels: int = 128, **options: Any) -> Artifact:
    """40 random rows of a 4x4 grid that claim to come from the random MLLM's encoder and the random FLUX's VAE."""
    identity = encoder or MllmEncoder(random_mllm(), 64).identity
    texts = {"captions": list(CAPTIONS) * 10, "plans": list(PLANS) * 10}
    sizes = {"grid": (4, 4), "channels": channels, "vae": (16, 16, 16)}
    painter = VaeEncoder(tiny_painter().vae, 64).identity
    return make_store(path, encoder=identity, **{"painter": painter, **sizes, **texts, **options})


def run_stage(stage: Callable[..., Artifact], options: dict[str, Any], error: Path) -> None:
    """The body of a process: one stage, one thread; the exit code is that of the error."""
    torch.set_num_threads(1)
    try:
        stage(**options)
    except BifrostError as problem:
        error.write_text(str(problem))
        raise SystemExit(problem.exit_code) from None


def start(stage: Callable[..., Artifact], error: Path, **options: Any) -> multiprocessing.Process:
    process = SERVER.Process(target=run_stage, args=(stage, options, error))
    process.start()
    return process


def end(process: multiprocessing.Process) -> int:
    process.join(timeout=120)
    return process.exitcode
