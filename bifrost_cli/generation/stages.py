"""The two halves of the pipeline: the prior makes patch latents of a prompt, the decoder an image of patch latents.

One image at a time unless a batch is asked for: sums of floats differ in the last bit between batch sizes. Legend: B
images, P patches and C channels of the patch latents, c channels and h w sides of the VAE latents, H W pixels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn

from bifrost_cli.artifacts import Artifact
from bifrost_cli.config.schema import Generate, Recipe
from bifrost_cli.errors import Diverged
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
# In decode a fifth argument follows, (1, P) bool: True is still masked.
StageCallback = Callable[..., None]


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
        known: tuple[torch.Tensor, torch.Tensor] | None = None, plan: str | None = None,
    ) -> PredictedLatents:  # fmt: skip
        """Patch latents of a prompt; decode order and the noise of a sampling head follow from (prompt, seed) alone.

        `settings` instead of the recipe's; `callback` is called after each decode step. `known`: latents_PC of an image
        and masked_P, True for what is predicted again; the steps are fewer in proportion. `plan` is read instead of one
        that the MLLM writes.
        """
        one = None if known is None else (known[0][None], known[1][None])
        plans = None if plan is None else [plan]
        return self.predict_batch([prompt], [seed], settings=settings, callback=callback, known=one, plans=plans)[0]

    @torch.no_grad()
    def predict_batch(
        self, prompts: Sequence[str], seeds: Sequence[int], *, settings: Generate | None = None,
        callback: StageCallback | None = None, known: tuple[torch.Tensor, torch.Tensor] | None = None,
        plans: Sequence[str] | None = None,
    ) -> list[PredictedLatents]:  # fmt: skip
        """`predict` of several prompts in one pass (`known`: latents_BPC and masked_BP): the last bits depend on what
        stands beside them."""
        settings, branch, noise_BPC = settings or self.settings, self.branch, None
        guided, drawn = settings.branch_guidance != 1.0, list(zip(seeds, prompts, strict=True))
        planning = (settings.plan_instruction, settings.plan_tokens) if settings.plan and plans is None else None
        read, cuts, cache = self._encoded(tuple(prompts), guided, planning, plans and tuple(plans))
        if branch.head_kind != "linear":
            shape = (1, branch.patches, branch.channels)
            noise_BPC = torch.cat([torch.randn(shape, generator=_generator(*pair, "head")) for pair in drawn])
        if settings.decode_order == "raster":
            orders_BP = raster_orders(len(drawn), branch.patches)
        else:
            orders_BP = torch.cat([random_orders(1, branch.patches, _generator(*pair, "order")) for pair in drawn])

        def on_step(step: int, latents_BPC: torch.Tensor, masked_BP: torch.Tensor) -> None:
            if callback is not None:
                callback("decode", step, int(masked_BP.sum()), latents_BPC, masked_BP)

        steps = settings.decode_steps
        if known is not None:
            steps = max(1, math.ceil(steps * float(known[1].float().mean())))
        with self._timed("decode"), self.policy.on(branch):
            latents_BPC = sample_masked(
                branch, cache, self._unconditional().expand(len(drawn)) if guided else None, steps=steps, known=known,
                orders_BP=orders_BP, guidance=settings.branch_guidance, noise_BPC=noise_BPC,
                temperature=settings.temperature, callback=on_step,
            ).cpu()  # fmt: skip
        return [PredictedLatents(*facts) for facts in zip(prompts, read, cuts, latents_BPC, strict=True)]

    def _timed(self, stage: str) -> AbstractContextManager[None]:
        return _timed(self.seconds, stage, self.policy.device)

    @torch.no_grad()
    def write_plan(self, prompt: str) -> str:
        """The dense description that the MLLM writes for a prompt."""
        with self.policy.on(self.mllm.model), self._timed("plan"):
            return self.mllm.write([prompt], self.settings.plan_instruction, self.settings.plan_tokens)[0].text

    def _encode(
        self, prompts: tuple[str, ...], guided: bool, planning: tuple[str, int] | None, given: tuple[str, ...] | None
    ) -> tuple[list[str | None], list[bool], PromptCache]:
        """The plans, whether each text was cut, and the texts' keys and values."""
        plans: list[str | None] = [None] * len(prompts) if given is None else list(given)
        cuts = [False] * len(prompts)
        with self.policy.on(self.mllm.model):
            if planning is not None:
                with self._timed("plan"):
                    written = self.mllm.write(prompts, *planning)
                    plans, cuts = [one.text for one in written], [one.cut for one in written]
            if guided:
                self._unconditional()  # while the MLLM is on the device
            with self._timed("prompt"):
                texts = [join_plan(prompt, plan) for prompt, plan in zip(prompts, plans, strict=True)]
                tokens = self.mllm.tokenize_prompts(texts, self.max_text_tokens)
                cuts = [one or other for one, other in zip(cuts, tokens.truncated, strict=True)]
                return plans, cuts, self.mllm.encode_prompts(tokens)


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
        options: dict[str, Any] = {"settings": settings, "output_size": output_size, "callback": callback}
        return self.denoise_batch([prompt], latents_PC[None], [seed], **options)

    @torch.no_grad()
    def denoise_batch(
        self, prompts: Sequence[str], latents_BPC: torch.Tensor, seeds: Sequence[int], *,
        settings: Generate | None = None, output_size: int | None = None, callback: StageCallback | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """`denoise` of several images in one pass, (B, c, h, w): the last bits depend on what stands beside them."""
        settings, diffusion = settings or self.settings, self.diffusion
        size, device = output_size or self.output_size, self.policy.device
        require_output_size(size, diffusion, self.controlnet, latents_BPC.shape[1])
        text = self._embedded(tuple(prompts), settings.guidance_scale)
        with self._timed("diffusion"), self.policy.on(diffusion.transformer, self.controlnet):
            noise_Bchw = torch.cat([diffusion.noise(size, _generator(seed, prompt, "diffusion"))
                                    for prompt, seed in zip(prompts, seeds, strict=True)])  # fmt: skip
            control = ControlInput(self.controlnet, latents_BPC.to(device), settings.control_scale)
            return diffusion.denoise(
                noise_Bchw, send_to_device(text, device), control=control, steps=settings.steps,
                guidance=settings.guidance_scale, callback=callback and partial(callback, "diffusion"),
            )  # fmt: skip

    @torch.no_grad()
    def decode(self, vae_latents_Bchw: torch.Tensor) -> np.ndarray:
        """The image of VAE latents (1, c, h, w), uint8 (H, W, 3)."""
        return self.decode_batch(vae_latents_Bchw)[0]

    @torch.no_grad()
    def decode_batch(self, vae_latents_Bchw: torch.Tensor) -> np.ndarray:
        """The images of VAE latents (B, c, h, w), uint8 (B, H, W, 3)."""
        with self._timed("vae"), self.policy.on(self.diffusion.vae):
            if not torch.isfinite(vae_latents_Bchw).all():
                raise Diverged("the diffusion model gave numbers that are not finite", fix=self._wider())
            return self.diffusion.decode(vae_latents_Bchw).numpy()

    def _wider(self) -> str:
        """The setting that gives numbers more room."""
        if self.policy.weights == "int8":
            return "--set models.weights=nf4, or dtype: LLM.int8() computes in float16, which ends at 65504"
        return "--set models.dtype=float32, or a smaller --guidance-scale or --control-scale"

    def _timed(self, stage: str) -> AbstractContextManager[None]:
        return _timed(self.seconds, stage, self.policy.device)

    @torch.no_grad()
    def _embed(self, prompts: tuple[str, ...], guidance: float) -> Any:
        encoders = self.diffusion.frozen_modules(but=("transformer", "vae"))
        with self._timed("prompt"), self.policy.on(*encoders):
            return self.diffusion.embed(list(prompts), self.text_tokens, guidance)


def _generator(seed: int, prompt: str, purpose: str) -> torch.Generator:
    """Random numbers of one image for one purpose, on the CPU: the same on every device and beside any others."""
    return torch.Generator().manual_seed(derive(seed, prompt, purpose))


@contextmanager
def _timed(seconds: dict[str, float], stage: str, device: torch.device) -> Iterator[None]:
    """Add the time spent inside, the device's work included."""
    start = time.perf_counter()
    yield
    if device.type == "cuda":  # the other GPUs of the machine are not waited for, nor is one initialised for the CPU
        torch.cuda.synchronize(device)
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
