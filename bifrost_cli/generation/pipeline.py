"""One prompt through the chain in two halves: words to patch latents, and patch latents to an image; each part timed.

In: a recipe, trained artifacts, a prompt, a seed. Out: a `PredictedLatents`, then pixels. One image at a time on purpose: sums
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
from bifrost_cli.config.schema import Recipe
from bifrost_cli.errors import RecipeError
from bifrost_cli.loading.compatibility import require_base
from bifrost_cli.loading.diffusion_families import check_settings, require_diffusion
from bifrost_cli.loading.fingerprints import diffusion_fingerprint, mllm_fingerprint
from bifrost_cli.loading.loaders import load_branch, load_controlnet, load_diffusion, load_mllm
from bifrost_cli.loading.offload import OffloadPolicy
from bifrost_cli.models.branch.masking import random_orders, raster_orders
from bifrost_cli.models.branch.sampling import sample_masked
from bifrost_cli.models.branch.visual_branch import VisualBranch
from bifrost_cli.models.diffusion.base import ControlInput, DiffusionModel
from bifrost_cli.models.diffusion.controlnet import image_tokens
from bifrost_cli.models.mllm.chat_template import join_plan
from bifrost_cli.models.mllm.frozen_mllm import Mllm, PromptCache
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.training.data_order import derive

STAGES = ("plan", "prompt", "decode", "diffusion", "vae")


@dataclass(frozen=True)
class PredictedLatents:
    """What MLLM and branch made of a prompt: patch latents (P, C) float32 on the CPU, and the plan if there is one.

    `cut` is True when the prompt was longer than they read.
    """

    prompt: str
    plan: str | None
    cut: bool
    latents_PC: torch.Tensor


class Prior:
    """MLLM and branch: the half that makes patch latents of words. `seconds` adds up the time of each stage."""

    def __init__(self, mllm: Mllm, branch: VisualBranch, recipe: Recipe, offload_policy: OffloadPolicy) -> None:
        self.mllm, self.branch, self.recipe, self._offload_policy = mllm, branch, recipe, offload_policy
        self.seconds: Counter[str] = Counter()
        self._read = lru_cache(maxsize=1)(self._read_once)  # several images of a prompt follow each other

    @classmethod
    def load(cls, recipe: Recipe, artifact: Artifact, offload_policy: OffloadPolicy) -> Prior:
        """ArtifactError BF-ART-004: the branch was trained on another MLLM than the recipe names."""
        models, kind = recipe.models, {"device": offload_policy.home, "dtype": getattr(torch, recipe.models.dtype)}
        mllm = load_mllm(models.mllm, **kind, revision=models.mllm_revision)
        require_base(artifact, "mllm", models.mllm, mllm_fingerprint(models, mllm))
        branch = load_branch(artifact, **kind, mllm=mllm)
        offload_policy.settle(mllm.model, branch, frozen=[mllm.decoder])
        return cls(mllm, branch, recipe, offload_policy)

    @torch.no_grad()
    def predict(self, prompt: str, seed: int) -> PredictedLatents:
        """Decode order and head noise follow from (prompt, seed) alone."""
        plan, cut, prefix = self._read(prompt)
        settings, branch, noise_BPC = self.recipe.generate, self.branch, None
        if branch.head_kind == "flow":
            shape = (1, branch.patches, branch.channels)
            noise_BPC = torch.randn(shape, generator=generator_of(seed, prompt, "head"))
        with timed(self.seconds, "decode"), self._offload_policy.on(branch):
            latents_BPC = sample_masked(
                branch,
                prefix,
                self._unconditional if settings.branch_guidance != 1.0 else None,
                steps=settings.decode_steps,
                orders_BP=self._orders(prompt, seed),
                guidance=settings.branch_guidance,
                noise_BPC=noise_BPC,
            ).cpu()
        return PredictedLatents(prompt, plan, cut, latents_BPC[0])

    def _orders(self, prompt: str, seed: int) -> torch.Tensor:
        if self.recipe.generate.decode_order == "raster":
            return raster_orders(1, self.branch.patches)
        return random_orders(1, self.branch.patches, generator_of(seed, prompt, "order"))

    def _read_once(self, prompt: str) -> tuple[str | None, bool, PromptCache]:
        """Plan (if the recipe says so), whether the text was cut, and its keys and values."""
        settings, plan = self.recipe.generate, None
        with self._offload_policy.on(self.mllm.model):
            if settings.plan:
                with timed(self.seconds, "plan"):
                    plan = self.mllm.write([prompt], settings.plan_instruction, settings.plan_tokens)[0]
            if settings.branch_guidance != 1.0:
                self._unconditional  # noqa: B018 while the MLLM is there
            with timed(self.seconds, "prompt"):
                layout = self.mllm.tokenize_prompts([join_plan(prompt, plan)], self.recipe.branch.max_text_tokens)
                return plan, layout.truncated[0], self.mllm.encode_prompts(layout)

    @cached_property
    def _unconditional(self) -> PromptCache:
        return self.mllm.encode_prompts(self.mllm.tokenize_prompts([""], self.recipe.branch.max_text_tokens))


class Decoder:
    """Diffusion model and ControlNet: the half that makes an image of patch latents. `seconds` as the sketcher's."""

    def __init__(
        self, diffusion: DiffusionModel, controlnet: nn.Module, recipe: Recipe, offload_policy: OffloadPolicy
    ) -> None:
        self.diffusion, self.controlnet, self.recipe, self._offload_policy = (
            diffusion,
            controlnet,
            recipe,
            offload_policy,
        )
        self.seconds: Counter[str] = Counter()
        self._text = lru_cache(maxsize=1)(self._embed)

    @classmethod
    def load(cls, recipe: Recipe, artifact: Artifact, offload_policy: OffloadPolicy, ui: Ui | None = None) -> Decoder:
        """ArtifactError BF-ART-004: the ControlNet was trained on another diffusion model than the recipe names."""
        models, kind = recipe.models, {"device": offload_policy.home, "dtype": getattr(torch, recipe.models.dtype)}
        diffusion = load_diffusion(models.diffusion, **kind, revision=models.diffusion_revision)
        check_settings(recipe, diffusion, ui or Ui())
        require_diffusion(artifact, models.diffusion, diffusion, diffusion_fingerprint(models, diffusion))
        controlnet = load_controlnet(artifact, **kind)
        offload_policy.settle(*diffusion.frozen_modules(), controlnet, frozen=diffusion.frozen_modules(but=("vae",)))
        return cls(diffusion, controlnet, recipe, offload_policy)

    @torch.no_grad()
    def render(self, prompt: str, latents_PC: torch.Tensor, seed: int) -> np.ndarray:
        """The image, uint8 (H, W, 3); its noise follows from (prompt, seed) alone."""
        text, diffusion, device = self._text(prompt), self.diffusion, self._offload_policy.device
        with timed(self.seconds, "diffusion"), self._offload_policy.on(diffusion.transformer, self.controlnet):
            generator, latents_BPC = generator_of(seed, prompt, "diffusion"), latents_PC[None].to(device)
            text = send_to_device(text, device)
            vae_Bchw = diffuse(diffusion, self.controlnet, latents_BPC, text, generator, self.recipe)
        with timed(self.seconds, "vae"), self._offload_policy.on(diffusion.vae):
            return diffusion.decode(vae_Bchw)[0].numpy()

    def cuts(self, prompt: str) -> bool:
        """True when the prompt is longer than the diffusion model reads."""
        return self.diffusion.too_long(prompt, self.recipe.models.diffusion_text_tokens)

    def _embed(self, prompt: str) -> Any:
        settings, diffusion = self.recipe.generate, self.diffusion
        encoders = diffusion.frozen_modules(but=("transformer", "vae"))
        with timed(self.seconds, "prompt"), self._offload_policy.on(*encoders):
            return diffusion.embed([prompt], self.recipe.models.diffusion_text_tokens, settings.guidance_scale)


