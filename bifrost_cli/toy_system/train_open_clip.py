"""Contrastive pretraining of the tiny open_clip model on drawings and sentences about them.

It is the external encoder of `extract-latents` and the feature network of `eval` in the built-in system.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from bifrost_cli.shapes.captions import sample_prompt, sample_scene
from bifrost_cli.shapes.draw import draw
from bifrost_cli.shapes.questions import describe, place
from bifrost_cli.shapes.scene import Scene


class OpenClipTask:
    """CLIP's symmetric cross-entropy between drawings and sentences that name everything in them."""

    def __init__(
        self,
        model: nn.Module,
        tokenize: Callable[[list[str]], torch.Tensor],
        mean: list[float],
        std: list[float],
        seed: int,
        batch_size: int,
    ) -> None:
        self.module, self.tokenize, self.seed, self.batch_size = model, tokenize, seed, batch_size
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))

    def batch(self, step: int, micro: int) -> dict[str, Any]:
        """Drawings and their sentences, a function of the seed and the step."""
        rng = np.random.default_rng((self.seed, step, micro))
        scenes = [sample_scene(rng, sample_prompt(rng, split="train")) for _ in range(self.batch_size)]
        texts = [sentence(rng, scene) for scene in scenes]
        pixels = torch.from_numpy(np.stack([draw(scene) for scene in scenes])).permute(0, 3, 1, 2).float() / 255
        return {"pixels": (pixels - self.mean) / self.std, "ids": self.tokenize(texts), "texts": texts}

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a batch, and the share of drawings whose own sentence is the nearest."""
        image_BD, text_BD, scale = self.module(batch["pixels"], batch["ids"])
        logits_BB = scale.clamp(max=100) * image_BD @ text_BD.mT
        target_B = torch.arange(len(logits_BB))
        cross = nn.functional.cross_entropy
        right = (logits_BB.argmax(1) == target_B).float().mean()
        return (cross(logits_BB, target_B) + cross(logits_BB.mT, target_B)) / 2, {"right": right}

    def keys(self, batch: dict[str, Any]) -> list[str]:
        """The sentences, for error messages."""
        return list(batch["texts"])


def sentence(rng: np.random.Generator, scene: Scene) -> str:
    """A sentence about a scene: its things, in half of the sentences the first one's place, and the background."""
    where = f" at the {place(scene.things[0])}" if scene.things and rng.random() < 0.5 else ""
    return f"{describe(scene)}{where} on a {scene.tone} background"
