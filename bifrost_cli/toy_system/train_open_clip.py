"""Pretraining the tiny open_clip model: images against the words that tell of them, contrastively.

In: an untrained open_clip model and its tokenizer. Out: the same, trained. It serves as the external encoder of
`extract-latents` and as the feature network of `eval`; nothing here knows of either.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from bifrost_cli.shapes.captions import sample_prompt, sample_scene
from bifrost_cli.shapes.draw import draw
from bifrost_cli.shapes.questions import describe, place
from bifrost_cli.shapes.scene import Scene


class OpenClipTask:
    """CLIP's symmetric cross-entropy between a drawing and one sentence with everything in it and where."""

    def __init__(
        self, model: nn.Module, tokenize: Callable, mean: list[float], std: list[float], seed: int, batch_size: int
    ) -> None:
        self.module, self.tokenize, self.seed, self.batch_size = model, tokenize, seed, batch_size
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))

    def batch(self, step: int, micro: int) -> dict:
        rng = np.random.default_rng((self.seed, step, micro))
        scenes = [sample_scene(rng, sample_prompt(rng, split="train")) for _ in range(self.batch_size)]
        texts = [sentence(rng, scene) for scene in scenes]
        pixels = torch.from_numpy(np.stack([draw(scene) for scene in scenes])).permute(0, 3, 1, 2).float() / 255
        return {"pixels": (pixels - self.mean) / self.std, "ids": self.tokenize(texts), "texts": texts}

    def loss(self, batch: dict, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        image_BD, text_BD, scale = self.module(batch["pixels"], batch["ids"])
        logits_BB = scale.clamp(max=100) * image_BD @ text_BD.mT
        target_B = torch.arange(len(logits_BB))
        cross = nn.functional.cross_entropy
        right = (logits_BB.argmax(1) == target_B).float().mean()
        return (cross(logits_BB, target_B) + cross(logits_BB.mT, target_B)) / 2, {"right": right}

    def keys(self, batch: dict) -> list[str]:
        return batch["texts"]


def sentence(rng: np.random.Generator, scene: Scene) -> str:
    """What is there, in half of the sentences with the first thing's place, on which background."""
    where = f" at the {place(scene.things[0])}" if scene.things and rng.random() < 0.5 else ""
    return f"{describe(scene)}{where} on a {scene.tone} background"
