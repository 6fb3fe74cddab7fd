"""`bifrost plan`: what a recipe needs, before anything is fetched, loaded or computed.

Parameters, memory by stage and the settings that would make it fit, disk, steps, operations, hours, and downloads with
their licences, as plain values. Only configurations are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from pydantic import ValidationError

from bifrost_cli.config.schema import Recipe, Train
from bifrost_cli.planning import compute, memory
from bifrost_cli.planning.memory import STAGES, estimate, estimates
from bifrost_cli.planning.meta_models import MetaModels, build, numbers
from bifrost_cli.planning.model_configs import DIFFUSION_PARTS, about

UTILISATION = 0.4  # of the device's peak; what well-fed trainings of this size reach
_LINE = 400  # bytes of a row in a store's index


def plan(
    recipe: Recipe, *, gpus: int = 1, gpu: str = "h100", memory_limit: int | None = None, images: int = 1_000_000
) -> dict[str, Any]:
    """Everything that a recipe needs.

    Args:
        recipe: the recipe.
        gpus: number of devices.
        gpu: their kind, a key of `compute.DEVICES`.
        memory_limit: bytes of one device; each stage then says whether it fits, and which settings would make it fit.
        images: images of the latents store.

    Returns:
        JSON values; sizes in bytes.

    Raises:
        RecipeError: a model or a setting that cannot be planned.
    """
    system = build(recipe)
    memory_of = estimates(system, recipe, gpus)
    work_of = dict(_work(system, recipe, gpus, gpu, images))
    stages: dict[str, dict[str, Any]] = {name: {"memory": asdict(memory_of[name]), **work_of[name]} for name in STAGES}
    if memory_limit is not None:
        for name, stage in stages.items():
            stage["fits"] = memory_of[name].peak <= memory_limit
            stage["fits_with"] = _fitting(system, recipe, gpus, name, memory_limit)
    return {
        "recipe": recipe.name,
        "device": {"gpu": gpu, "gpus": gpus, "peak": compute.DEVICES[gpu], "utilisation": UTILISATION,
                   "memory": memory_limit},
        "images": images,
        "parts": list(_parts(system)),
        "stages": stages,
        "disk": _disk(system, recipe, images),
        "downloads": list(_downloads(system)),
    }  # fmt: skip


# ---- parts ----------------------------------------------------------------------------------------------------------


def _parts(system: MetaModels) -> Iterator[dict[str, Any]]:
    branch, controlnet, models = system.branch, system.controlnet, system.recipe.models
    inside = numbers(system.encoder) if system.own_encoder else 0
    yield _part("MLLM decoder and vocabulary", numbers(system.mllm) - inside, models.mllm)
    yield _part("visual encoder", numbers(system.encoder), models.mllm if inside else system.recipe.latents.encoder)
    for name in DIFFUSION_PARTS:
        yield _part(f"FLUX {name}", numbers(getattr(system, name)), models.diffusion)
    new = branch.mask_token.numel() + branch.position_embedding.numel()
    head = numbers(branch.vision_head, branch.input_projection)
    yield _part("branch decoder", numbers(branch) - new - head, trained=numbers(branch.decoder, trained=True))
    yield _part("branch head", head, trained=head)
    yield _part("branch mask token and positions", new, trained=new)
    embedder = numbers(controlnet.controlnet_x_embedder)
    yield _part("ControlNet blocks", numbers(controlnet) - embedder, trained=numbers(controlnet) - embedder)
    yield _part("ControlNet embedder", embedder, trained=embedder)


def _part(name: str, parameters: int, model: str | None = None, trained: int = 0) -> dict[str, Any]:
    return {"name": name, "model": model, "parameters": parameters, "trained": trained}


# ---- time -----------------------------------------------------------------------------------------------------------


def _work(system: MetaModels, recipe: Recipe, gpus: int, gpu: str, images: int) -> Iterator[tuple[str, dict[str, Any]]]:
    rate = compute.DEVICES[gpu] * UTILISATION * gpus
    counts: dict[str, tuple[Callable[[MetaModels, Recipe], int], int]] = {
        "extract-latents": (compute.extraction, images * (1 + recipe.latents.flip)),
        "train branch": (compute.branch_step, recipe.branch.train.steps),
        "train controlnet": (compute.controlnet_step, recipe.controlnet.train.steps),
        "generate": (compute.image, 1),
    }
    for name in STAGES:
        operations, times = counts[name]
        each = operations(system, recipe)
        yield name, {"times": times, "flops_each": each, "flops": each * times, "hours": each * times / rate / 3600}


# ---- disk and downloads ---------------------------------------------------------------------------------------------


def _disk(system: MetaModels, recipe: Recipe, images: int) -> dict[str, int]:
    latents, side = recipe.latents, recipe.images.output_size // system.factor
    rows, bytes_each = images * (1 + latents.flip), {"float16": 2, "int8": 1}[latents.storage]
    vae = 2 * system.vae.config.latent_channels * side * side if latents.vae else 0
    sizes = {"latents": rows * (bytes_each * system.grid**2 * system.channels + _LINE), "vae_latents": rows * vae}
    for name in ("branch", "controlnet"):
        train, parameters = getattr(recipe, name).train, numbers(getattr(system, name), trained=True)
        sizes[f"{name}_checkpoints"] = (train.keep + 1) * _checkpoint(train, parameters)
        sizes[name] = memory.FULL * parameters
    return sizes


def _checkpoint(train: Train, parameters: int) -> int:
    return memory.trained_state(parameters, eight_bit=train.optimizer == "adamw8bit", averaged=train.ema > 0)


def _downloads(system: MetaModels) -> Iterator[dict[str, Any]]:
    """Downloads from the hub, whose published weights are bfloat16."""
    models, diffusion = system.recipe.models, (getattr(system, part) for part in DIFFUSION_PARTS)
    for model, parameters in ((models.mllm, numbers(system.mllm)), (models.diffusion, numbers(*diffusion))):
        if facts := about(model):
            yield {"model": model, "bytes": 2 * parameters, **facts}


# ---- what would make it fit -----------------------------------------------------------------------------------------


def _fitting(system: MetaModels, recipe: Recipe, gpus: int, stage: str, limit: int) -> list[str] | None:
    """A minimal list of settings under which a stage fits; None when none is known."""
    peak = partial(_peak, system, recipe, gpus, stage)
    chosen: list[dict[str, Any]] = []
    if peak(chosen) <= limit:
        return []
    for saving in _savings(recipe, gpus, stage):
        more = [each for each in chosen if each.keys() != saving.keys()] + [saving]
        size = peak(more)
        chosen = more if size < math.inf else chosen
        if size <= limit:
            break
    else:
        return None
    for saving in reversed(chosen):
        fewer = [each for each in chosen if each is not saving]
        chosen = fewer if peak(fewer) <= limit else chosen
    return [f"{key}={json.dumps(value)}" for saving in chosen for key, value in saving.items()]


def _savings(recipe: Recipe, gpus: int, stage: str) -> Iterator[dict[str, Any]]:
    """Settings that save memory, those that cost least time or quality first."""
    if stage == "extract-latents":
        yield from ({"latents.batch_size": size} for size in _halves(recipe.latents.batch_size))
    if stage == "generate":
        yield from ({"generate.offload": offload} for offload in ("model", "sequential"))
    if stage.startswith("train "):
        section = stage.removeprefix("train ")
        yield from _training_savings(section, getattr(recipe, section).train, gpus)
        if section == "branch" and recipe.branch.tune == "full":
            yield {"branch.tune": "lora", "branch.lora_rank": 64}
        if section == "controlnet" and recipe.models.weights == "dtype":
            yield {"models.weights": "nf4"}


def _training_savings(section: str, train: Train, gpus: int) -> Iterator[dict[str, Any]]:
    key, rows = f"{section}.train.", train.batch_size * train.accumulate
    yield {f"{key}gradient_checkpointing": True}
    if gpus > 1:
        yield {f"{key}parallel": "fsdp"}
    for size in _halves(train.batch_size):
        if size >= gpus:
            yield {f"{key}batch_size": size, f"{key}accumulate": rows // size}
    yield {f"{key}ema": 0.0}
    if gpus == 1:
        yield {f"{key}optimizer": "adamw8bit"}


def _halves(size: int) -> Iterator[int]:
    while size > 1:
        size //= 2
        yield size


def _peak(system: MetaModels, recipe: Recipe, gpus: int, stage: str, savings: list[dict[str, Any]]) -> float:
    """Peak memory under changed settings; infinite when they contradict each other."""
    changed = recipe.model_dump()
    for key, value in (pair for saving in savings for pair in saving.items()):
        *path, last = key.split(".")
        section = changed
        for part in path:
            section = section[part]
        section[last] = value
    try:
        other = Recipe.model_validate(changed)
    except ValidationError:
        return math.inf
    return estimate(stage, system.of(other), other, gpus).peak
