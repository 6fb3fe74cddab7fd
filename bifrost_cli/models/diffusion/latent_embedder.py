"""Patch latents to one vector for each image token: the paper's upsampler, then a projection that starts at zero.

Legend: B images, P patches, C latent channels, D the transformer's width, H W patch grid, r image tokens on a side of
each patch (2 in the paper), N = r r P image tokens.
"""

from __future__ import annotations

import math

import torch
from torch import nn


class PatchLatentEmbedder(nn.Module):
    """Upsamples patch latents r times and projects them to the transformer's width (r = 2: the paper's upsampler).

    `proj` starts at zero, so that an untrained ControlNet changes nothing.
    """

    def __init__(self, channels: int, width: int, ratio: int = 2) -> None:
        super().__init__()
        self.ratio = ratio
        self.upconv = nn.ConvTranspose2d(channels, channels, kernel_size=ratio, stride=ratio)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.proj = nn.Linear(channels, width)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def upsample(self, latents_BPC: torch.Tensor) -> torch.Tensor:
        """(B, H*W, C) row-major -> (B, rH*rW, C) row-major. ValueError: P is not a square number."""
        side = math.isqrt(latents_BPC.shape[1])
        if side * side != latents_BPC.shape[1]:
            raise ValueError(f"{latents_BPC.shape[1]} patches are not a square grid")
        grid_BCHW = latents_BPC.mT.unflatten(2, (side, side))
        fine_BCHW = torch.relu(self.bn1(self.upconv(grid_BCHW)))
        fine_BCHW = self.bn2(self.conv(fine_BCHW))
        skip_BCHW = nn.functional.interpolate(grid_BCHW, scale_factor=self.ratio, mode="nearest")
        return torch.relu(fine_BCHW + skip_BCHW).flatten(2).mT

    def forward(self, latents_BPC: torch.Tensor) -> torch.Tensor:
        """(B, P, C) -> (B, N, D)."""
        return self.proj(self.upsample(latents_BPC))
