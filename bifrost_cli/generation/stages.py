"""The two halves of the pipeline: the prior makes patch latents of a prompt, the decoder an image of patch latents.

One image at a time: sums of floats differ in the last bit between batch sizes. Legend: B images (1), P patches and C
channels of the patch latents, c channels and h w sides of the VAE latents, H W pixels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn

from bifrost_cli.artifacts import Artifact
from bifrost_cli.config.schema import Generate, Recipe
from bifrost_cli.loading.compatibility import check_settings, require_base, require_diffusion, require_output_size
from bifrost_cli.loading.loaders import ModelLoader, files_digest, fingerprint
from bifrost_cli.models.branch.masking import random_orders, raster_orders, sample_masked
from bifrost_cli.models.diffusion.base import ControlInput
from bifrost_cli.models.mllm.chat_template import join_plan
from bifrost_cli.models.mllm.frozen_mllm import PromptCache
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.training.data_order import derive

# Called with the stage (`decode` or `diffusion`), the step from 0, the timestep and the latents of that step: in decode
# the number of patches still masked and patch latents (1, P, C), in diffusion 1000 to 0 and VAE latents (1, c, h, w).
StageCallback = Callable[[str, int, Any, torch.Tensor], None]


@dataclass(frozen=True)
class PredictedLatents:
    """What the prior made of a prompt: the plan that the MLLM wrote first, if `generate.plan` asks for one; whether
    either was longer than the MLLM reads or writes; patch latents, float32 on the CPU."""

    prompt: str
    plan: str | None
    cut: bool
    latents_PC: torch.Tensor


class BifrostPrior:
    """The frozen MLLM and the branch that was trained on it. `policy` says where they are between and during calls.
    ArtifactError BF-ART-004: the branch was trained on another MLLM than the recipe names."""

    def __init__(self, recipe: Recipe, artifact: Artifact, loader: ModelLoader) -> None:
        self.artifact, self.settings, self.max_text_tokens = artifact, recipe.generate, recipe.branch.max_text_tokens
        self.policy, self.seconds = loader.policy, dict[str, float]()
        self.mllm = loader.mllm()
        files = files_digest("mllm", recipe.models) if "mllm_files" in artifact.identity else None
        weights = fingerprint("mllm", recipe.models, self.mllm)
        require_base(artifact, "mllm", recipe.models.mllm, weights, files)
        self.branch = loader.branch(artifact, self.mllm)
        self.modules: list[nn.Module] = [self.mllm.model, self.branch]
        self.policy.settle(*self.modules, frozen=[self.mllm.decoder])
        self._encoded = lru_cache(maxsize=1)(self._encode)  # several images of a prompt follow each other
        self._unconditional = lru_cache(maxsize=1)(
            lambda: self.mllm.encode_prompts(self.mllm.tokenize_prompts([""], self.max_text_tokens))
        )
        self.caches = (self._encoded, self._unconditional)

    @torch.no_grad()
    def predict(
        self, prompt: str, seed: int = 0, *, settings: Generate | None = None, callback: StageCallback | None = None,
        known: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> PredictedLatents:  # fmt: skip
        """Patch latents of a prompt; decode order and the noise of a sampling head follow from (prompt, seed) alone.

        `settings` instead of the recipe's; `callback` is called after each decode step. `known`: latents_PC of an image
        and masked_P, True for what is predicted again; the steps are fewer in proportion.
        """
        settings, branch, noise_BPC = settings or self.settings, self.branch, None
        guided = settings.branch_guidance != 1.0
        planning = (settings.plan_instruction, settings.plan_tokens) if settings.plan else None
        plan, cut, cache = self._encoded(prompt, guided, planning)
        if branch.head_kind != "linear":
            noise_BPC = torch.randn((1, branch.patches, branch.channels), generator=_generator(seed, prompt, "head"))
        if settings.decode_order == "raster":
            orders_BP = raster_orders(1, branch.patches)
        else:
            orders_BP = random_orders(1, branch.patches, _generator(seed, prompt, "order"))

        def on_step(step: int, latents_BPC: torch.Tensor, masked_BP: torch.Tensor) -> None:
            if callback is not None:
                callback("decode", step, int(masked_BP.sum()), latents_BPC)

        steps = settings.decode_steps
        if known is not None:
            steps = max(1, math.ceil(steps * float(known[1].float().mean())))
            known = known[0][None], known[1][None]
        with _timed(self.seconds, "decode"), self.policy.on(branch):
            latents_BPC = sample_masked(
                branch, cache, self._unconditional() if guided else None, steps=steps, known=known,
                orders_BP=orders_BP, guidance=settings.branch_guidance, noise_BPC=noise_BPC,
                temperature=settings.temperature, callback=on_step,
            ).cpu()  # fmt: skip
        return PredictedLatents(prompt, plan, cut, latents_BPC[0])

    def _encode(
        self, prompt: str, guided: bool, planning: tuple[str, int] | None
    ) -> tuple[str | None, bool, PromptCache]:
        """The plan, whether the text was cut, and the text's keys and values."""
        plan, plan_cut = None, False
        with self.policy.on(self.mllm.model):
            if planning is not None:
                with _timed(self.seconds, "plan"):
                    plan, plan_cut = self.mllm.write([prompt], *planning)[0]
            if guided:
                self._unconditional()  # while the MLLM is on the device
            with _timed(self.seconds, "prompt"):
                tokens = self.mllm.tokenize_prompts([join_plan(prompt, plan)], self.max_text_tokens)
                return plan, plan_cut or tokens.truncated[0], self.mllm.encode_prompts(tokens)


