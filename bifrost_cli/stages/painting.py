"""One prompt through the chain in two halves: words to patch latents, and patch latents to a picture; each part timed.

In: a recipe, trained artifacts, a prompt, a seed. Out: a `Sketch`, then pixels. One picture at a time on purpose: sums
of floats differ in the last bit between batch sizes, and the same seed must give the same bytes alone or among others.
The halves never meet, so that only one need be in memory. Knows no folder.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn

from bifrost_cli.artifacts import Artifact
from bifrost_cli.config import Recipe
from bifrost_cli.errors import RecipeError
from bifrost_cli.maths.masking import random_orders, raster_orders
from bifrost_cli.models.branch import VisualBranch
from bifrost_cli.models.controlnet import image_tokens
from bifrost_cli.models.decode import decode
from bifrost_cli.models.mllm import Mllm, Prefix
from bifrost_cli.models.painter import Control, Painter
from bifrost_cli.models.prompt import join_plan
from bifrost_cli.stages.bases import mllm_hash, painter_hash
from bifrost_cli.stages.loading import load_branch, load_controlnet, load_mllm, load_painter
from bifrost_cli.stages.painter import check_settings, require_painter
from bifrost_cli.stages.pair import require_base
from bifrost_cli.stages.placement import Placement
from bifrost_cli.stages.ui import Ui
from bifrost_cli.training.order import derive

STAGES = ("plan", "prompt", "decode", "diffusion", "vae")


@dataclass(frozen=True)
class Sketch:
    """What MLLM and branch made of a prompt: patch latents (P, C) float32 on the CPU, and the plan if there is one.

    `cut` is True when the prompt was longer than they read.
    """

    prompt: str
    plan: str | None
    cut: bool
    latents_PC: torch.Tensor


class Sketcher:
    """MLLM and branch: the half that makes patch latents of words. `seconds` adds up the time of each stage."""

    def __init__(self, mllm: Mllm, branch: VisualBranch, recipe: Recipe, placement: Placement) -> None:
        self.mllm, self.branch, self.recipe, self._placement = mllm, branch, recipe, placement
        self.seconds: Counter[str] = Counter()
        self._read = lru_cache(maxsize=1)(self._read_once)  # several pictures of a prompt follow each other

    @classmethod
    def load(cls, recipe: Recipe, artifact: Artifact, placement: Placement) -> Sketcher:
        """ArtifactError BF-ART-004: the branch was trained on another MLLM than the recipe names."""
        models, kind = recipe.models, {"device": placement.home, "dtype": getattr(torch, recipe.models.dtype)}
        mllm = load_mllm(models.mllm, **kind, revision=models.revision)
        require_base(artifact, "mllm", models.mllm, mllm_hash(models, mllm))
        branch = load_branch(artifact, **kind, mllm=mllm)
        placement.settle(mllm.model, branch, frozen=[mllm.decoder])
        return cls(mllm, branch, recipe, placement)

    @torch.no_grad()
    def sketch(self, prompt: str, seed: int) -> Sketch:
        """Decode order and head noise follow from (prompt, seed) alone."""
        plan, cut, prefix = self._read(prompt)
        settings, branch, noise_BPC = self.recipe.generate, self.branch, None
        if branch.head_kind == "flow":
            shape = (1, branch.patches, branch.channels)
            noise_BPC = torch.randn(shape, generator=generator_of(seed, prompt, "head"))
        with timed(self.seconds, "decode"), self._placement.on(branch):
            latents_BPC = decode(
                branch,
                prefix,
                self._unconditional if settings.guidance != 1.0 else None,
                steps=settings.decode_steps,
                orders_BP=self._orders(prompt, seed),
                guidance=settings.guidance,
                noise_BPC=noise_BPC,
            ).cpu()
        return Sketch(prompt, plan, cut, latents_BPC[0])

    def _orders(self, prompt: str, seed: int) -> torch.Tensor:
        if self.recipe.generate.decode_order == "raster":
            return raster_orders(1, self.branch.patches)
        return random_orders(1, self.branch.patches, generator_of(seed, prompt, "order"))

    def _read_once(self, prompt: str) -> tuple[str | None, bool, Prefix]:
        """Plan (if the recipe says so), whether the text was cut, and its keys and values."""
        settings, plan = self.recipe.generate, None
        with self._placement.on(self.mllm.model):
            if settings.plan:
                with timed(self.seconds, "plan"):
                    plan = self.mllm.write([prompt], settings.plan_instruction, settings.plan_tokens)[0]
            if settings.guidance != 1.0:
                self._unconditional  # noqa: B018 while the MLLM is there
            with timed(self.seconds, "prompt"):
                layout = self.mllm.layout([join_plan(prompt, plan)], self.recipe.branch.max_text_tokens)
                return plan, layout.truncated[0], self.mllm.prefix(layout)

    @cached_property
    def _unconditional(self) -> Prefix:
        return self.mllm.prefix(self.mllm.layout([""], self.recipe.branch.max_text_tokens))


class Renderer:
    """Painter and ControlNet: the half that makes a picture of patch latents. `seconds` as the sketcher's."""

    def __init__(self, painter: Painter, controlnet: nn.Module, recipe: Recipe, placement: Placement) -> None:
        self.painter, self.controlnet, self.recipe, self._placement = painter, controlnet, recipe, placement
        self.seconds: Counter[str] = Counter()
        self._text = lru_cache(maxsize=1)(self._embed)

    @classmethod
    def load(cls, recipe: Recipe, artifact: Artifact, placement: Placement, ui: Ui | None = None) -> Renderer:
        """ArtifactError BF-ART-004: the ControlNet was trained on another painter than the recipe names."""
        models, kind = recipe.models, {"device": placement.home, "dtype": getattr(torch, recipe.models.dtype)}
        painter = load_painter(models.painter, **kind, revision=models.revision)
        check_settings(recipe, painter, ui or Ui())
        require_painter(artifact, models.painter, painter, painter_hash(models, painter))
        controlnet = load_controlnet(artifact, **kind)
        placement.settle(*painter.frozen_modules(), controlnet, frozen=painter.frozen_modules(but=("vae",)))
        return cls(painter, controlnet, recipe, placement)

    @torch.no_grad()
    def paint(self, prompt: str, latents_PC: torch.Tensor, seed: int) -> np.ndarray:
        """The picture, uint8 (H, W, 3); its noise follows from (prompt, seed) alone."""
        text, painter, device = self._text(prompt), self.painter, self._placement.device
        with timed(self.seconds, "diffusion"), self._placement.on(painter.transformer, self.controlnet):
            generator, latents_BPC = generator_of(seed, prompt, "diffusion"), latents_PC[None].to(device)
            text = send_to_device(text, device)
            vae_Bchw = diffuse(painter, self.controlnet, latents_BPC, text, generator, self.recipe)
        with timed(self.seconds, "vae"), self._placement.on(painter.vae):
            return painter.decode(vae_Bchw)[0].numpy()

    def cuts(self, prompt: str) -> bool:
        """True when the prompt is longer than the painter reads."""
        return self.painter.too_long(prompt, self.recipe.generate.painter_tokens)

    def _embed(self, prompt: str) -> Any:
        settings, painter = self.recipe.generate, self.painter
        encoders = painter.frozen_modules(but=("transformer", "vae"))
        with timed(self.seconds, "prompt"), self._placement.on(*encoders):
            return painter.embed([prompt], settings.painter_tokens, settings.painter_guidance)


