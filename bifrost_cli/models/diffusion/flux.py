"""FLUX (dev and schnell), with a latent ControlNet's residuals. The denoising loop is ours, because the stock pipeline
would encode the control with the VAE. Legend: B images, T text tokens, D text width, c VAE channels, h w VAE grid, N =
h/2 * w/2 packed tokens (of 4c channels), P patches and C channels of the patch latents."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from bifrost_cli.models.diffusion import rectified_flow
from bifrost_cli.models.diffusion.base import ControlInput, DiffusionModel, StepCallback, is_cut, token_ids
from bifrost_cli.models.diffusion.controlnet import CONDITIONERS, Conditioner, latent_controlnet
from bifrost_cli.models.row_noise import NoiseSource
from bifrost_cli.models.transfer import to_device


class FluxPrompt(NamedTuple):
    """Embedded prompts: the T5 sequence and the pooled CLIP vector."""

    sequence_BTD: Tensor
    pooled_BD: Tensor


@dataclass(frozen=True)
class FluxModel(DiffusionModel):
    """FLUX in parts. dev has a guidance embedding; schnell has none, and generates in one to four steps."""

    family: ClassVar[str] = "FLUX"
    parts: ClassVar[dict[str, str]] = {
        "vae": "diffusers:AutoencoderKL",
        "scheduler": "diffusers:FlowMatchEulerDiscreteScheduler",
        "transformer": "diffusers:FluxTransformer2DModel",
        "text_encoder": "transformers:CLIPTextModel",
        "text_encoder_2": "transformers:T5EncoderModel",
        "tokenizer": "transformers:CLIPTokenizer",
        "tokenizer_2": "transformers:T5Tokenizer",
    }
    frozen_parts: ClassVar = ("transformer", "vae", "text_encoder", "text_encoder_2")
    transformer: Any
    vae: Any
    text_encoder: Any
    text_encoder_2: Any
    tokenizer: Any
    tokenizer_2: Any
    scheduler: Any

    @property
    def latent_channels(self) -> int:
        return self.transformer.config.in_channels // 4  # 2x2 of them are packed into one token

    @property
    def most_tokens(self) -> int:
        return 512 if self.reads_guidance else 256

    @property
    def reads_guidance(self) -> bool:
        return self.transformer.config.guidance_embeds

    def tokenize(self, prompts: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        """CLIP ids (B, 77) and T5 ids (B, max_tokens)."""
        clip_tokens = self.text_encoder.config.max_position_embeddings
        return token_ids(self.tokenizer, prompts, clip_tokens), token_ids(self.tokenizer_2, prompts, max_tokens)

    def too_long(self, prompt: str, max_tokens: int) -> bool:
        return is_cut(self.tokenizer_2, prompt, max_tokens)

    def embed(self, prompts: Sequence[str], max_tokens: int, guidance: float = 1.0) -> FluxPrompt:
        """Gradients flow, to train the encoders; distilled guidance needs no empty prompt."""
        return self.embed_ids(*self.tokenize(prompts, max_tokens))

    def embed_ids(self, clip_ids_BT: Tensor, t5_ids_BT: Tensor) -> FluxPrompt:
        """`embed` for ids from `tokenize`. As in stock FLUX, T5 gets no attention mask, so it reads padding."""
        pooled_BD = self.text_encoder(to_device(clip_ids_BT, self.text_encoder.device)).pooler_output
        sequence_BTD = self.text_encoder_2(to_device(t5_ids_BT, self.text_encoder_2.device))[0]
        device, dtype = self.transformer.device, self.transformer.dtype
        return FluxPrompt(sequence_BTD.to(device, dtype), pooled_BD.to(device, dtype))

    @torch.no_grad()
    def denoise(
        self, noise_Bchw: Tensor, text: FluxPrompt, *, control: ControlInput | None = None, steps: int = 28,
        guidance: float = 3.5, callback: StepCallback | None = None,
    ) -> Tensor:  # fmt: skip
        """`guidance` is FLUX's distilled guidance, which schnell does not read."""
        latents_BNc, ids_N3 = pack(noise_Bchw), image_ids(noise_Bchw)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        mu = self.shift_mu(latents_BNc.shape[1])
        scheduler.set_timesteps(sigmas=rectified_flow.sampling_sigmas(steps), mu=mu, device=latents_BNc.device)

        def velocity(latents_BNc: Tensor, sigma: Tensor) -> Tensor:
            # Stock multiplies and divides by 1000, in these types: the rounding is part of what the model reads.
            sigma_B = (1000 * sigma).expand(len(latents_BNc)).to(latents_BNc.dtype) / 1000
            return self.velocity(latents_BNc, sigma_B, text, ids_N3, control=control, guidance=guidance)

        def on_step(step: int, sigma: Tensor, latents_BNc: Tensor) -> None:
            if callback is not None:
                callback(step, 1000 * sigma, unpack(latents_BNc, noise_Bchw.shape[-2:]))

        latents_BNc = rectified_flow.euler(velocity, latents_BNc, scheduler.sigmas, on_step)
        return unpack(latents_BNc, noise_Bchw.shape[-2:])

    def velocity(
        self, latents_BNc: Tensor, sigma_B: Tensor, text: FluxPrompt, ids_N3: Tensor, *, control: ControlInput | None,
        guidance: float,
    ) -> Tensor:  # fmt: skip
        """The transformer's prediction of noise - clean, (B, N, 4c), from packed latents. A ControlNet's residuals are
        added by the stock rule; a `Conditioner` acts on the text or the input instead."""
        added_BND = None
        if control is not None and isinstance(control.model, Conditioner):
            latents_BPC = control.latents_BPC.to(latents_BNc)
            sequence_BTD, added_BND = control.model.condition(text.sequence_BTD, latents_BPC, control.scale)
            text, control = text._replace(sequence_BTD=sequence_BTD), None
        inputs = {
            "hidden_states": latents_BNc,
            "timestep": sigma_B,
            "encoder_hidden_states": text.sequence_BTD,
            "pooled_projections": text.pooled_BD,
            "txt_ids": ids_N3.new_zeros(text.sequence_BTD.shape[1], 3),
            "img_ids": ids_N3,
            "return_dict": False,
        }
        double, single = None, None
        if control is not None:
            double, single = control.model(
                **inputs,
                controlnet_cond=control.latents_BPC.to(latents_BNc),
                conditioning_scale=control.scale,
                guidance=_guidance(control.model, sigma_B, guidance),
            )
        hook = None
        if added_BND is not None:
            embedder = self.transformer.x_embedder
            hook = embedder.register_forward_hook(lambda _layer, _inputs, output: output + added_BND)
        with hook or nullcontext():
            return self.transformer(
                **inputs,
                controlnet_block_samples=double,
                controlnet_single_block_samples=single,
                guidance=_guidance(self.transformer, sigma_B, guidance),
            )[0]

    def base_loss(
        self, vae_latents_Bchw: Tensor, prompt_embeds_BTD: Tensor, pooled_BD: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Flow matching on text alone, a scalar: how the tiny FLUX was trained."""
        return self._loss(vae_latents_Bchw, FluxPrompt(prompt_embeds_BTD, pooled_BD), None, generator)

    def control_loss(
        self, controlnet: nn.Module, vae_latents_Bchw: Tensor, control_BPC: Tensor, text: Any, generator: NoiseSource
    ) -> Tensor:
        return self._loss(vae_latents_Bchw, text, ControlInput(controlnet, control_BPC), generator)

    def new_controlnet(self, double_blocks: int, single_blocks: int, channels: int, ratio: int = 2) -> nn.Module:
        return latent_controlnet(self.transformer, double_blocks, single_blocks, channels, ratio)

    def new_control(self, kind: str, channels: int, patches: int, ratio: int) -> nn.Module:
        return CONDITIONERS[kind].for_transformer(self.transformer, channels, patches, ratio)

    def _loss(
        self, clean_Bchw: Tensor, text: FluxPrompt, control: ControlInput | None, generator: NoiseSource
    ) -> Tensor:
        clean_BNc, ids_N3 = pack(clean_Bchw), image_ids(clean_Bchw)

        def velocity(noisy_BNc: Tensor, sigma_B: Tensor) -> Tensor:
            # 3.5 is the guidance that FLUX.1-dev is used at; models without the embedding ignore it.
            return self.velocity(noisy_BNc, sigma_B, text, ids_N3, control=control, guidance=3.5)

        return self._flow_loss(clean_BNc, clean_BNc.shape[1], generator, velocity)


def pack(latents_Bchw: Tensor) -> Tensor:
    """(B, c, h, w) -> (B, h/2 * w/2, 4c): 2x2 latents become one token, channels first, as FLUX packs them."""
    tiles = latents_Bchw.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(packed_BNc: Tensor, grid: Sequence[int]) -> Tensor:
    """The inverse of `pack` for a VAE grid (h, w)."""
    height, width = grid
    tiles = packed_BNc.unflatten(1, (height // 2, width // 2)).unflatten(3, (-1, 2, 2))
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(len(packed_BNc), -1, height, width)


def image_ids(latents_Bchw: Tensor) -> Tensor:
    """Rotary positions of the packed tokens, (N, 3): zero, row, column."""
    rows, columns = (side // 2 for side in latents_Bchw.shape[-2:])
    axes = (torch.arange(side, device=latents_Bchw.device, dtype=torch.float32) for side in (rows, columns))
    row, column = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)


def _guidance(model: Any, sigma_B: Tensor, guidance: float) -> Tensor | None:
    if not model.config.guidance_embeds:
        return None
    return torch.full((len(sigma_B),), guidance, device=sigma_B.device, dtype=torch.float32)
