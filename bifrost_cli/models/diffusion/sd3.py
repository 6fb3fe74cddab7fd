"""Stable Diffusion 3 and 3.5, with a latent ControlNet's residuals. The denoising loop is ours, because the stock
pipeline would encode the control with the VAE. Legend: B images, T text tokens (77 of CLIP, then T5's), D text width, c
VAE channels, h w VAE grid, P patches and C channels of patch latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from bifrost_cli.models.diffusion import rectified_flow
from bifrost_cli.models.diffusion.base import ControlInput, DiffusionModel, StepCallback, is_cut, token_ids
from bifrost_cli.models.diffusion.controlnet import latent_sd3_controlnet
from bifrost_cli.models.row_noise import NoiseSource


class Sd3Prompt(NamedTuple):
    """Embedded prompts; `empty` is the empty prompt's embedding, where guidance needs it."""

    sequence_BTD: Tensor
    pooled_BD: Tensor
    empty: Sd3Prompt | None = None


@dataclass(frozen=True)
class Sd3Model(DiffusionModel):
    """SD3 in parts. Its guidance is classifier-free: a second pass with the empty prompt, unless it is 1."""

    family: ClassVar[str] = "SD3"
    parts: ClassVar[dict[str, str]] = {
        "vae": "diffusers:AutoencoderKL",
        "scheduler": "diffusers:FlowMatchEulerDiscreteScheduler",
        "transformer": "diffusers:SD3Transformer2DModel",
        "text_encoder": "transformers:CLIPTextModelWithProjection",
        "text_encoder_2": "transformers:CLIPTextModelWithProjection",
        "text_encoder_3": "transformers:T5EncoderModel",
        "tokenizer": "transformers:CLIPTokenizer",
        "tokenizer_2": "transformers:CLIPTokenizer",
        "tokenizer_3": "transformers:T5Tokenizer",
    }
    frozen_parts: ClassVar = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    most_tokens: ClassVar = 256
    reads_guidance: ClassVar = True
    transformer: Any
    vae: Any
    text_encoder: Any
    text_encoder_2: Any
    text_encoder_3: Any
    tokenizer: Any
    tokenizer_2: Any
    tokenizer_3: Any
    scheduler: Any

    @property
    def latent_channels(self) -> int:
        return self.transformer.config.in_channels

    def too_long(self, prompt: str, max_tokens: int) -> bool:
        return is_cut(self.tokenizer_3, prompt, max_tokens)

    def embed(self, prompts: Sequence[str], max_tokens: int, guidance: float = 1.0) -> Sd3Prompt:
        """See `DiffusionModel`: T is 77 + max_tokens; the empty prompt is embedded too, unless guidance is 1."""
        text = self._embed(prompts, max_tokens)
        if guidance == 1.0:
            return text
        empty = self._embed([""], max_tokens)
        sequence_BTD, pooled_BD = (part.expand(len(prompts), *part.shape[1:]) for part in (empty[0], empty[1]))
        return text._replace(empty=Sd3Prompt(sequence_BTD, pooled_BD))

    def _embed(self, prompts: Sequence[str], max_tokens: int) -> Sd3Prompt:
        """As stock SD3: both CLIPs side by side, zero-padded to T5's width, then T5; no attention masks."""
        outputs = []
        for tokenizer, encoder in (self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2):
            ids_BT = token_ids(tokenizer, prompts, encoder.config.max_position_embeddings).to(encoder.device)
            outputs.append(encoder(ids_BT, output_hidden_states=True))
        t5_ids_BT = token_ids(self.tokenizer_3, prompts, max_tokens)
        t5_BTD = self.text_encoder_3(t5_ids_BT.to(self.text_encoder_3.device))[0]
        clip_BTD = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        clip_BTD = nn.functional.pad(clip_BTD, (0, t5_BTD.shape[-1] - clip_BTD.shape[-1]))
        pooled_BD = torch.cat([output.text_embeds for output in outputs], dim=-1)
        device, dtype = self.device, self.transformer.dtype
        return Sd3Prompt(torch.cat([clip_BTD, t5_BTD], dim=1).to(device, dtype), pooled_BD.to(device, dtype))

    @torch.no_grad()
    def denoise(
        self, noise_Bchw: Tensor, text: Sd3Prompt, *, control: ControlInput | None = None, steps: int = 28,
        guidance: float = 3.5, callback: StepCallback | None = None,
    ) -> Tensor:  # fmt: skip
        # Unlike FLUX's, the noise levels begin and end at the scheduler's extremes, shifted twice, as in stock.
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        shift = {"mu": self.shift_mu(noise_Bchw[0, 0].numel() // 4)} if scheduler.config.use_dynamic_shifting else {}
        scheduler.set_timesteps(steps, device=noise_Bchw.device, **shift)
        guided = guidance != 1.0
        if guided:  # classifier-free: the empty prompts, then the prompts, under the same control
            if text.empty is None:
                raise ValueError("guidance needs the empty prompt: embed with the same guidance")
            sequence_BTD = torch.cat([text.empty.sequence_BTD, text.sequence_BTD])
            text = Sd3Prompt(sequence_BTD, torch.cat([text.empty.pooled_BD, text.pooled_BD]))
            control = control and control._replace(latents_BPC=torch.cat([control.latents_BPC] * 2))

        def velocity(latents_Bchw: Tensor, sigma: Tensor) -> Tensor:
            inputs_Bchw = torch.cat([latents_Bchw] * 2) if guided else latents_Bchw
            velocity_Bchw = self.velocity(inputs_Bchw, (1000 * sigma).expand(len(inputs_Bchw)), text, control)
            if not guided:
                return velocity_Bchw
            uncond_Bchw, cond_Bchw = velocity_Bchw.chunk(2)
            return uncond_Bchw + guidance * (cond_Bchw - uncond_Bchw)

        def on_step(step: int, sigma: Tensor, latents_Bchw: Tensor) -> None:
            if callback is not None:
                callback(step, 1000 * sigma, latents_Bchw)

        return rectified_flow.euler(velocity, noise_Bchw, scheduler.sigmas, on_step)

    def velocity(
        self, latents_Bchw: Tensor, timestep_B: Tensor, text: Sd3Prompt, control: ControlInput | None
    ) -> Tensor:
        """The transformer's prediction of noise - clean, with the ControlNet's residuals added by the stock rule;
        timesteps are 0 (clean) to 1000 (noise)."""
        inputs = {
            "hidden_states": latents_Bchw,
            "timestep": timestep_B,
            "encoder_hidden_states": text.sequence_BTD,
            "pooled_projections": text.pooled_BD,
            "return_dict": False,
        }
        residuals = None
        if control is not None:
            latents_BPC = control.latents_BPC.to(latents_Bchw)
            (residuals,) = control.model(**inputs, controlnet_cond=latents_BPC, conditioning_scale=control.scale)
        return self.transformer(**inputs, block_controlnet_hidden_states=residuals)[0]

    def new_controlnet(self, double_blocks: int, single_blocks: int, channels: int, ratio: int = 2) -> nn.Module:
        return latent_sd3_controlnet(self.transformer, double_blocks, single_blocks, channels, ratio)

    def control_loss(
        self, controlnet: nn.Module, vae_latents_Bchw: Tensor, control_BPC: Tensor, text: Any, generator: NoiseSource
    ) -> Tensor:
        control = ControlInput(controlnet, control_BPC)

        def velocity(noisy_Bchw: Tensor, sigma_B: Tensor) -> Tensor:
            return self.velocity(noisy_Bchw, 1000 * sigma_B, text, control)

        return self._flow_loss(vae_latents_Bchw, vae_latents_Bchw[0, 0].numel() // 4, generator, velocity)
