"""Frozen diffusion models: what is the same for every family (`flux`, `sd3`), and what a family has to add. Legend: B
images, T text tokens, P patches and C channels of the patch latents, c VAE channels, h w VAE grid, H W pixels, N image
tokens of the transformer (2x2 VAE latents each)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from bifrost_cli.data.safetensors_io import weights_hash
from bifrost_cli.models.diffusion import controlnet as controls
from bifrost_cli.models.diffusion import rectified_flow
from bifrost_cli.models.diffusion.controlnet import UnsupportedControl
from bifrost_cli.models.mllm.chat_template import harmless
from bifrost_cli.models.row_noise import NoiseSource, normal
from bifrost_cli.models.transfer import to_device

StepCallback = Callable[[int, Tensor, Tensor], object]


class ControlInput(NamedTuple):
    """A latent ControlNet (or another conditioner), the patch latents it reads, and the weight of its residuals."""

    model: nn.Module
    latents_BPC: Tensor
    scale: float = 1.0


def vae_encode(vae: Any, pixels_BHWc: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> VAE latents (B, c, h, w), shifted and scaled; the mean, so deterministic."""
    # normalised in float32: a bfloat16 quotient would lose half a grey level before the 1 is subtracted
    pixels_BcHW = pixels_BHWc.permute(0, 3, 1, 2).to(vae.device, torch.float32) / 127.5 - 1
    mean_Bchw = vae.encode(pixels_BcHW.to(vae.dtype)).latent_dist.mode()
    return (mean_Bchw - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def vae_decode(vae: Any, latents_Bchw: Tensor) -> Tensor:
    """VAE latents (B, c, h, w) -> uint8 (B, H, W, 3) on the CPU."""
    raw_Bchw = latents_Bchw.to(vae.device, vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    pixels_BcHW = vae.decode(raw_Bchw, return_dict=False)[0].float()
    return ((pixels_BcHW / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu()


class DiffusionModel(ABC):
    """A frozen diffusion model in parts, all of stock classes, loaded in eval mode and without gradients. What `embed`
    returns is the family's own type; it is handed unread to `denoise` and `control_loss`. A package adds a family by an
    entry point of the group `bifrost.diffusion_models`: its name is `family`, its value a subclass. `parts` maps
    folders of the diffusers pipeline to the `module:class` that reads each, which is an argument of the constructor;
    the transformer's class decides which family a pipeline is of."""

    family: ClassVar[str]  # as artifacts record it
    parts: ClassVar[dict[str, str]]
    frozen_parts: ClassVar[tuple[str, ...]]  # those with weights, in the order of their hash
    transformer: Any  # stock classes, whose attributes type checkers do not know
    vae: Any
    scheduler: Any

    @property
    def device(self) -> torch.device:
        """Where noise, text and control have to be."""
        return self.transformer.device

    @property
    def factor(self) -> int:
        """Pixels on a side of one VAE latent."""
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
        """Whether `guidance` changes what `denoise` returns."""

    def frozen_modules(self, but: Sequence[str] = ()) -> list[nn.Module]:
        """The parts with weights, without those named in `but`."""
        return [getattr(self, part) for part in self.frozen_parts if part not in but]

    def weights_hash(self) -> str:
        """sha256 over all weights: transformer, VAE and text encoders."""
        states = [(part, getattr(self, part).state_dict()) for part in self.frozen_parts]
        return weights_hash({f"{part}.{name}": value for part, state in states for name, value in state.items()})

    @abstractmethod
    def too_long(self, prompt: str, max_tokens: int) -> bool:
        """Whether the T5 encoder, cut to `max_tokens`, misses the end of the prompt."""

    @abstractmethod
    def embed(self, prompts: Sequence[str], max_tokens: int, guidance: float = 1.0) -> Any:
        """Prompts of `max_tokens` T5 tokens each, padded or truncated. `guidance` is what `denoise` will be given: a
        family with classifier-free guidance then embeds the empty prompt too."""

    def noise(self, pixels: int, generator: torch.Generator) -> Tensor:
        """Starting noise (1, c, h, w) for an image of `pixels` a side, drawn in float32 on the generator's device."""
        side = 2 * (pixels // (2 * self.factor))
        noise = torch.randn(1, self.latent_channels, side, side, generator=generator, device=generator.device)
        return noise.to(self.device, self.transformer.dtype)

    @torch.no_grad()
    def encode(self, pixels_BHWc: Tensor) -> Tensor:
        return vae_encode(self.vae, pixels_BHWc)

    @torch.no_grad()
    def decode(self, latents_Bchw: Tensor) -> Tensor:
        return vae_decode(self.vae, latents_Bchw)

    @abstractmethod
    def denoise(
        self, noise_Bchw: Tensor, text: Any, *, control: ControlInput | None = None, steps: int = 28,
        guidance: float = 3.5, callback: StepCallback | None = None,
    ) -> Tensor:  # fmt: skip
        """Noise to VAE latents (B, c, h, w) by Euler steps, as the family's stock (ControlNet) pipeline.

        Args:
            text: from `embed`, with the same `guidance` (the weight of the prompt, ignored unless `reads_guidance`).
            control: the latent ControlNet and its patch latents; None generates from text alone.
            callback: called after each step with its index from 0, its timestep (1000 is pure noise) and the latents it
                ended with. What it raises ends the loop.
        """

    @classmethod
    def controlnet_from_config(cls, config: dict[str, Any]) -> nn.Module:
        """An empty control, for `config` from `controlnet_config`; a family of another package overrides both."""
        return controls.controlnet_from_config(config)

    def controlnet_config(self, controlnet: nn.Module) -> dict[str, Any]:
        """What an artifact keeps of a control, as JSON values; `family` says whose it is, unless it is FLUX."""
        return controls.controlnet_config(controlnet)

    @abstractmethod
    def new_controlnet(self, double_blocks: int, single_blocks: int, channels: int, ratio: int = 2) -> nn.Module:
        """An untrained latent ControlNet, which changes nothing yet: copies of so many of the transformer's double
        (joint) and single blocks (UnsupportedControl: it does not have, or would not read, so many). `ratio`: image
        tokens on a side of each patch (2 in the paper)."""

    def new_control(self, kind: str, channels: int, patches: int, ratio: int) -> nn.Module:
        """An untrained `Conditioner` of another kind. UnsupportedControl: the family has none."""
        raise UnsupportedControl(f"{kind} is made for FLUX, not for {self.family}", "control", "controlnet")

    @abstractmethod
    def control_loss(
        self, controlnet: nn.Module, vae_latents_Bchw: Tensor, control_BPC: Tensor, text: Any, generator: NoiseSource
    ) -> Tensor:
        """Flow matching of images (from `encode`) with their true patch latents as control and their captions (from
        `embed`), a scalar with the ControlNet's graph (Bifrost-1, section 3); `generator` draws noise and levels."""

    def training_sigmas(self, count: int, image_tokens: int, generator: NoiseSource) -> Tensor:
        """`count` noise levels: logit-normal (SD3, section 3.1), then the shift of sampling at this size (5.3.2)."""
        # diffusers' trainers draw the same for SD3. They train FLUX.1-dev on unshifted levels, because its scheduler
        # shifts only in `set_timesteps`; here it is shifted in training too.
        sigma_B = rectified_flow.logit_normal(count, generator)
        if self.scheduler.config.use_dynamic_shifting:
            return rectified_flow.shift_exponential(sigma_B, self.shift_mu(image_tokens))
        return rectified_flow.shift_constant(sigma_B, self.scheduler.config.shift)

    def shift_mu(self, image_tokens: int) -> float:
        """The exponent of the dynamic shift for so many image tokens, by this scheduler's settings."""
        config = self.scheduler.config
        return rectified_flow.shift_mu(
            image_tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )

    def _flow_loss(
        self, clean: Tensor, image_tokens: int, generator: NoiseSource, velocity: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """`flow_matching_loss` on latents in the family's layout, with drawn noise and noise levels."""
        clean = clean.to(self.device, self.transformer.dtype)
        noise = to_device(normal(clean.shape, generator), clean.device).to(clean.dtype)
        sigma_B = to_device(self.training_sigmas(len(clean), image_tokens, generator), clean.device).to(clean.dtype)
        return rectified_flow.flow_matching_loss(velocity, clean, noise, sigma_B)


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    """Ids (B, length), padded and truncated on the right as the stock pipelines do; special tokens that a user typed
    are read as the characters they are made of."""
    options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
    return tokenizer([harmless(prompt, tokenizer) for prompt in prompts], **options).input_ids


def is_cut(tokenizer: Any, prompt: str, length: int) -> bool:
    """Whether the prompt has more than `length` tokens."""
    return len(tokenizer(harmless(prompt, tokenizer), truncation=True, max_length=length + 1).input_ids) > length
