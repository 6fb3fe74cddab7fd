"""A sampling head: a small velocity network on each hidden state, trained with flow matching.

In: hidden states (..., D). Out: sampled latents (..., C), their mean, or a loss. Knows no masks, prompts or decode
steps. After the per-token diffusion head of MAR (arXiv 2406.11838, section 3); not part of the Bifrost-1 paper, whose
linear head averages what a prompt leaves free.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bifrost_cli.models.row_noise import NoiseSource, normal

EULER_STEPS = 25


class FlowHead(nn.Module):
    """v(x, s | h) with x_s = (1 - s) * clean + s * noise and v = noise - clean; s runs from 1 (noise) to 0."""

    def __init__(self, width: int, channels: int, hidden: int = 512, blocks: int = 3) -> None:
        super().__init__()
        self.channels = channels
        self.from_latent = nn.Linear(channels, hidden)
        self.from_hidden = nn.Linear(width, hidden)
        self.from_sigma = nn.Sequential(nn.Linear(64, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.blocks = nn.ModuleList([_Block(hidden) for _ in range(blocks)])
        self.to_velocity = nn.Linear(hidden, channels)

    def velocity(self, x_C: Tensor, sigma_1: Tensor, hidden_D: Tensor) -> Tensor:
        """v of latents (..., C) at noise level sigma (..., 1)."""
        condition = self.from_hidden(hidden_D) + self.from_sigma(_waves(sigma_1).to(hidden_D.dtype))
        out = self.from_latent(x_C)
        for block in self.blocks:
            out = block(out, condition)
        return self.to_velocity(out)

    def loss(self, hidden_ND: Tensor, target_NC: Tensor, generator: NoiseSource | None = None) -> Tensor:
        """Flow matching: || v(x_s, s | h) - (noise - clean) ||^2 in float32, s = sigmoid of a unit normal."""
        noise_NC = _normal(target_NC, target_NC.shape, generator)
        sigma_N1 = _normal(target_NC, (len(target_NC), 1), generator).sigmoid()
        x_NC = (1 - sigma_N1) * target_NC + sigma_N1 * noise_NC
        velocity_NC = self.velocity(x_NC, sigma_N1, hidden_ND)
        return nn.functional.mse_loss(velocity_NC.float(), (noise_NC - target_NC).float())

    def mean(self, hidden_D: Tensor) -> Tensor:
        """The mean of what could be sampled: at s = 1 the best velocity is noise - E[clean | h], here with noise 0."""
        start_C = hidden_D.new_zeros(*hidden_D.shape[:-1], self.channels)
        return -self.velocity(start_C, torch.ones_like(start_C[..., :1]), hidden_D)

    def guided(self, hidden_D: Tensor, uncond_D: Tensor | None, guidance: float, noise_C: Tensor | None) -> Tensor:
        """Samples by Euler steps from the given noise; guidance acts on the velocities: u + w * (c - u)."""
        if noise_C is None:
            raise ValueError("a flow head samples: give it noise")
        x_C = noise_C.to(hidden_D.dtype)
        for step in range(EULER_STEPS):
            sigma_1 = torch.full_like(x_C[..., :1], 1 - step / EULER_STEPS)
            velocity_C = self.velocity(x_C, sigma_1, hidden_D)
            if uncond_D is not None:
                without_C = self.velocity(x_C, sigma_1, uncond_D)
                velocity_C = without_C + guidance * (velocity_C - without_C)
            x_C = x_C - velocity_C / EULER_STEPS
        return x_C


class _Block(nn.Module):
    """A residual MLP whose normalised input is shifted, scaled and gated by the condition (as in DiT)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(nn.functional.silu(condition)).chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


def _waves(sigma_1: Tensor) -> Tensor:
    frequencies = torch.exp(torch.linspace(0, math.log(1000.0), 32, device=sigma_1.device))
    angles = sigma_1.float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _normal(like: Tensor, shape: tuple[int, ...] | torch.Size, generator: NoiseSource | None) -> Tensor:
    drawn = torch.randn(shape, device=like.device) if generator is None else normal(shape, generator)
    return drawn.to(like)
