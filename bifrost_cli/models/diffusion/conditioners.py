"""Two other ways for FLUX to hear patch latents than a ControlNet, for comparison: as tokens, or at its input.

In: patch latents (B, P, C). Out: what the diffusion model adds to its text or to its embedded input; see `flux.py`. They
copy no block of the diffusion model's, so they are much smaller than a ControlNet. Knows no path and no recipe.
Legend: B images, P patches, C latent channels, T the diffusion model's text width, D its own, N image tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bifrost_cli.models.diffusion.latent_embedder import PatchLatentEmbedder

WIDER = 8  # the hidden layer of TextControl, in text widths


class TokenConditioner(nn.Module):
    """Patch latents as tokens behind the diffusion model's text: its joint attention reads them as it reads words.

    The last layer starts at zero, so that the latents say nothing at first; the P empty tokens that it gives are not
    nothing to a softmax, which shares its weight among all tokens (FLUX Redux appends images in the same way).
    """

    def __init__(self, channels: int, patches: int, width: int) -> None:
        super().__init__()
        self.sizes = {"channels": channels, "patches": patches, "width": width}
        self.norm = nn.LayerNorm(channels)
        self.position_embedding = nn.Parameter(torch.randn(1, patches, channels))
        self.inner = nn.Linear(channels, WIDER * width)
        self.proj = nn.Linear(WIDER * width, width)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    @property
    def config(self) -> dict[str, Any]:
        """Everything needed to build one of the same form, as plain JSON values."""
        return {"control": "cross_attention", **self.sizes}

    def forward(self, latents_BPC: torch.Tensor) -> torch.Tensor:
        """(B, P, C) -> tokens (B, P, T)."""
        placed_BPC = self.norm(latents_BPC) + self.position_embedding
        return self.proj(nn.functional.gelu(self.inner(placed_BPC)))


class ConcatConditioner(nn.Module):
    """Patch latents beside the noisy image at the diffusion model's input: a frozen linear layer of both is the sum of one
    of each, and theirs starts at zero, so that an untrained one changes nothing."""

    def __init__(self, channels: int, width: int, ratio: int = 2) -> None:
        super().__init__()
        self.sizes = {"channels": channels, "width": width, "ratio": ratio}
        self.embedder = PatchLatentEmbedder(channels, width, ratio)

    @property
    def config(self) -> dict[str, Any]:
        """Everything needed to build one of the same form, as plain JSON values."""
        return {"control": "concat", **self.sizes}

    def forward(self, latents_BPC: torch.Tensor) -> torch.Tensor:
        """(B, P, C) -> what is added to the embedded input (B, N, D)."""
        return self.embedder(latents_BPC)


CONTROLS: dict[str, type[nn.Module]] = {"cross_attention": TokenConditioner, "concat": ConcatConditioner}
