"""The pipeline as the server uses it: what can be refused is refused before the queue, the rest is done behind it.

Legend: P patches and C channels of the patch latents, H W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from bifrost_cli.artifacts import Artifact
from bifrost_cli.config.schema import Generate, Images
from bifrost_cli.data.images import FORMATS, read_image, square
from bifrost_cli.data.png import image_bytes
from bifrost_cli.data.xmp import EDITED, GENERATED
from bifrost_cli.generation import arguments, regions
from bifrost_cli.generation.pipeline import BifrostPipeline
from bifrost_cli.generation.requests import ImageRequest, image_settings, png_facts, read_prompts
from bifrost_cli.loading.compatibility import require_one_step
from bifrost_cli.loading.loaders import decisive_files
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.serve.answers import Limits
from bifrost_cli.serve.bodies import EditBody, ImageBody
from bifrost_cli.serve.jobs import Report


@dataclass(frozen=True)
class Made:
    """An image: its PNG, with everything that made it in its text chunks, its seed, and the MLLM's plan if it wrote
    one; `masked`: of an edit, True for each patch that was predicted again."""

    png: bytes
    seed: int
    size: str
    plan: str | None = None
    masked: list[bool] = field(default_factory=list)


class Engine:
    """One loaded pipeline.

    Args:
        pipe: with prior and decoder.
        name: of the model, as requests may say it.
        limits: of what a request may ask for.

    Attributes:
        grid: rows and columns of patches.
    """

    def __init__(self, pipe: BifrostPipeline, name: str, limits: Limits) -> None:
        assert pipe.branch is not None and pipe.controlnet is not None
        self.pipe, self.name, self.limits = pipe, name, limits
        _ = pipe.prior, pipe.decoder  # all is loaded now, and the encoder shares it
        self.grid, self.image_size = pipe.encoder.grid, pipe.encoder.image_size
        self.parents: list[Artifact] = [pipe.branch]
        self.parents += [pipe.controlnet] * (pipe.controlnet.id != pipe.branch.id)

    def describe(self) -> dict[str, Any]:
        """What a page has to know: sizes, what stands where nothing is asked for, and the limits."""
        recipe = self.pipe.recipe
        return {
            "grid": list(self.grid),
            "size": f"{recipe.images.output_size}x{recipe.images.output_size}",
            "artifacts": {parent.kind: parent.id for parent in self.parents},
            "defaults": {
                "plan": recipe.generate.plan,
                "num_inference_steps": recipe.generate.steps,
                "decode_steps": recipe.generate.decode_steps,
            },
            "limits": {"n": self.limits.images, "steps": self.limits.steps, "prompt": self.limits.prompt_chars},
        }

    def check(self, body: ImageBody) -> None:
        """UsageError for a prompt, a size or a setting that the pipeline would refuse."""
        read_prompts([body.prompt], Ui())
        arguments.plan_text(body.plan)
        assert self.pipe.branch is not None
        require_one_step(self.pipe.branch, self._settings(body).decode_steps)
        if body.side is not None:
            arguments.require_side(body.side, self.pipe.decoder, self.pipe.prior.branch.patches)

    def write_plan(self, prompt: str, report: Report) -> Iterator[str]:
        """The plan that the MLLM writes for a prompt."""
        report({"stage": "plan"})
        with self.pipe.lock:
            yield self.pipe.prior.write_plan(prompt)

    def read_images(self, image: bytes, mask: bytes | None) -> tuple[np.ndarray, np.ndarray | None]:
        """The square of an uploaded image that the pipeline reads, and of its mask: uint8 (S, S, 3), white where the
        image is to change. UsageError: the mask has another size; BadImage: one of them is none that can be read."""
        rules = self.pipe.recipe.images
        rules = rules.model_copy(update={"max_pixels": min(rules.max_pixels, self.limits.pixels)})
        rgb = read_image(image, rules).rgb
        if mask is None:
            return square(rgb, self.image_size), None
        white = regions.mask_of_image(_mask_pixels(mask, rules), *rgb.shape[:2])
        marked = np.repeat(white[..., None].astype(np.uint8) * 255, 3, axis=-1)
        regions.masked_patches(white, self.image_size, self.grid)  # which refuses an empty one, and a full one
        return square(rgb, self.image_size), square(marked, self.image_size)

    def edit(
        self, body: EditBody, rgb: np.ndarray, mask: np.ndarray | None, digest: str, report: Report
    ) -> Iterator[Made]:
        """An edited image for each seed; `digest` is the SHA-256 of the file that was uploaded."""
        where: dict[str, Any] = {"mask_image": mask} if mask is not None else {"region": body.region}
        for index, seed in enumerate(body.seeds()):
            out = self.pipe.edit(
                rgb,
                body.prompt,
                seed=seed,
                strength=body.strength,
                keep_pixels=body.keep_pixels,
                plan=body.plan,
                **where,
                **body.settings,
                callback_on_step_end=self._watch(index, body, report),
            )
            assert out.masked is not None  # of an edit
            masked = out.masked[0].tolist()
            how = {"edit_of": digest, "masked": "".join("01"[one] for one in masked), "keep_pixels": body.keep_pixels}
            yield replace(self._made(body, seed, out, **how), masked=masked)

    def generate(self, body: ImageBody, report: Report) -> Iterator[Made]:
        """The images of a request, one after the other; a report after each step."""
        for index, seed in enumerate(body.seeds()):
            out = self.pipe(
                body.prompt,
                seed=seed,
                plan=body.plan,
                height=body.side,
                **body.settings,
                callback_on_step_end=self._watch(index, body, report),
            )
            yield self._made(body, seed, out)

    def _settings(self, body: ImageBody) -> Generate:
        named = {**body.settings, "plan": body.plan}
        named["steps"] = named.pop("num_inference_steps", None)
        return arguments.settings_of(self.pipe.recipe.generate, named)

    def _made(self, body: ImageBody, seed: int, out: arguments.BifrostPipelineOutput, **how: Any) -> Made:
        images = self.pipe.recipe.images
        images = images.model_copy(update={"output_size": body.side or images.output_size})
        recipe = self.pipe.recipe.model_copy(update={"generate": self._settings(body), "images": images})
        settings = image_settings(recipe, max_text_tokens=recipe.branch.max_text_tokens, **self._files)
        request, plan = ImageRequest(0, body.prompt, seed), out.plans[0]
        image = out.images[0]
        facts = png_facts(request, {**settings, **how}, self.parents, plan)
        png = image_bytes(np.asarray(image), facts, source_type=EDITED if how else GENERATED)
        return Made(png, seed, f"{image.width}x{image.height}", plan)

    @cached_property
    def _files(self) -> dict[str, str]:
        models = self.pipe.recipe.models
        return {**decisive_files("mllm", models), **decisive_files("diffusion", models)}

    @cached_property
    def _colours_C3(self) -> torch.Tensor:
        """A fixed direction of the latents for each of red, green and blue."""
        channels = self.pipe.prior.branch.channels
        return torch.randn((channels, 3), generator=torch.Generator().manual_seed(0)) / channels**0.5

    def _watch(self, index: int, body: ImageBody, report: Report) -> Any:
        settings = self._settings(body)
        steps = {"decode": settings.decode_steps, "diffusion": settings.steps}

        def on_step(pipe: BifrostPipeline, step: int, timestep: Any, facts: dict[str, Any]) -> None:
            stage = facts["stage"]
            told: dict[str, Any] = {"stage": stage, "image": index, "step": step + 1, "steps": steps[stage]}
            if stage == "decode":
                told["patches"] = self._patches(facts["latents"][0].cpu(), ~facts["masked"][0].cpu())
            report(told)

        return on_step

    def _patches(self, latents_PC: torch.Tensor, known_P: torch.Tensor) -> list[str | None]:
        """A colour for each patch that is known, as `#rrggbb`: alike where latents are; None where it is masked."""
        scaled_PC = self.pipe.prior.branch.to_decoder(latents_PC).float()
        rgb_P3 = (torch.sigmoid(1.5 * scaled_PC @ self._colours_C3) * 255).round().int()
        return [
            "#{:02x}{:02x}{:02x}".format(*rgb) if known else None
            for rgb, known in zip(rgb_P3.tolist(), known_P.tolist(), strict=True)
        ]


def _mask_pixels(mask: bytes, rules: Images) -> np.ndarray:
    """A mask, uint8 (H, W, 3), white where the image is to change: where it is transparent, as OpenAI's clients mark
    it, or white where nothing of it is."""
    rgb = read_image(mask, rules).rgb  # which refuses what is no image
    with Image.open(io.BytesIO(mask), formats=FORMATS) as image:
        if image.has_transparency_data:
            alpha = np.asarray(ImageOps.exif_transpose(image.convert("RGBA")).getchannel("A"))
            if alpha.min() < 255:
                return np.repeat(255 - alpha[..., None], 3, axis=-1)
    return rgb
