"""The vision heads, from a hidden state to a patch latent: a linear layer as published, and two that sample.

Legend: D decoder width, C latent channels, N tokens, ... any leading axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bifrost_cli.models.branch.codebook_head import CodebookHead
from bifrost_cli.models.diffusion.rectified_flow import euler, flow_matching_loss
from bifrost_cli.models.row_noise import NoiseSource, normal
from bifrost_cli.models.transfer import to_device

EULER_STEPS = 25
MEAN_SAMPLES, MEAN_STEPS = 4, 10  # of the estimated mean, which is only looked at


class LinearHead(nn.Linear):
    """The published head (Bifrost-1, arXiv 2508.05954): it predicts the mean of what a prompt leaves free."""

    def mean(self, hidden_D: Tensor) -> Tensor:
        """Predicted latents (..., C) of hidden states (..., D)."""
        return self(hidden_D)

    def loss(self, hidden_ND: Tensor, target_NC: Tensor, generator: NoiseSource | None = None) -> Tensor:
        """Mean squared error over all entries, in float32; nothing is drawn from the generator."""
        return nn.functional.mse_loss(self(hidden_ND).float(), target_NC.float())

    def guided(
        self, hidden_D: Tensor, uncond_D: Tensor | None, guidance: float, noise_C: Tensor | None,
        temperature: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """u + w * (c - u) with the predictions c of `hidden_D` and u of `uncond_D`, or c where that is None.

        Noise and temperature are not read: a mean has neither.
        """
        conditional_C = self(hidden_D)
        if uncond_D is None:
            return conditional_C
        unconditional_C = self(uncond_D)
        return unconditional_C + guidance * (conditional_C - unconditional_C)


class FlowHead(nn.Module):
    """A small velocity network v(x, s | h) for each token, trained with flow matching; s runs from 1 (noise) to 0.

    After the per-token diffusion head of MAR (arXiv 2406.11838, section 3); not part of the paper.
    """

    def __init__(self, width: int, channels: int, hidden: int = 512, blocks: int = 3) -> None:
        super().__init__()
        self.channels = channels
        self.from_latent = nn.Linear(channels, hidden)
        self.from_hidden = nn.Linear(width, hidden)
        self.from_sigma = nn.Sequential(nn.Linear(64, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.blocks = nn.ModuleList([_Block(hidden) for _ in range(blocks)])
        self.to_velocity = nn.Linear(hidden, channels)

    def velocity(self, x_C: Tensor, sigma_1: Tensor, hidden_D: Tensor) -> Tensor:
        """v of noisy latents (..., C) at noise level sigma (..., 1)."""
        frequencies = torch.exp(torch.linspace(0, math.log(1000.0), 32, device=sigma_1.device))
        angles = sigma_1.float() * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        condition = self.from_hidden(hidden_D) + self.from_sigma(waves.to(hidden_D.dtype))
        out = self.from_latent(x_C)
        for block in self.blocks:
            out = block(out, condition)
        return self.to_velocity(out)

    def loss(self, hidden_ND: Tensor, target_NC: Tensor, generator: NoiseSource | None = None) -> Tensor:
        """Flow matching in float32, with s = sigmoid of a standard normal. None draws from torch's global generator."""
        noise_NC = _normal(target_NC, target_NC.shape, generator)
        sigma_N1 = _normal(target_NC, (len(target_NC), 1), generator).sigmoid()
        return flow_matching_loss(partial(self.velocity, hidden_D=hidden_ND), target_NC, noise_NC, sigma_N1)

    def mean(self, hidden_D: Tensor) -> Tensor:
        """The mean of a few samples, of coarser steps; from the same noise at every call, so that two calls agree.

        One velocity at the start would be cheaper, but training hardly sees noise level 1: it is far off there.
        """
        generator = torch.Generator(hidden_D.device).manual_seed(0)
        velocity, shape_C = partial(self.velocity, hidden_D=hidden_D), (*hidden_D.shape[:-1], self.channels)
        total_C = hidden_D.new_zeros(shape_C)
        for _ in range(MEAN_SAMPLES):
            noise_C = torch.randn(shape_C, generator=generator, device=hidden_D.device).to(hidden_D.dtype)
            total_C += self._sample(noise_C, velocity, MEAN_STEPS)
        return total_C / MEAN_SAMPLES

    def guided(
        self, hidden_D: Tensor, uncond_D: Tensor | None, guidance: float, noise_C: Tensor | None,
        temperature: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """Samples by Euler steps from `temperature` times `noise_C`, along the guided velocities u + w * (c - u)."""
        if noise_C is None:
            raise ValueError("a flow head samples: give it noise")

        def velocity(x_C: Tensor, sigma_1: Tensor) -> Tensor:
            velocity_C = self.velocity(x_C, sigma_1, hidden_D)
            if uncond_D is not None:
                uncond_C = self.velocity(x_C, sigma_1, uncond_D)
                velocity_C = uncond_C + guidance * (velocity_C - uncond_C)
            return velocity_C

        return self._sample(temperature * noise_C.to(hidden_D.dtype), velocity, EULER_STEPS)

    @staticmethod
    def _sample(noise_C: Tensor, velocity: Callable[[Tensor, Tensor], Tensor], steps: int) -> Tensor:
        def step(x_C: Tensor, steps_left: int) -> Tensor:
            # Time is counted in steps, so that one of them is exactly its share of the velocity.
            sigma_1 = torch.full_like(x_C[..., :1], 1 - (steps - steps_left) / steps)
            return (velocity(x_C, sigma_1) / steps).to(x_C.dtype)

        return euler(step, noise_C, range(steps, -1, -1))


HEADS: dict[str, Any] = {"linear": LinearHead, "flow": FlowHead, "codebook": CodebookHead}


class _Block(nn.Module):
    """A residual MLP whose normalised input is shifted, scaled and gated by the condition (adaLN, as in DiT)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(nn.functional.silu(condition)).chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


def _normal(like: Tensor, shape: tuple[int, ...] | torch.Size, generator: NoiseSource | None) -> Tensor:
    drawn = torch.randn(shape, device=like.device) if generator is None else normal(shape, generator)
    return to_device(drawn, like.device).to(like.dtype)
