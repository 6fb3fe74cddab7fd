"""What a caller of the pipeline types and gets: arguments, checked and made plain values, and the output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError

from bifrost_cli.config.schema import Generate, Images
from bifrost_cli.data.images import read_image
from bifrost_cli.errors import UsageError
from bifrost_cli.generation.requests import ImageRequest, image_requests
from bifrost_cli.generation.stages import BifrostDecoder
from bifrost_cli.models.diffusion.controlnet import image_tokens

ImageLike = Image.Image | np.ndarray | Path | str
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class BifrostPipelineOutput:
    """What a call returns; entry i of every list belongs to image i.

    Attributes:
        images: by `output_type`: `pil` a list of PIL images; `np` float32 (B, H, W, 3) in [0, 1]; `pt` the same as a
            tensor (B, 3, H, W); `latent` VAE latents (B, c, h, w), which the diffusion model's VAE decodes.
        latents: patch latents (B, P, C) of the prior, float32 on the CPU; `pipe.decode` takes them.
        plans: what the MLLM wrote first, None without `generate.plan`.
        prompts: the prompt of each image.
        seeds: the seed of each image; `seed=` with one of them gives that image again.
        cut: images whose prompt or plan was longer than the models read or write.
        timings: seconds of each stage, over all images.
        interrupted: True when `pipe.interrupt` ended the call; only whole images are returned.
        masked: of an edit or a variation (B, P) bool, True where patches were predicted again; else None.
    """

    images: Any
    latents: torch.Tensor
    plans: list[str | None]
    prompts: list[str]
    seeds: list[int]
    cut: list[bool]
    timings: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False
    masked: torch.Tensor | None = None


def seed_of(generator: torch.Generator) -> int:
    """The seed that a generator stands for: its own while nothing was drawn from it, else a number drawn from it. One
    is drawn either way, so that the next call gives another image; a fresh one means the same on every device."""
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    untouched = torch.equal(fresh.get_state(), generator.get_state())
    drawn = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return generator.initial_seed() if untouched else drawn


def pixels_of(image: ImageLike, rules: Images) -> np.ndarray:
    """A PIL image, an array or a file as uint8 (H, W, 3). UsageError: an array of another kind."""
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    rgb = image if isinstance(image, np.ndarray) else read_image(Path(image), rules).rgb
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[-1] != 3:
        raise UsageError(f"an image is uint8 (H, W, 3), not {rgb.dtype} {rgb.shape}", fix="give a PIL image")
    return rgb


def requests_of(
    prompts: Sequence[str], num_images: int | None, per_prompt: int | None, seed: int | None,
    generator: torch.Generator | Sequence[torch.Generator] | None, plan: bool | str | None = None,
) -> list[ImageRequest]:  # fmt: skip
    """The images of each prompt, their number by whichever of the two names; UsageError for what contradicts."""
    if None not in (num_images, per_prompt) and num_images != per_prompt:
        raise UsageError(f"num_images={num_images} and num_images_per_prompt={per_prompt}", fix="give one of them")
    count = next((value for value in (num_images, per_prompt) if value is not None), 1)
    if type(count) is not int or count < 1:
        raise UsageError(f"num_images={count!r} is not a number of images", fix="num_images=1")
    if generator is not None and seed is not None:
        raise UsageError("seed and generator both say where an image begins", fix="give one of them")
    if seed is not None and (type(seed) is not int or seed < 0):
        raise UsageError(f"seed={seed!r} is not an integer from 0", fix="seed=0")
    if generator is None or isinstance(generator, torch.Generator):
        first, text = seed or 0 if generator is None else seed_of(generator), plan_text(plan)
        return [replace(request, plan=text) for request in image_requests(prompts, count, first)]
    generators, total = list(generator), len(prompts) * count
    if len(generators) != total or not all(isinstance(one, torch.Generator) for one in generators):
        raise UsageError(f"{len(generators)} generators for {total} images", fix="give one torch.Generator an image")
    return [ImageRequest(i, prompts[i // count], seed_of(one), plan_text(plan)) for i, one in enumerate(generators)]


def plan_text(plan: bool | str | None) -> str | None:
    """The plan that was given as a text. UsageError: an empty one."""
    if isinstance(plan, str) and not plan.strip():
        raise UsageError("the plan is empty", fix="plan=True lets the MLLM write one")
    return plan if isinstance(plan, str) else None


def refuse(negative_prompt: Any, output_type: str, tensor_inputs: Sequence[str]) -> None:
    """UsageError for what diffusers knows and this pipeline does not."""
    if negative_prompt is not None:
        raise UsageError("negative_prompt is not supported", at="the branch is guided against the empty prompt it was "
                         "trained with, and the diffusion model reads guidance_scale",
                         fix="branch_guidance=2 gives the prompt more weight")  # fmt: skip
    if output_type not in OUTPUT_TYPES:
        raise UsageError(f"output_type={output_type!r}", fix=f"one of {', '.join(OUTPUT_TYPES)}")
    if unknown := [name for name in tensor_inputs if name != "latents"]:
        raise UsageError(f"callback_on_step_end_tensor_inputs names {unknown[0]}", fix='["latents"] is all there is')


def stacked(images: list[Any], output_type: str) -> Any:
    """Images as `output_type` says: see `BifrostPipelineOutput`."""
    if output_type == "pil":
        return [Image.fromarray(image) for image in images]
    if output_type == "latent":
        return torch.stack(images) if images else torch.empty(0)
    pixels_BHWC = np.stack(images).astype(np.float32) / 255 if images else np.empty((0, 0, 0, 3), np.float32)
    return pixels_BHWC if output_type == "np" else torch.from_numpy(pixels_BHWC).movedim(-1, 1)


def joined(images: Sequence[Any]) -> Any:
    """Batches of one image, `np`, `pt` or `latent`, as one batch."""
    return np.concatenate(images) if isinstance(images[0], np.ndarray) else torch.cat(list(images))


def part_of(patches: np.ndarray, strength: float, seed: int) -> torch.Tensor:
    """A share of the marked patches, at least one, at random by the seed: masked_P bool."""
    marked = np.flatnonzero(patches)
    count = max(1, round(strength * len(marked)))
    chosen = marked if count == len(marked) else np.random.default_rng((seed, len(patches))).permutation(marked)[:count]
    masked_P = torch.zeros(len(patches), dtype=torch.bool)
    masked_P[torch.from_numpy(chosen)] = True
    return masked_P


def settings_of(recipe: Generate, given: dict[str, Any]) -> Generate:
    """The recipe's section with what is not None, a plan's text as `plan: true`; UsageError for a value that it does
    not take."""
    changes = {key: value for key, value in given.items() if value is not None}
    changes |= {"plan": True} if isinstance(given.get("plan"), str) else {}
    try:
        return Generate.model_validate({**recipe.model_dump(), **changes})
    except ValidationError as error:
        problem = error.errors()[0]
        name = {"steps": "num_inference_steps"}.get(str(problem["loc"][0]), problem["loc"][0])
        raise UsageError(f"{name}={problem['input']!r}: {problem['msg']}", fix=f"give another {name}") from error


def side_of(height: int | None, width: int | None) -> int | None:
    """Pixels a side; UsageError unless it is a square of whole pixels."""
    side = height if height is not None else width
    if width not in (None, side):
        raise UsageError(f"height={height} and width={width}: images are square", fix="give one of them")
    if side is not None and (type(side) is not int or side < 1):
        raise UsageError(f"height={side!r} is not a number of pixels", fix="leave it out, or give an integer")
    return side


def require_side(side: int, decoder: BifrostDecoder, patches: int) -> None:
    """UsageError unless the decoder makes images of `side` pixels from so many patches."""
    unit, tokens = 2 * decoder.diffusion.factor, image_tokens(decoder.controlnet, patches)
    right = max(unit, side // unit * unit) if tokens is None else unit * math.isqrt(tokens)
    if side != right:
        raise UsageError(f"height={side} does not fit: this ControlNet is for {right} pixels",
                         fix=f"height={right}, or leave it out")  # fmt: skip


def texts_and_seeds(requests: Sequence[ImageRequest]) -> tuple[list[str], list[int]]:
    """Prompts and seeds of requests, apart."""
    return [request.prompt for request in requests], [request.seed for request in requests]
