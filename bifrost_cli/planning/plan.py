"""`bifrost plan`: what a recipe needs, before anything is fetched, loaded or computed.

Parameters, memory by stage and the settings that would make it fit, disk, steps, operations, hours, and downloads with
their licences, as plain values. Only configurations are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from pydantic import ValidationError

from bifrost_cli.config.schema import Recipe
from bifrost_cli.planning.meta_models import MetaModels, build, numbers
from bifrost_cli.planning.model_configs import DIFFUSION_PARTS, about
from bifrost_cli.planning.stages import DEVICES, FULL, STAGES, trained_state

UTILISATION = 0.4  # of the device's peak; what well-fed trainings of this size reach
_LINE = 400  # bytes of a row in a store's index


def plan(
    recipe: Recipe, *, gpus: int = 1, gpu: str = "h100", memory_limit: int | None = None, images: int = 1_000_000
) -> dict[str, Any]:
    """Everything that a recipe needs, as JSON values; sizes in bytes.

    Args:
        gpu: a key of `stages.DEVICES`.
        memory_limit: bytes of one device; each stage then says whether it fits, and which settings would make it fit.
        images: images of the latents store.

    Raises:
        RecipeError: a model or a setting that cannot be planned.
    """
    system = build(recipe)
    times_of = {"extract-latents": images * (1 + recipe.latents.flip), "train branch": recipe.branch.train.steps,
                "train controlnet": recipe.controlnet.train.steps, "generate": 1}  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    for name, (memory, operations) in STAGES.items():
        need, each, times = memory(system, gpus), operations(system), times_of[name]
        hours = each * times / (DEVICES[gpu] * UTILISATION * gpus) / 3600
        flops = {"flops_each": each, "flops": each * times}
        found[name] = {"memory": asdict(need), "times": times, **flops, "hours": hours}
        if memory_limit is not None:
            found[name]["fits"] = need.peak <= memory_limit
            found[name]["fits_with"] = _fitting(system, gpus, name, memory_limit)
    return {
        "recipe": recipe.name,
        "device": {"gpu": gpu, "gpus": gpus, "peak": DEVICES[gpu], "utilisation": UTILISATION,
                   "memory": memory_limit},
        "images": images,
        "parts": _parts(system),
        "stages": found,
        "disk": _disk(system, images),
        "downloads": list(_downloads(system)),
    }  # fmt: skip


def _parts(system: MetaModels) -> list[dict[str, Any]]:
    branch, controlnet, models = system.branch, system.controlnet, system.recipe.models
    inside = numbers(system.encoder) if system.own_encoder else 0
    new = branch.mask_token.numel() + branch.position_embedding.numel()
    head = numbers(branch.vision_head, branch.input_projection)
    embedder = numbers(controlnet.controlnet_x_embedder)
    blocks = numbers(controlnet) - embedder
    rows = [
        ("MLLM decoder and vocabulary", models.mllm, numbers(system.mllm) - inside, 0),
        ("visual encoder", models.mllm if inside else system.recipe.latents.encoder, numbers(system.encoder), 0),
        *((f"FLUX {name}", models.diffusion, numbers(getattr(system, name)), 0) for name in DIFFUSION_PARTS),
        ("branch decoder", None, numbers(branch) - new - head, numbers(branch.decoder, trained=True)),
        ("branch head", None, head, head),
        ("branch mask token and positions", None, new, new),
        ("ControlNet blocks", None, blocks, blocks),
        ("ControlNet embedder", None, embedder, embedder),
    ]
    return [dict(zip(("name", "model", "parameters", "trained"), row, strict=True)) for row in rows]


def _disk(system: MetaModels, images: int) -> dict[str, int]:
    latents, side = system.recipe.latents, system.recipe.images.output_size // system.factor
    rows, bytes_each = images * (1 + latents.flip), {"float16": 2, "int8": 1}[latents.storage]
    vae = 2 * system.vae.config.latent_channels * side * side if latents.vae else 0
    sizes = {"latents": rows * (bytes_each * system.grid**2 * system.channels + _LINE), "vae_latents": rows * vae}
    for name in ("branch", "controlnet"):
        train, parameters = getattr(system.recipe, name).train, numbers(getattr(system, name), trained=True)
        sizes[f"{name}_checkpoints"] = (train.keep + 1) * trained_state(parameters, train)
        sizes[name] = FULL * parameters
    return sizes


def _downloads(system: MetaModels) -> Iterator[dict[str, Any]]:
    """Downloads from the hub, whose published weights are bfloat16."""
    models, diffusion = system.recipe.models, (getattr(system, part) for part in DIFFUSION_PARTS)
    for model, parameters in ((models.mllm, numbers(system.mllm)), (models.diffusion, numbers(*diffusion))):
        if facts := about(model):
            yield {"model": model, "bytes": 2 * parameters, **facts}


def _fitting(system: MetaModels, gpus: int, stage: str, limit: int) -> list[str] | None:
    """A minimal list of settings under which a stage fits; None when none is known."""
    peak = partial(_peak, system, gpus, stage)
    chosen: list[dict[str, Any]] = []
    if peak(chosen) <= limit:
        return []
    for saving in _savings(system.recipe, gpus, stage):
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
    elif stage == "generate":
        yield from ({"generate.offload": offload} for offload in ("model", "sequential"))
    else:
        section = stage.removeprefix("train ")
        train, key = getattr(recipe, section).train, f"{section}.train"
        yield {f"{key}.gradient_checkpointing": True}
        if gpus > 1:
            yield {f"{key}.parallel": "fsdp"}
        for size in _halves(train.batch_size):
            if size >= gpus:
                yield {f"{key}.batch_size": size, f"{key}.accumulate": train.batch_size * train.accumulate // size}
        yield {f"{key}.ema": 0.0}
        if gpus == 1:
            yield {f"{key}.optimizer": "adamw8bit"}
        if section == "branch" and recipe.branch.tune == "full":
            yield {"branch.tune": "lora", "branch.lora_rank": 64}
        if section == "controlnet" and recipe.models.weights == "dtype":
            yield {"models.weights": "nf4"}


def _halves(size: int) -> list[int]:
    return [size >> times for times in range(1, size.bit_length())]


def _peak(system: MetaModels, gpus: int, stage: str, savings: list[dict[str, Any]]) -> float:
    """Peak memory under changed settings; infinite when they contradict each other."""
    changed = system.recipe.model_dump()
    for key, value in (pair for saving in savings for pair in saving.items()):
        *path, last = key.split(".")
        section = changed
        for part in path:
            section = section[part]
        section[last] = value
    try:
        return STAGES[stage][0](system.of(Recipe.model_validate(changed)), gpus).peak
    except ValidationError:
        return math.inf
