"""Pretraining of the tiny VAE, the tiny open_clip model and the tiny FLUX on drawings of the shapes world.

open_clip is the external encoder of `extract-latents` and the feature network of `eval` in the built-in system.
Legend: B images, H W pixels, c h w the VAE grid, T text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bifrost_cli.models.diffusion.flux import FluxModel
from bifrost_cli.shapes.captions import sample_prompt, sample_scene
from bifrost_cli.shapes.draw import crowded_scene, draw
from bifrost_cli.shapes.questions import describe, place
from bifrost_cli.shapes.scene import Scene

NOISE = 0.05  # on the VAE's latents
DROPPED = 0.1  # share of FLUX's rows without their prompt


def drawn(scenes: Iterable[Scene]) -> Tensor:
    """The scenes as images, uint8 (B, H, W, 3)."""
    return torch.from_numpy(np.stack([draw(scene) for scene in scenes]))


def _vae_images(rng: np.random.Generator, count: int, crowded: float) -> Tensor:
    """`count` drawings (B, 3, H, W) in -1 to 1, of which a share `crowded` have a thing in most cells."""
    scenes = [
        crowded_scene(rng) if rng.random() < crowded else sample_scene(rng, sample_prompt(rng)) for _ in range(count)
    ]
    return drawn(scenes).permute(0, 3, 1, 2).float() / 127.5 - 1


class VaeTask:
    """L1 + 2 L2 on crowded scenes. No KL term: at this size any weight of it wins and leaves an empty background.

    Latents get a fixed small noise instead, with a penalty on their size; the predicted log-variance is tied to it.
    """

    def __init__(self, vae: Any, seed: int, batch_size: int) -> None:
        self.module, self.seed, self.batch_size = vae.train(), seed, batch_size

    def batch(self, step: int, micro: int) -> Tensor:
        return _vae_images(np.random.default_rng((self.seed, step, micro)), self.batch_size, crowded=0.7)

    def loss(self, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        posterior = self.module.encode(batch).latent_dist
        noise_Bchw = torch.randn(posterior.mean.shape, generator=generator)
        rendered_BcHW = self.module.decode(posterior.mean + NOISE * noise_Bchw).sample
        error = rendered_BcHW.float() - batch
        tie = (posterior.logvar - 2 * np.log(NOISE)).square().mean() + posterior.mean.square().mean()
        l1, l2 = error.abs().mean(), error.square().mean()
        return l1 + 2 * l2 + 1e-4 * tie, {"l1": l1.detach(), "l2": l2.detach()}

    def keys(self, batch: Tensor) -> list[str]:
        return [f"{len(batch)} drawings"]


@torch.no_grad()
def measure_scale(vae: Any, seed: int, count: int = 512) -> None:
    """Set `shift_factor` and `scaling_factor` so that FLUX sees latents of mean 0 and standard deviation 1."""
    vae.eval()
    pixels_BcHW = _vae_images(np.random.default_rng((seed, 1)), count, crowded=0.0)
    latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in pixels_BcHW.split(64)])
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 6), scaling_factor=round(1 / latents.std().item(), 6)
    )


class OpenClipTask:
    """CLIP's symmetric cross-entropy between drawings and sentences that name everything in them."""

    def __init__(
        self, model: nn.Module, tokenize: Callable[[list[str]], Tensor], card: dict[str, Any], seed: int, batch: int
    ) -> None:
        self.module, self.tokenize, self.seed, self.batch_size = model, tokenize, seed, batch
        self.mean, self.std = (torch.tensor(card[name]).view(3, 1, 1) for name in ("mean", "std"))

    def batch(self, step: int, micro: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, step, micro))
        scenes = [sample_scene(rng, sample_prompt(rng, split="train")) for _ in range(self.batch_size)]
        texts = [sentence(rng, scene) for scene in scenes]
        pixels = drawn(scenes).permute(0, 3, 1, 2).float() / 255
        return {"pixels": (pixels - self.mean) / self.std, "ids": self.tokenize(texts), "texts": texts}

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        image_BD, text_BD, scale = self.module(batch["pixels"], batch["ids"])
        logits_BB = scale.clamp(max=100) * image_BD @ text_BD.mT
        target_B = torch.arange(len(logits_BB))
        cross = nn.functional.cross_entropy
        right = (logits_BB.argmax(1) == target_B).float().mean()
        return (cross(logits_BB, target_B) + cross(logits_BB.mT, target_B)) / 2, {"right": right}

    def keys(self, batch: dict[str, Any]) -> list[str]:
        return list(batch["texts"])


def sentence(rng: np.random.Generator, scene: Scene) -> str:
    """A sentence about a scene: its things, in half of the sentences the first one's place, and the background."""
    where = f" at the {place(scene.things[0])}" if scene.things and rng.random() < 0.5 else ""
    return f"{describe(scene)}{where} on a {scene.tone} background"


class FluxTask:
    """Flow matching (`FluxModel.base_loss`) of the transformer and both text encoders, to generate from text alone.

    A pool of drawings is encoded once, at the start.
    """

    def __init__(self, diffusion: FluxModel, max_tokens: int, seed: int, batch_size: int, pool: int) -> None:
        self.diffusion, self.seed, self.batch_size = diffusion, seed, batch_size
        trained: dict[str, Any] = {
            name: getattr(diffusion, name) for name in ("transformer", "text_encoder", "text_encoder_2")
        }
        self.module = nn.ModuleDict(trained).requires_grad_(True)
        rng = np.random.default_rng((seed, 0))
        self.prompts = [sample_prompt(rng, split="train") for _ in range(pool)]
        pixels = drawn(sample_scene(rng, prompt) for prompt in self.prompts)
        self.latents_Nchw = torch.cat([diffusion.encode(chunk).half() for chunk in pixels.split(64)])
        self.clip_NT, self.t5_NT = diffusion.tokenize([prompt.text for prompt in self.prompts], max_tokens)
        self.no_clip_1T, self.no_t5_1T = diffusion.tokenize([""], max_tokens)

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.seed, 1, step, micro))
        rows = torch.from_numpy(rng.integers(len(self.prompts), size=self.batch_size))
        dropped_B1 = torch.from_numpy(rng.random((self.batch_size, 1)) < DROPPED)
        return {
            "latents": self.latents_Nchw[rows].float(),
            "clip": torch.where(dropped_B1, self.no_clip_1T, self.clip_NT[rows]),
            "t5": torch.where(dropped_B1, self.no_t5_1T, self.t5_NT[rows]),
        }

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        text = self.diffusion.embed_ids(batch["clip"], batch["t5"])
        return self.diffusion.base_loss(batch["latents"], text.sequence_BTD, text.pooled_BD, generator), {}

    def keys(self, batch: dict[str, Tensor]) -> list[str]:
        return self.diffusion.tokenizer_2.batch_decode(batch["t5"], skip_special_tokens=True)
