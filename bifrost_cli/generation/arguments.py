"""What a caller of the pipeline types: seeds, generators, counts and output types, checked and made plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bifrost_cli.errors import UsageError
from bifrost_cli.generation.requests import ImageRequest, image_requests

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def seed_of(generator: torch.Generator) -> int:
    """The seed that a generator stands for: its own while nothing was drawn from it, else a number drawn from it.

    One number is drawn either way, so that the next call with it gives another image. A fresh generator means the same
    on every device, since images draw their numbers on the CPU.
    """
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    untouched = torch.equal(fresh.get_state(), generator.get_state())
    drawn = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return generator.initial_seed() if untouched else drawn


def seeded(
    prompts: Sequence[str], count: int, seed: int | None, generator: torch.Generator | Sequence[torch.Generator] | None
) -> list[ImageRequest]:
    """`count` images of each prompt; UsageError for a seed and a generator, or the wrong number of generators."""
    if generator is not None and seed is not None:
        raise UsageError("seed and generator both say where an image begins", fix="give one of them")
    if seed is not None and (type(seed) is not int or seed < 0):
        raise UsageError(f"seed={seed!r} is not an integer from 0", fix="seed=0")
    if generator is None or isinstance(generator, torch.Generator):
        return list(image_requests(prompts, count, seed or 0 if generator is None else seed_of(generator)))
    generators, total = list(generator), len(prompts) * count
    if len(generators) != total or not all(isinstance(one, torch.Generator) for one in generators):
        raise UsageError(f"{len(generators)} generators for {total} images", fix="give one torch.Generator an image")
    return [ImageRequest(i, prompts[i // count], seed_of(one)) for i, one in enumerate(generators)]


def image_count(num_images: int | None, per_prompt: int | None) -> int:
    """The images of each prompt, by whichever of the two names."""
    if None not in (num_images, per_prompt) and num_images != per_prompt:
        raise UsageError(f"num_images={num_images} and num_images_per_prompt={per_prompt}", fix="give one of them")
    count = next((value for value in (num_images, per_prompt) if value is not None), 1)
    if type(count) is not int or count < 1:
        raise UsageError(f"num_images={count!r} is not a number of images", fix="num_images=1")
    return count


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
        return images
    if output_type == "latent":
        return torch.stack(images) if images else torch.empty(0)
    pixels_BHWC = np.stack([np.asarray(image) for image in images]).astype(np.float32) / 255 if images else np.empty(0)
    return pixels_BHWC if output_type == "np" else torch.from_numpy(pixels_BHWC).movedim(-1, 1)