class BifrostDecoder:
    """The frozen diffusion model and the ControlNet that was trained on it. `policy` as in `BifrostPrior`.
    ArtifactError BF-ART-004: the ControlNet was trained on another diffusion model than the recipe names."""

    def __init__(self, recipe: Recipe, artifact: Artifact, loader: ModelLoader, ui: Ui | None = None) -> None:
        models, self.settings, self.output_size = recipe.models, recipe.generate, recipe.images.output_size
        self.text_tokens, self.policy, self.seconds = models.diffusion_text_tokens, loader.policy, dict[str, float]()
        self.diffusion = diffusion = loader.diffusion()
        check_settings(recipe, diffusion, ui or Ui())
        require_diffusion(artifact, models.diffusion, diffusion, fingerprint("diffusion", models, diffusion))
        self.controlnet = loader.controlnet(artifact)
        self.modules = [*diffusion.frozen_modules(), self.controlnet]
        self.policy.settle(*self.modules, frozen=diffusion.frozen_modules(but=("vae",)))
        self._embedded = lru_cache(maxsize=1)(self._embed)
        self.caches = (self._embedded,)

    def render(self, prompt: str, latents_PC: torch.Tensor, seed: int = 0, **options: Any) -> np.ndarray:
        """The image, uint8 (H, W, 3); its noise follows from (prompt, seed) alone. Arguments as `denoise`."""
        return self.decode(self.denoise(prompt, latents_PC, seed, **options))

    @torch.no_grad()
    def denoise(
        self, prompt: str, latents_PC: torch.Tensor, seed: int = 0, *, settings: Generate | None = None,
        output_size: int | None = None, callback: StageCallback | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """VAE latents (1, c, h, w) of patch latents, as the prior or the image encoder gives them.

        `prompt` is what the diffusion model reads beside them, and may be empty; `settings` and `output_size` (pixels a
        side) instead of the recipe's; `callback` is called after each diffusion step. RecipeError BF-RECIPE-005: the
        size has not the image tokens that the ControlNet is for.
        """
        settings, diffusion = settings or self.settings, self.diffusion
        size, device = output_size or self.output_size, self.policy.device
        require_output_size(size, diffusion, self.controlnet, len(latents_PC))
        text = self._embedded(prompt, settings.guidance_scale)
        with _timed(self.seconds, "diffusion"), self.policy.on(diffusion.transformer, self.controlnet):
            noise_Bchw = diffusion.noise(size, _generator(seed, prompt, "diffusion"))
            control = ControlInput(self.controlnet, latents_PC[None].to(device), settings.control_scale)
            return diffusion.denoise(
                noise_Bchw, send_to_device(text, device), control=control, steps=settings.steps,
                guidance=settings.guidance_scale, callback=callback and partial(callback, "diffusion"),
            )  # fmt: skip

    @torch.no_grad()
    def decode(self, vae_latents_Bchw: torch.Tensor) -> np.ndarray:
        """The image of VAE latents (1, c, h, w), uint8 (H, W, 3)."""
        with _timed(self.seconds, "vae"), self.policy.on(self.diffusion.vae):
            return self.diffusion.decode(vae_latents_Bchw)[0].numpy()

    @torch.no_grad()
    def _embed(self, prompt: str, guidance: float) -> Any:
        encoders = self.diffusion.frozen_modules(but=("transformer", "vae"))
        with _timed(self.seconds, "prompt"), self.policy.on(*encoders):
            return self.diffusion.embed([prompt], self.text_tokens, guidance)


def _generator(seed: int, prompt: str, purpose: str) -> torch.Generator:
    """Random numbers of one image for one purpose, on the CPU: the same on every device and beside any others."""
    return torch.Generator().manual_seed(derive(seed, prompt, purpose))


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time spent inside, the device's work included."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
