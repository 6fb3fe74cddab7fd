"""Two ways for patch latents to condition FLUX that are not a ControlNet, and much smaller: they copy no block. Legend:
B images, P patches, C latent channels, T text tokens, D width, N image tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bifrost_cli.models.diffusion.controlnet import Conditioner, PatchLatentEmbedder

EXPANSION = 8  # width of TokenConditioner's hidden layer, in text widths


class TokenConditioner(Conditioner):
    """Patch latents as tokens behind the text, which the transformer's joint attention reads as it reads text (as in
    FLUX Redux). The last layer starts at zero: at first all latents give the same P empty tokens, which still take
    their share of the attention."""

    def __init__(self, channels: int, patches: int, width: int) -> None:
        super().__init__()
        self.sizes = {"channels": channels, "patches": patches, "width": width}
        self.config = {"control": "cross_attention", **self.sizes}
        self.norm = nn.LayerNorm(channels)
        self.position_embedding = nn.Parameter(torch.randn(1, patches, channels))
        self.inner = nn.Linear(channels, EXPANSION * width)
        self.proj = nn.Linear(EXPANSION * width, width)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    @classmethod
    def for_transformer(cls, transformer: Any, channels: int, patches: int, ratio: int) -> TokenConditioner:
        return cls(channels, patches, transformer.config.joint_attention_dim)

    def forward(self, latents_BPC: Tensor) -> Tensor:
        """(B, P, C) -> tokens (B, P, D)."""
        positioned_BPC = self.norm(latents_BPC) + self.position_embedding
        return self.proj(nn.functional.gelu(self.inner(positioned_BPC)))

    def condition(self, sequence_BTD: Tensor, latents_BPC: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        tokens_BPD = self(latents_BPC).to(latents_BPC) * scale
        return torch.cat([sequence_BTD, tokens_BPD], dim=1), None


class ConcatConditioner(Conditioner):
    """Patch latents concatenated to the noisy latents at the transformer's input: a frozen linear layer of both is the
    sum of one of each, and theirs starts at zero. Untrained, it changes nothing."""

    def __init__(self, channels: int, width: int, ratio: int = 2) -> None:
        super().__init__()
        self.sizes = {"channels": channels, "width": width, "ratio": ratio}
        self.config = {"control": "concat", **self.sizes}
        self.embedder = PatchLatentEmbedder(channels, width, ratio)

    @classmethod
    def for_transformer(cls, transformer: Any, channels: int, patches: int, ratio: int) -> ConcatConditioner:
        return cls(channels, transformer.inner_dim, ratio)

    def forward(self, latents_BPC: Tensor) -> Tensor:
        """(B, P, C) -> what is added to the embedded input (B, N, D)."""
        return self.embedder(latents_BPC)

    def condition(self, sequence_BTD: Tensor, latents_BPC: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        return sequence_BTD, self(latents_BPC).to(latents_BPC) * scale
