"""Pretraining of the tiny VAE on drawings of the shapes world; FLUX's shift and scale are measured into its config.

Legend: B images, H W pixels, c h w the VAE grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bifrost_cli.shapes.captions import sample_prompt, sample_scene
from bifrost_cli.shapes.draw import crowded_scene, draw

NOISE = 0.05


def images(rng: np.random.Generator, count: int, crowded: float) -> torch.Tensor:
    """`count` drawings, uint8 (B, H, W, 3), of which a share `crowded` have a thing in most cells."""
    scenes = [
        crowded_scene(rng) if rng.random() < crowded else sample_scene(rng, sample_prompt(rng)) for _ in range(count)
    ]
    return torch.from_numpy(np.stack([draw(scene) for scene in scenes]))


class VaeTask:
    """L1 + 2 L2 on crowded scenes. No KL term: at this size any weight of it wins and leaves an empty background.

    Latents get a fixed small noise instead, with a penalty on their size; the predicted log-variance is tied to it.
    """

    def __init__(self, vae: Any, seed: int, batch_size: int) -> None:
        self.module = vae.train()
        self.seed, self.batch_size = seed, batch_size

    def batch(self, step: int, micro: int) -> torch.Tensor:
        """Drawings, uint8 (B, H, W, 3), a function of the seed and the step."""
        return images(np.random.default_rng((self.seed, step, micro)), self.batch_size, crowded=0.7)

    def loss(self, batch: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a batch, and its parts for the log."""
        pixels_BcHW = batch.permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = self.module.encode(pixels_BcHW).latent_dist
        noise_Bchw = torch.randn(posterior.mean.shape, generator=generator)
        rendered_BcHW = self.module.decode(posterior.mean + NOISE * noise_Bchw).sample
        error = rendered_BcHW.float() - pixels_BcHW
        tie = (posterior.logvar - 2 * np.log(NOISE)).square().mean() + posterior.mean.square().mean()
        l1, l2 = error.abs().mean(), error.square().mean()
        return l1 + 2 * l2 + 1e-4 * tie, {"l1": l1.detach(), "l2": l2.detach()}

    def keys(self, batch: torch.Tensor) -> list[str]:
        """What an error message says of a batch."""
        return [f"{len(batch)} drawings"]


@torch.no_grad()
def measure_scale(vae: Any, seed: int, count: int = 512) -> None:
    """Set `shift_factor` and `scaling_factor` so that FLUX sees latents of mean 0 and standard deviation 1."""
    vae.eval()
    rng = np.random.default_rng((seed, 1))
    pixels_BcHW = images(rng, count, crowded=0.0).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in pixels_BcHW.split(64)])
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 6), scaling_factor=round(1 / latents.std().item(), 6)
    )
