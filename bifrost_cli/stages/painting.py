"""One prompt through the whole chain: plan, prompt, decode, diffusion, VAE; each part timed.

In: loaded models, settings, a prompt, a seed. Out: a `Painting`. One picture at a time on purpose: sums of floats
differ in the last bit between batch sizes, and the same seed must give the same bytes alone or among others. Knows no
folder.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from bifrost_cli.config import Recipe
from bifrost_cli.errors import RecipeError
from bifrost_cli.maths.masking import random_orders
from bifrost_cli.models.branch import VisualBranch
from bifrost_cli.models.decode import decode
from bifrost_cli.models.mllm import Mllm, Prefix
from bifrost_cli.models.painter import Control, Painter
from bifrost_cli.models.prompt import join_plan
from bifrost_cli.stages.loading import load_branch, load_controlnet, load_mllm, load_painter
from bifrost_cli.stages.painter import check_settings, require_painter
from bifrost_cli.stages.pair import Pair, require_base
from bifrost_cli.stages.place import pick_device
from bifrost_cli.stages.ui import Ui
from bifrost_cli.training.order import derive

STAGES = ("plan", "prompt", "decode", "diffusion", "vae")


@dataclass(frozen=True)
class Reading:
    """What the models made of a prompt. `cut` is True when it was longer than one of them reads."""

    prompt: str
    plan: str | None
    prefix: Prefix
    text: Any
    cut: bool


@dataclass(frozen=True)
class Painting:
    """A picture, uint8 (H, W, 3), and the patch latents (P, C) float32 it was painted from."""

    pixels_HWC: np.ndarray
    latents_PC: torch.Tensor


@dataclass
class Bridge:
    """The loaded chain. `seconds` adds up the time of each stage."""

    mllm: Mllm
    branch: VisualBranch
    painter: Painter
    controlnet: nn.Module
    recipe: Recipe
    seconds: Counter[str] = field(default_factory=Counter)

    @classmethod
    def load(cls, recipe: Recipe, pair: Pair, device: str, ui: Ui | None = None) -> Bridge:
        """Load all parts. ArtifactError BF-ART-004: trained on other bases than the recipe names."""
        place, models = pick_device(device), recipe.models
        kind = {"device": place, "dtype": getattr(torch, models.dtype)}
        mllm = load_mllm(models.mllm, **kind, revision=models.revision)
        require_base(pair.branch, "mllm", models.mllm, mllm.weights_hash())
        painter = load_painter(models.painter, **kind, revision=models.revision)
        check_settings(recipe, painter, ui or Ui())
        require_painter(pair.controlnet, models.painter, painter)
        branch = load_branch(pair.branch, **kind, mllm=mllm)
        return cls(mllm, branch, painter, load_controlnet(pair.controlnet, **kind), recipe)

    @torch.no_grad()
    def read(self, prompt: str) -> Reading:
        """Plan (if the recipe says so), then the prompt's keys and values, and what the painter reads of it."""
        settings = self.recipe.generate
        plan = None
        if settings.plan:
            with self._timed("plan"):
                plan = self.mllm.write([prompt], settings.plan_instruction, settings.plan_tokens)[0]
        with self._timed("prompt"):
            layout = self.mllm.layout([join_plan(prompt, plan)], self.recipe.branch.max_text_tokens)
            text = self.painter.embed([prompt], settings.painter_tokens, settings.painter_guidance)
            cut = layout.truncated[0] or self.painter.too_long(prompt, settings.painter_tokens)
            return Reading(prompt, plan, self.mllm.prefix(layout), text, cut)

    @torch.no_grad()
    def paint(self, reading: Reading, seed: int) -> Painting:
        """The picture of (prompt, seed): decode order, head noise and diffusion noise follow from the two alone."""
        with self._timed("decode"):
            latents_BPC = self.decode(reading, seed)
        with self._timed("diffusion"):
            generator = generator_of(seed, reading.prompt, "diffusion")
            vae_Bchw = diffuse(self.painter, self.controlnet, latents_BPC, reading.text, generator, self.recipe)
        with self._timed("vae"):
            pixels_HWC = self.painter.decode(vae_Bchw)[0].numpy()
        return Painting(pixels_HWC, latents_BPC[0].cpu())

    def decode(self, reading: Reading, seed: int) -> torch.Tensor:
        """Predicted patch latents (1, P, C)."""
        settings, branch = self.recipe.generate, self.branch
        noise_BPC = None
        if branch.head_kind == "flow":
            shape = (1, branch.patches, branch.channels)
            noise_BPC = torch.randn(shape, generator=generator_of(seed, reading.prompt, "head"))
        return decode(
            branch,
            reading.prefix,
            self._unconditional if settings.guidance != 1.0 else None,
            steps=settings.decode_steps,
            orders_BP=random_orders(1, branch.patches, generator_of(seed, reading.prompt, "order")),
            guidance=settings.guidance,
            noise_BPC=noise_BPC,
        )

    @cached_property
    def _unconditional(self) -> Prefix:
        return self.mllm.prefix(self.mllm.layout([""], self.recipe.branch.max_text_tokens))

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.mllm.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[stage] += time.perf_counter() - start


def diffuse(
    painter: Painter,
    controlnet: nn.Module,
    latents_BPC: torch.Tensor,
    text: Any,
    generator: torch.Generator,
    recipe: Recipe,
) -> torch.Tensor:
    """Patch latents (1, P, C) -> VAE latents (1, c, h, w) of the recipe's paint size.

    RecipeError BF-RECIPE-005 when that size has not four image tokens for each patch.
    """
    settings, size = recipe.generate, recipe.latents.paint_size
    noise_Bchw = painter.noise(size, generator)
    tokens, patches = noise_Bchw.shape[-1] * noise_Bchw.shape[-2] // 4, latents_BPC.shape[1]
    if tokens != 4 * patches:
        side = 4 * math.isqrt(patches) * painter.factor
        raise RecipeError(
            f"latents.paint_size {size} makes {tokens} image tokens; the ControlNet gives {4 * patches}",
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
