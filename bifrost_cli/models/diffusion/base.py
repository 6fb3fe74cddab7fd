"""The diffusion model: what stages and trainings use of a frozen diffusion model, whichever family it is of.

In: prompts, noise, patch latents. Out: images, VAE latents, flow-matching losses. A family (`models/flux.py`) adds
how its text is embedded, how its latents lie and how its velocity is asked for. Knows no path, no recipe and no
artifact; it caches nothing and draws random numbers from the generator it is given.
Legend: B images, T tokens, P patches and C channels of the patch latents, c VAE channels, h w VAE grid, H W pixels,
N image tokens of the transformer (2x2 VAE latents each).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import nn

from bifrost_cli.data.safetensors_io import weights_hash
from bifrost_cli.errors import RecipeError
from bifrost_cli.models.diffusion import rectified_flow
from bifrost_cli.models.row_noise import NoiseSource, normal

StepCallback = Callable[[int, torch.Tensor, torch.Tensor], object]


class ControlInput(NamedTuple):
    """A latent ControlNet, the patch latents it reads and the weight of its residuals."""

    model: nn.Module
    latents_BPC: torch.Tensor
    scale: float = 1.0


def vae_encode(vae: AutoencoderKL, pixels_BHWc: torch.Tensor) -> torch.Tensor:
    """`DiffusionModel.encode` for a VAE alone: extraction needs none of the other parts."""
    pixels_BcHW = pixels_BHWc.permute(0, 3, 1, 2).to(vae.device, vae.dtype) / 127.5 - 1
    mean_Bchw = vae.encode(pixels_BcHW).latent_dist.mode()
    return (mean_Bchw - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def vae_decode(vae: AutoencoderKL, latents_Bchw: torch.Tensor) -> torch.Tensor:
    """`DiffusionModel.decode` for a VAE alone."""
    raw_Bchw = latents_Bchw.to(vae.device, vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    pixels_BcHW = vae.decode(raw_Bchw, return_dict=False)[0].float()
    return ((pixels_BcHW / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu()


class DiffusionModel(ABC):
    """A frozen diffusion model in parts, all of stock classes; `eval()` and `requires_grad_(False)` are the loader's
    business. What `embed` returns is the family's own: it is handed to `denoise` and `control_loss` unread."""

    family: ClassVar[str]
    frozen_parts: ClassVar[tuple[str, ...]]
    transformer: nn.Module
    vae: AutoencoderKL
    scheduler: FlowMatchEulerDiscreteScheduler

    @property
    def device(self) -> torch.device:
        """Where noise, text and control must be."""
        return self.transformer.device

    @property
    def factor(self) -> int:
        """Pixels a side of one VAE latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """VAE channels c."""

    @property
    @abstractmethod
    def most_tokens(self) -> int:
        """The longest prompt, in T5 tokens, that the transformer was trained on."""

    @property
    @abstractmethod
    def reads_guidance(self) -> bool:
        """True when `guidance` changes what `denoise` gives."""

    def frozen_modules(self, but: Sequence[str] = ()) -> list[nn.Module]:
        """The parts with weights, without those named in `but`."""
        return [getattr(self, part) for part in self.frozen_parts if part not in but]

    def weights_hash(self) -> str:
        """sha256 over all weights: transformer, VAE and the text encoders."""
        states = [(part, getattr(self, part).state_dict()) for part in self.frozen_parts]
        return weights_hash({f"{part}.{name}": value for part, state in states for name, value in state.items()})

    # ---- text -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def too_long(self, prompt: str, max_tokens: int) -> bool:
        """True when the T5 encoder, cut to `max_tokens`, does not see the whole prompt."""

    @abstractmethod
    def embed(self, prompts: Sequence[str], max_tokens: int, guidance: float = 1.0) -> Any:
        """What the family reads of the prompts. `guidance` is what `denoise` will be given: a family that needs the
        empty prompt for it embeds that too."""

    # ---- images ---------------------------------------------------------------------------------------------------

    def noise(self, pixels: int, generator: torch.Generator) -> torch.Tensor:
        """One image's starting noise (1, c, h, w), drawn in float32 on the generator's device."""
        side = 2 * (pixels // (2 * self.factor))
        shape = (1, self.latent_channels, side, side)
        noise = torch.randn(shape, generator=generator, device=generator.device)
        return noise.to(self.device, self.transformer.dtype)

    @torch.no_grad()
    def encode(self, pixels_BHWc: torch.Tensor) -> torch.Tensor:
        """uint8 (B, H, W, 3) -> VAE latents (B, c, h, w), shifted and scaled for the transformer. The mean, so no
        randomness."""
        return vae_encode(self.vae, pixels_BHWc)

    @torch.no_grad()
    def decode(self, latents_Bchw: torch.Tensor) -> torch.Tensor:
        """VAE latents (B, c, h, w) -> uint8 (B, H, W, 3) on the CPU."""
        return vae_decode(self.vae, latents_Bchw)

    @abstractmethod
    def denoise(
        self,
        noise_Bchw: torch.Tensor,
        text: Any,
        *,
        control: ControlInput | None = None,
        steps: int = 28,
        guidance: float = 3.5,
        callback: StepCallback | None = None,
    ) -> torch.Tensor:
        """Noise to VAE latents by Euler steps, as the family's stock (ControlNet) pipeline.

        Args:
            noise_Bchw: starting noise, stacked from `noise`.
            text: from `embed`, with the same `guidance`.
            control: the latent ControlNet and its patch latents; None generates from text alone.
            steps: number of Euler steps.
            guidance: weight of the prompt; ignored unless `reads_guidance`.
            callback: called after each step with its index from 0, its timestep (1000 is pure noise) and the latents
                (B, c, h, w) it ended with. What it raises ends the loop.

        Returns:
            VAE latents (B, c, h, w), for `decode`.
        """

    # ---- the ControlNet and its loss --------------------------------------------------------------------------------

    @abstractmethod
    def new_controlnet(self, double_blocks: int, single_blocks: int, channels: int, ratio: int = 2) -> nn.Module:
        """An untrained latent ControlNet for patch latents of `channels`, each over `ratio` image tokens a side; it
        changes nothing yet. RecipeError when the transformer has not these blocks."""

    def new_control(self, kind: str, channels: int, patches: int, ratio: int) -> nn.Module:
        """An untrained control of another kind (`controlnet.control`). RecipeError when the family has none."""
        raise RecipeError(f"controlnet.control {kind} is made for FLUX, not for {self.family}", code="BF-RECIPE-005",
                          fix="--set controlnet.control=controlnet, or name a FLUX in models.diffusion")  # fmt: skip

    @abstractmethod
    def control_loss(
        self,
        controlnet: nn.Module,
        vae_latents_Bchw: torch.Tensor,
        control_BPC: torch.Tensor,
        text: Any,
        generator: NoiseSource,
    ) -> torch.Tensor:
        """Flow matching with true patch latents as control (paper, section 3): a scalar with the ControlNet's graph."""

    def training_sigmas(self, count: int, image_tokens: int, generator: NoiseSource) -> torch.Tensor:
        """`count` noise levels: logit-normal, then the shift that sampling uses at this size (SD3, sections 3.1, 5.3.2;
        diffusers' trainers draw the same from the scheduler's shifted table)."""
        sigma_B = rectified_flow.logit_normal(count, generator)
        if self.scheduler.config.use_dynamic_shifting:
            return rectified_flow.shift_exponential(sigma_B, self.shift_mu(image_tokens))
        return rectified_flow.shift_constant(sigma_B, self.scheduler.config.shift)

    def shift_mu(self, image_tokens: int) -> float:
        """The dynamic shift's exponent for an image of that many image tokens, by this scheduler's settings."""
        config = self.scheduler.config
        spans = (config.base_image_seq_len, config.max_image_seq_len)
        return rectified_flow.shift_mu(image_tokens, *spans, config.base_shift, config.max_shift)

    def _flow_loss(
        self,
        clean: torch.Tensor,
        image_tokens: int,
        generator: NoiseSource,
        velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """The mean squared error of `velocity(noisy, sigma_B)` on latents in the family's own layout."""
        clean = clean.to(self.device, self.transformer.dtype)
        noise = normal(clean.shape, generator).to(clean)
        sigma_B = self.training_sigmas(len(clean), image_tokens, generator).to(clean)
        return rectified_flow.flow_matching_loss(velocity, clean, noise, sigma_B)


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int) -> torch.Tensor:
    """Ids (B, length), padded and cut on the right as the stock pipelines do."""
    options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
    return tokenizer(list(prompts), **options).input_ids


def is_cut(tokenizer: Any, prompt: str, length: int) -> bool:
    """True when the prompt has more than `length` tokens."""
    return len(tokenizer(prompt, truncation=True, max_length=length + 1).input_ids) > length