@contextmanager
def timed(seconds: Counter[str], stage: str) -> Iterator[None]:
    """Add the time spent inside, the device's work included."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[stage] += time.perf_counter() - start


def diffuse(
    diffusion: DiffusionModel,
    controlnet: nn.Module,
    latents_BPC: torch.Tensor,
    text: Any,
    generator: torch.Generator,
    recipe: Recipe,
) -> torch.Tensor:
    """Patch latents (1, P, C) -> VAE latents (1, c, h, w) of the recipe's output size.

    RecipeError BF-RECIPE-005 when that size has not the image tokens that the ControlNet is for.
    """
    settings, size = recipe.generate, recipe.images.output_size
    noise_Bchw = diffusion.noise(size, generator)
    tokens, wanted = noise_Bchw.shape[-1] * noise_Bchw.shape[-2] // 4, image_tokens(controlnet, latents_BPC.shape[1])
    if wanted not in (None, tokens):
        side = 2 * math.isqrt(wanted) * diffusion.factor
        raise RecipeError(
            f"images.output_size {size} makes {tokens} image tokens; the ControlNet gives {wanted}",
            fix=f"--set images.output_size={side}",
            code="BF-RECIPE-005",
        )
    control = ControlInput(controlnet, latents_BPC, settings.control_scale)
    return diffusion.denoise(noise_Bchw, text, control=control, steps=settings.steps, guidance=settings.guidance_scale)


def generator_of(seed: int, prompt: str, purpose: str) -> torch.Generator:
    """Random numbers of one image for one purpose, on the CPU: the same on every device and beside any others."""
    return torch.Generator().manual_seed(derive(seed, prompt, purpose))


def timing_line(seconds: Counter[str]) -> str:
    """`plan 0.4 s, prompt 0.1 s, ...` for the stages that ran."""
    return ", ".join(f"{stage} {seconds[stage]:.2f} s" for stage in STAGES if stage in seconds)