@contextmanager
def timed(seconds: Counter[str], stage: str) -> Iterator[None]:
    """Add the time spent inside, the device's work included."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[stage] += time.perf_counter() - start


def diffuse(
    painter: Painter,
    controlnet: nn.Module,
    latents_BPC: torch.Tensor,
    text: Any,
    generator: torch.Generator,
    recipe: Recipe,
) -> torch.Tensor:
    """Patch latents (1, P, C) -> VAE latents (1, c, h, w) of the recipe's paint size.

    RecipeError BF-RECIPE-005 when that size has not the image tokens that the ControlNet is for.
    """
    settings, size = recipe.generate, recipe.latents.paint_size
    noise_Bchw = painter.noise(size, generator)
    tokens, wanted = noise_Bchw.shape[-1] * noise_Bchw.shape[-2] // 4, image_tokens(controlnet, latents_BPC.shape[1])
    if wanted not in (None, tokens):
        side = 2 * math.isqrt(wanted) * painter.factor
        raise RecipeError(
            f"latents.paint_size {size} makes {tokens} image tokens; the ControlNet gives {wanted}",
            fix=f"--set latents.paint_size={side}",
            code="BF-RECIPE-005",
        )
    control = Control(controlnet, latents_BPC, settings.control_scale)
    return painter.denoise(noise_Bchw, text, control=control, steps=settings.steps, guidance=settings.painter_guidance)


def generator_of(seed: int, prompt: str, purpose: str) -> torch.Generator:
    """Random numbers of one picture for one purpose, on the CPU: the same on every device and beside any others."""
    return torch.Generator().manual_seed(derive(seed, prompt, purpose))


def timing_line(seconds: Counter[str]) -> str:
    """`plan 0.4 s, prompt 0.1 s, ...` for the stages that ran."""
    return ", ".join(f"{stage} {seconds[stage]:.2f} s" for stage in STAGES if stage in seconds)
