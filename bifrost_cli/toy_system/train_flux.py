"""Pretraining of the tiny FLUX to generate from text alone: transformer and both text encoders together.

Legend: B images, c h w the VAE grid, T text tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from bifrost_cli.models.diffusion.flux import FluxModel
from bifrost_cli.shapes.captions import sample_prompt, sample_scene
from bifrost_cli.shapes.draw import draw

DROPPED = 0.1  # share of rows without their prompt


class FluxTask:
    """Flow matching (`FluxModel.base_loss`) on a pool of drawings that is encoded once, at the start."""

    def __init__(self, diffusion: FluxModel, max_tokens: int, seed: int, batch_size: int, pool: int) -> None:
        self.diffusion, self.seed, self.batch_size = diffusion, seed, batch_size
        trained: dict[str, Any] = {
            name: getattr(diffusion, name) for name in ("transformer", "text_encoder", "text_encoder_2")
        }
        self.module = nn.ModuleDict(trained).requires_grad_(True)
        rng = np.random.default_rng((seed, 0))
        self.prompts = [sample_prompt(rng, split="train") for _ in range(pool)]
        pixels = torch.from_numpy(np.stack([draw(sample_scene(rng, prompt)) for prompt in self.prompts]))
        self.latents_Nchw = torch.cat([diffusion.encode(chunk).half() for chunk in pixels.split(64)])
        self.clip_NT, self.t5_NT = diffusion.tokenize([prompt.text for prompt in self.prompts], max_tokens)
        self.no_clip_1T, self.no_t5_1T = diffusion.tokenize([""], max_tokens)

    def batch(self, step: int, micro: int) -> dict[str, torch.Tensor]:
        """VAE latents and token ids of random rows of the pool, a function of the seed and the step."""
        rng = np.random.default_rng((self.seed, 1, step, micro))
        rows = torch.from_numpy(rng.integers(len(self.prompts), size=self.batch_size))
        dropped_B1 = torch.from_numpy(rng.random((self.batch_size, 1)) < DROPPED)
        return {
            "latents": self.latents_Nchw[rows].float(),
            "clip": torch.where(dropped_B1, self.no_clip_1T, self.clip_NT[rows]),
            "t5": torch.where(dropped_B1, self.no_t5_1T, self.t5_NT[rows]),
        }

    def loss(
        self, batch: dict[str, torch.Tensor], generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The flow matching loss of a batch."""
        text = self.diffusion.embed_ids(batch["clip"], batch["t5"])
        return self.diffusion.base_loss(batch["latents"], text.sequence_BTD, text.pooled_BD, generator), {}

    def keys(self, batch: dict[str, torch.Tensor]) -> list[str]:
        """The prompts, for error messages."""
        return self.diffusion.tokenizer_2.batch_decode(batch["t5"], skip_special_tokens=True)
