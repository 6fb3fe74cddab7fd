"""How `BifrostPipeline` edits, varies, mixes and finds: the steps behind its methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bifrost_cli.errors import UsageError
from bifrost_cli.generation import arguments, regions
from bifrost_cli.generation.arguments import BifrostPipelineOutput, ImageLike
from bifrost_cli.generation.requests import ImageRequest
from bifrost_cli.generation.step_callback import StepCallback, step_callback
from bifrost_cli.loading.compatibility import require_encoder

if TYPE_CHECKING:
    from bifrost_cli.generation.pipeline import BifrostPipeline


@dataclass(frozen=True)
class How:
    """What of an image is predicted again: a share `strength` of the marked patches (P,); what is returned of it."""

    patches: np.ndarray
    strength: float
    keep_pixels: bool
    output_type: str
    callback: StepCallback | None


def marked(
    pipe: BifrostPipeline, rgb: np.ndarray, mask_image: ImageLike | None, box: Sequence[float] | None,
    region: str | None,
) -> np.ndarray:  # fmt: skip
    """The patches (P,) that a mask, a box or a region marks. UsageError: none of them, or several."""
    height, width = rgb.shape[:2]
    if sum(part is not None for part in (mask_image, box, region)) != 1:
        raise UsageError("what is to change is not marked, or twice", fix="give a mask, or a box, or a region")
    if region is not None:
        mask = regions.mask_of_boxes(pipe.locate(rgb, region), height, width)
    elif box is not None:
        mask = regions.mask_of_boxes([tuple(box)], height, width)
    else:
        assert mask_image is not None
        mask = regions.mask_of_image(arguments.pixels_of(mask_image, pipe.recipe.images), height, width)
    return regions.masked_patches(mask, pipe.encoder.image_size, pipe.encoder.grid)


def predict_again(
    pipe: BifrostPipeline, rgb: np.ndarray, prompt: str, seeds: Sequence[int], how: How, given: dict[str, Any]
) -> BifrostPipelineOutput:
    """Images in which marked patches are predicted again, one for each seed."""
    if not 0 < how.strength <= 1:
        raise UsageError(f"strength={how.strength!r} is not above 0 and at most 1", fix="strength=0.5")
    arguments.refuse(None, how.output_type, ("latents",))
    if how.keep_pixels and how.output_type == "latent":
        raise UsageError("pixels cannot be kept in latents", fix="output_type='pil'")
    settings = arguments.settings_of(pipe.recipe.generate, {"steps": given.pop("num_inference_steps", None), **given})
    with pipe.lock:
        require_encoder(pipe.prior.artifact, pipe.encoder.identity)
        latents_PC, before = pipe.encode(rgb), dict(pipe.seconds)
        images, predicted, masks = [], [], []
        plan = arguments.plan_text(given.get("plan"))
        requests = [ImageRequest(index, prompt, seed, plan) for index, seed in enumerate(seeds)]
        for request in requests:
            masked_P = arguments.part_of(how.patches, how.strength, request.seed)
            options: dict[str, Any] = {"settings": settings, "callback": step_callback(pipe, how.callback, request)}
            made = pipe.predict(request, known=(latents_PC, masked_P), **options)
            image = pipe.image_of(request, made.latents_PC, how.output_type, **options)
            if how.keep_pixels:
                image = regions.keep_pixels(rgb, image, masked_P.numpy(), pipe.encoder.grid)
            images.append(image)
            predicted.append(made)
            masks.append(masked_P)
        return pipe.output(requests, images, predicted, before, how.output_type, masked=torch.stack(masks))


def mix(
    pipe: BifrostPipeline, image: ImageLike, other: ImageLike, weight: float | Sequence[float], prompt: str, seed: int,
    output_type: str, settings: dict[str, Any],
) -> BifrostPipelineOutput:  # fmt: skip
    """Images of interpolated latents, one for each weight."""
    weights = [weight] if isinstance(weight, (int, float)) else list(weight)
    if not weights or not all(0 <= one <= 1 for one in weights):
        raise UsageError(f"weight={weight} is not from 0 to 1", fix="weight=0.5")
    first_PC, other_PC = pipe.encode(image), pipe.encode(other)
    latents = [torch.lerp(first_PC, other_PC, float(one)) for one in weights]
    images = [pipe.decode(one, prompt, seed=seed, output_type=output_type, **settings) for one in latents]
    count = len(images)
    return BifrostPipelineOutput(
        images=images if output_type == "pil" else arguments.joined(images),
        latents=torch.stack(latents),
        plans=[None] * count,
        prompts=[prompt] * count,
        seeds=[seed] * count,
        cut=[False] * count,
    )


def locate(pipe: BifrostPipeline, rgb: np.ndarray, region: str) -> list[tuple[float, float, float, float]]:
    """Boxes (x, y, width, height) in px of what `region` names, as the MLLM answers."""
    mllm, settings = pipe.prior.mllm, pipe.recipe.generate
    usual = regions.BUILTIN_QUESTION if pipe.recipe.models.mllm.startswith("builtin:") else regions.BOX_QUESTION
    question = (settings.region_question or usual).replace("{region}", region)
    with pipe.loader.policy.on(mllm.model):
        answer = mllm.answer(rgb.copy(), question, 128).text
    if not (boxes := regions.region_boxes(answer, *rgb.shape[:2])):
        raise UsageError(
            f"the MLLM does not say where {region} is",
            at=f"its answer: {answer[:200] or 'nothing'}",
            fix="mark it yourself: --box X,Y,WIDTH,HEIGHT or --mask FILE",
        )
    return boxes
