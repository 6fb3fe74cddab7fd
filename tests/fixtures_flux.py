"""A painter and a ControlNet with random weights, for tests: the built-in system's classes, no files needed.

`tiny_painter()` gives a Painter whose every weight is random and not zero; `tiny_controlnet(painter)` a ControlNet that
really changes the picture; `save_painter(painter, folder)` the layout that `from_pretrained` reads.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FluxControlNetModel

from bifrost_cli.models import tiny
from bifrost_cli.models.controlnet import latent_controlnet
from bifrost_cli.models.flux import Painter

WORDS = ("a", "red", "circle", "above", "blue", "square", "green", "star")
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


def tiny_painter(seed: int = 0) -> Painter:
    """A frozen random painter: 64 px pictures, VAE factor 4, an 8x8 packed grid."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = tiny.clip_tokenizer(WORDS), tiny.t5_tokenizer(WORDS)
        modules = (tiny.flux_transformer(), tiny.vae(), tiny.clip_text(tokenizer), tiny.t5(tokenizer_2))
    for module in modules:
        module.eval().requires_grad_(False)
    return Painter(*modules, tokenizer, tokenizer_2, tiny.scheduler())


def tiny_controlnet(painter: Painter, channels: int = 12, seed: int = 1) -> FluxControlNetModel:
    """One double and one single block; the zero layers and the BatchNorm statistics made random."""
    controlnet = latent_controlnet(painter.transformer, 1, 1, channels).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in controlnet.state_dict().items():
        if name.startswith("controlnet_") and tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator).mul(0.2).add(0.5 * ("running_var" in name)).abs())
    return controlnet


def save_painter(painter: Painter, folder: Path) -> Path:
    """The folder layout of a diffusers FLUX pipeline."""
    for part in PARTS:
        getattr(painter, part).save_pretrained(folder / part)
    return folder
