"""The decoder: patch latents to an image, by the frozen diffusion model and the latent ControlNet.

One image at a time, as in the prior. Legend: B images (1), P patches and C channels of the patch latents, c channels
and h w sides of the VAE latents, H W pixels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn

from bifrost_cli.artifacts import Artifact
from bifrost_cli.config.schema import Generate, Recipe
from bifrost_cli.generation.requests import generator_of
from bifrost_cli.generation.stages import StageCallback, timed
from bifrost_cli.loading.compatibility import check_settings, require_diffusion, require_output_size
from bifrost_cli.loading.fingerprints import diffusion_fingerprint
from bifrost_cli.loading.loaders import ModelLoader
from bifrost_cli.loading.offload import OffloadPolicy
from bifrost_cli.models.diffusion.base import ControlInput, DiffusionModel
from bifrost_cli.runtime.ui import Ui


class BifrostDecoder:
    """Diffusion model and ControlNet: the half of the pipeline that turns patch latents into an image.

    Args:
        diffusion: the frozen diffusion model.
        controlnet: the latent ControlNet that was trained on it.
        settings: the recipe's `generate` section; a call can give another.
        output_size: pixels a side of an image; a call can give another.
        text_tokens: `models.diffusion_text_tokens`; longer prompts are cut.
        policy: where the parts are between and during calls.
    """

    def __init__(
        self,
        diffusion: DiffusionModel,
        controlnet: nn.Module,
        settings: Generate,
        output_size: int,
        text_tokens: int,
        policy: OffloadPolicy,
    ) -> None:
        self.diffusion, self.controlnet, self.settings = diffusion, controlnet, settings
        self.output_size, self.text_tokens, self.policy = output_size, text_tokens, policy
        self.seconds: dict[str, float] = {}
        self._embedded = lru_cache(maxsize=1)(self._embed)

    @classmethod
    def load(cls, recipe: Recipe, artifact: Artifact, loader: ModelLoader, ui: Ui | None = None) -> BifrostDecoder:
        """Load both. ArtifactError BF-ART-004: the ControlNet was trained on another diffusion model than the recipe
        names."""
        models, diffusion = recipe.models, loader.diffusion()
        check_settings(recipe, diffusion, ui or Ui())
        require_diffusion(artifact, models.diffusion, diffusion, diffusion_fingerprint(models, diffusion))
        controlnet = loader.controlnet(artifact)
        frozen = diffusion.frozen_modules(but=("vae",))
        loader.policy.settle(*diffusion.frozen_modules(), controlnet, frozen=frozen)
        size, tokens = recipe.images.output_size, models.diffusion_text_tokens
        return cls(diffusion, controlnet, recipe.generate, size, tokens, loader.policy)

    @property
    def modules(self) -> list[nn.Module]:
        """The parts with weights."""
        return [*self.diffusion.frozen_modules(), self.controlnet]

    def forget_prompts(self) -> None:
        """Drop what is kept of the last prompt: it lies on the device of its time."""
        self._embedded.cache_clear()

    def render(self, prompt: str, latents_PC: torch.Tensor, seed: int = 0, **options: Any) -> np.ndarray:
        """The image, uint8 (H, W, 3); its noise follows from (prompt, seed) alone. Arguments as `denoise`."""
        return self.decode(self.denoise(prompt, latents_PC, seed, **options))

    @torch.no_grad()
    def denoise(
        self,
        prompt: str,
        latents_PC: torch.Tensor,
        seed: int = 0,
        *,
        settings: Generate | None = None,
        output_size: int | None = None,
        callback: StageCallback | None = None,
    ) -> torch.Tensor:
        """VAE latents (1, c, h, w) of patch latents.

        Args:
            prompt: what the diffusion model reads beside the patch latents; may be empty.
            latents_PC: patch latents, as the prior or the image encoder gives them.
            seed: of the noise it starts from.
            settings: instead of the recipe's.
            output_size: pixels a side, instead of the recipe's.
            callback: called after each diffusion step.

        Raises:
            RecipeError: BF-RECIPE-005, the size has not the image tokens that the ControlNet is for.
        """
        settings, diffusion = settings or self.settings, self.diffusion
        size, device = output_size or self.output_size, self.policy.device
        require_output_size(size, diffusion, self.controlnet, len(latents_PC))
        text = self._embedded(prompt, settings.guidance_scale)

        def on_step(step: int, timestep: torch.Tensor, latents_Bchw: torch.Tensor) -> None:
            if callback is not None:
                callback("diffusion", step, timestep, latents_Bchw)

        with timed(self.seconds, "diffusion"), self.policy.on(diffusion.transformer, self.controlnet):
            noise_Bchw = diffusion.noise(size, generator_of(seed, prompt, "diffusion"))
            control = ControlInput(self.controlnet, latents_PC[None].to(device), settings.control_scale)
            return diffusion.denoise(
                noise_Bchw,
                send_to_device(text, device),
                control=control,
                steps=settings.steps,
                guidance=settings.guidance_scale,
                callback=on_step,
            )

    @torch.no_grad()
    def decode(self, vae_latents_Bchw: torch.Tensor) -> np.ndarray:
        """The image of VAE latents (1, c, h, w), uint8 (H, W, 3)."""
        with timed(self.seconds, "vae"), self.policy.on(self.diffusion.vae):
            return self.diffusion.decode(vae_latents_Bchw)[0].numpy()

    def cuts(self, prompt: str) -> bool:
        """True when the prompt is longer than the diffusion model reads."""
        return self.diffusion.too_long(prompt, self.text_tokens)

    @torch.no_grad()
    def _embed(self, prompt: str, guidance: float) -> Any:
        encoders = self.diffusion.frozen_modules(but=("transformer", "vae"))
        with timed(self.seconds, "prompt"), self.policy.on(*encoders):
            return self.diffusion.embed([prompt], self.text_tokens, guidance)
