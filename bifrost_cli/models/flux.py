"""The painter: frozen FLUX (transformer, VAE, text encoders) with an optional latent ControlNet.

In: prompts, noise, patch latents. Out: pictures, VAE latents, flow-matching losses. Stock diffusers and transformers
classes throughout; only the denoising loop is ours, because the stock pipeline would VAE-encode the control. Knows no
path, no recipe and no artifact; it caches nothing and draws random numbers from the generator it is given.
Legend: B images, T text tokens, D text width, c VAE channels, h w VAE grid, N = h/2 * w/2 packed tokens (of 4c
channels), P patches and C channels of the patch latents, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxControlNetModel, FluxTransformer2DModel
from torch import nn

from bifrost_cli.data.weights import weights_hash
from bifrost_cli.maths import flow


class Text(NamedTuple):
    """What FLUX reads of a prompt: the T5 sequence and the pooled CLIP vector."""

    sequence_BTD: torch.Tensor
    pooled_BD: torch.Tensor


class Control(NamedTuple):
    """A latent ControlNet, the patch latents it reads and the weight of its residuals."""

    model: FluxControlNetModel
    latents_BPC: torch.Tensor
    scale: float = 1.0


def vae_encode(vae: AutoencoderKL, pixels_BHWc: torch.Tensor) -> torch.Tensor:
    """`Painter.encode` for a VAE alone: extraction needs none of FLUX's other parts."""
    pixels_BcHW = pixels_BHWc.permute(0, 3, 1, 2).to(vae.device, vae.dtype) / 127.5 - 1
    mean_Bchw = vae.encode(pixels_BcHW).latent_dist.mode()
    return (mean_Bchw - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


@dataclass(frozen=True)
class Painter:
    """FLUX in parts. Every part is a stock class; `eval()` and `requires_grad_(False)` are the loader's business."""

    transformer: FluxTransformer2DModel
    vae: AutoencoderKL
    text_encoder: nn.Module
    text_encoder_2: nn.Module
    tokenizer: Any
    tokenizer_2: Any
    scheduler: FlowMatchEulerDiscreteScheduler

    @property
    def factor(self) -> int:
        """Pixels a side of one VAE latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        """VAE channels c (FLUX packs 2x2 of them into one token)."""
        return self.transformer.config.in_channels // 4

    def weights_hash(self) -> str:
        """sha256 over all weights: transformer, VAE and both text encoders."""
        parts = ("transformer", "vae", "text_encoder", "text_encoder_2")
        states = [(part, getattr(self, part).state_dict()) for part in parts]
        return weights_hash({f"{part}.{name}": value for part, state in states for name, value in state.items()})

    # ---- text -------------------------------------------------------------------------------------------------------

    def tokenize(self, prompts: Sequence[str], max_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """CLIP ids (B, 77) and T5 ids (B, max_tokens), padded and cut on the right as stock FLUX does."""
        clip_tokens = self.text_encoder.config.max_position_embeddings
        return _ids(self.tokenizer, prompts, clip_tokens), _ids(self.tokenizer_2, prompts, max_tokens)

    def too_long(self, prompt: str, max_tokens: int) -> bool:
        """True when the T5 encoder, cut to `max_tokens`, does not see the whole prompt."""
        options = {"truncation": True, "max_length": max_tokens + 1}
        return len(self.tokenizer_2(prompt, **options).input_ids) > max_tokens

    def embed(self, prompts: Sequence[str], max_tokens: int) -> Text:
        """Prompts -> Text((B, max_tokens, D), (B, pooled width)). Gradients flow: pretraining trains the encoders."""
        return self.embed_ids(*self.tokenize(prompts, max_tokens))

    def embed_ids(self, clip_ids_BT: torch.Tensor, t5_ids_BT: torch.Tensor) -> Text:
        """`embed` for ids from `tokenize`. As in stock FLUX, T5 gets no attention mask (padding is seen)."""
        pooled_BD = self.text_encoder(clip_ids_BT.to(self.text_encoder.device)).pooler_output
        sequence_BTD = self.text_encoder_2(t5_ids_BT.to(self.text_encoder_2.device))[0]
        place = {"device": self.transformer.device, "dtype": self.transformer.dtype}
        return Text(sequence_BTD.to(**place), pooled_BD.to(**place))

    # ---- pictures ---------------------------------------------------------------------------------------------------

    def noise(self, pixels: int, generator: torch.Generator) -> torch.Tensor:
        """One picture's starting noise (1, c, h, w), drawn in float32 on the generator's device."""
        side = 2 * (pixels // (2 * self.factor))
        shape = (1, self.latent_channels, side, side)
        noise = torch.randn(shape, generator=generator, device=generator.device)
        return noise.to(self.transformer.device, self.transformer.dtype)

    @torch.no_grad()
    def encode(self, pixels_BHWc: torch.Tensor) -> torch.Tensor:
        """uint8 (B, H, W, 3) -> VAE latents (B, c, h, w), shifted and scaled for FLUX. The mean, so no randomness."""
        return vae_encode(self.vae, pixels_BHWc)

    @torch.no_grad()
    def decode(self, latents_Bchw: torch.Tensor) -> torch.Tensor:
        """FLUX's VAE latents (B, c, h, w) -> uint8 (B, H, W, 3) on the CPU."""
        latents_Bchw = latents_Bchw.to(self.vae.device, self.vae.dtype)
        raw_Bchw = latents_Bchw / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        pixels_BcHW = self.vae.decode(raw_Bchw, return_dict=False)[0].float()
        return ((pixels_BcHW / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu()

    @torch.no_grad()
    def denoise(
        self,
        noise_Bchw: torch.Tensor,
        text: Text,
        *,
        control: Control | None = None,
        steps: int = 28,
        guidance: float = 3.5,
    ) -> torch.Tensor:
        """Noise -> VAE latents (B, c, h, w) in `steps` Euler steps, as the stock FLUX (ControlNet) pipeline.

        `guidance` is FLUX's distilled guidance; a transformer without guidance embedding does not read it.
        """
        latents_BNc = pack(noise_Bchw)
        ids_N3 = image_ids(noise_Bchw)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        mu = self.shift_mu(latents_BNc.shape[1])
        scheduler.set_timesteps(sigmas=flow.sampling_sigmas(steps), mu=mu, device=latents_BNc.device)
        scheduler.set_begin_index(0)
        for timestep in scheduler.timesteps:
            sigma_B = timestep.expand(len(latents_BNc)).to(latents_BNc.dtype) / 1000
            velocity_BNc = self.velocity(latents_BNc, sigma_B, text, ids_N3, control=control, guidance=guidance)
            latents_BNc = scheduler.step(velocity_BNc, timestep, latents_BNc, return_dict=False)[0]
        return unpack(latents_BNc, noise_Bchw.shape[-2:])

    # ---- the model and its losses -----------------------------------------------------------------------------------

    def velocity(
        self,
        latents_BNc: torch.Tensor,
        sigma_B: torch.Tensor,
        text: Text,
        ids_N3: torch.Tensor,
        *,
        control: Control | None,
        guidance: float,
    ) -> torch.Tensor:
        """FLUX's prediction of noise - clean (B, N, 4c), with the ControlNet's residuals spread by the stock rule."""
        inputs = {
            "hidden_states": latents_BNc,
            "timestep": sigma_B,
            "encoder_hidden_states": text.sequence_BTD,
            "pooled_projections": text.pooled_BD,
            "txt_ids": ids_N3.new_zeros(text.sequence_BTD.shape[1], 3),
            "img_ids": ids_N3,
            "return_dict": False,
        }
        residuals = (None, None)
        if control is not None:
            residuals = control.model(
                **inputs,
                controlnet_cond=control.latents_BPC.to(latents_BNc),
                conditioning_scale=control.scale,
                guidance=_guidance(control.model, sigma_B, guidance),
            )
        names = ("controlnet_block_samples", "controlnet_single_block_samples")
        residuals = dict(zip(names, residuals, strict=True))
        return self.transformer(**inputs, **residuals, guidance=_guidance(self.transformer, sigma_B, guidance))[0]

    def base_loss(
        self,
        vae_latents_Bchw: torch.Tensor,
        prompt_embeds_BTD: torch.Tensor,
        pooled_BD: torch.Tensor,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Plain FLUX flow matching on text alone (a scalar): how the tiny FLUX itself was made."""
        return self._flow_loss(vae_latents_Bchw, Text(prompt_embeds_BTD, pooled_BD), None, generator)

    def control_loss(
        self,
        controlnet: FluxControlNetModel,
        vae_latents_Bchw: torch.Tensor,
        control_BPC: torch.Tensor,
        text: Text,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Flow matching with true patch latents as control (paper, section 3): a scalar with the ControlNet's graph."""
        return self._flow_loss(vae_latents_Bchw, Text(*text), Control(controlnet, control_BPC), generator)

    def training_sigmas(self, count: int, image_tokens: int, generator: torch.Generator) -> torch.Tensor:
        """`count` noise levels: logit-normal, then the shift that sampling uses at this size (SD3, sections 3.1, 5.3.2;
        diffusers' FLUX trainers draw the same from the scheduler's shifted table)."""
        sigma_B = flow.logit_normal(count, generator)
        if self.scheduler.config.use_dynamic_shifting:
            return flow.shift_exponential(sigma_B, self.shift_mu(image_tokens))
        return flow.shift_constant(sigma_B, self.scheduler.config.shift)

    def _flow_loss(
        self, clean_Bchw: torch.Tensor, text: Text, control: Control | None, generator: torch.Generator
    ) -> torch.Tensor:
        # 3.5 is the guidance FLUX.1-dev is both used and fine-tuned at; models without its embedding ignore it.
        clean_BNc = pack(clean_Bchw.to(self.transformer.device, self.transformer.dtype))
        noise_BNc = torch.randn(clean_BNc.shape, generator=generator, device=generator.device).to(clean_BNc)
        sigma_B = self.training_sigmas(len(clean_BNc), clean_BNc.shape[1], generator).to(clean_BNc)
        noisy_BNc = flow.noisy(clean_BNc, noise_BNc, sigma_B)
        velocity_BNc = self.velocity(noisy_BNc, sigma_B, text, image_ids(clean_Bchw), control=control, guidance=3.5)
        return nn.functional.mse_loss(velocity_BNc.float(), flow.flow_target(clean_BNc, noise_BNc).float())

    def shift_mu(self, image_tokens: int) -> float:
        """The dynamic shift's exponent for a picture of that many packed tokens, by this scheduler's settings."""
        config = self.scheduler.config
        spans = (config.base_image_seq_len, config.max_image_seq_len)
        return flow.shift_mu(image_tokens, *spans, config.base_shift, config.max_shift)


def pack(latents_Bchw: torch.Tensor) -> torch.Tensor:
    """(B, c, h, w) -> (B, h/2 * w/2, 4c): 2x2 latents become one token, channel first (FLUX's packing)."""
    tiles = latents_Bchw.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(packed_BNc: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """The inverse of `pack` for a VAE grid (h, w)."""
    height, width = grid
    tiles = packed_BNc.unflatten(1, (height // 2, width // 2)).unflatten(3, (-1, 2, 2))
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(len(packed_BNc), -1, height, width)


def image_ids(latents_Bchw: torch.Tensor) -> torch.Tensor:
    """Rotary positions of the packed tokens, (N, 3): zero, row, column."""
    rows, columns = (side // 2 for side in latents_Bchw.shape[-2:])
    options = {"device": latents_Bchw.device, "dtype": torch.float32}
    row, column = torch.meshgrid(torch.arange(rows, **options), torch.arange(columns, **options), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)


def _guidance(model: nn.Module, sigma_B: torch.Tensor, guidance: float) -> torch.Tensor | None:
    if not model.config.guidance_embeds:
        return None
    return torch.full((len(sigma_B),), guidance, device=sigma_B.device, dtype=torch.float32)


def _ids(tokenizer: Any, prompts: Sequence[str], length: int) -> torch.Tensor:
    options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
    return tokenizer(list(prompts), **options).input_ids
