"""A painter and a ControlNet with random weights, for tests: the built-in system's classes, no files needed.

`tiny_painter()` gives a FluxPainter whose every weight is random and not zero; `tiny_controlnet(painter)` a ControlNet
that really changes the picture; `save_painter(painter, folder)` the layout that `from_pretrained` reads;
`save_system(folder)` all of it with a branch and a ControlNet as artifacts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxControlNetModel
from fixtures_mllm import random_branch, random_mllm

from bifrost_cli.artifacts import Artifact, Draft
from bifrost_cli.artifacts.files import write_json
from bifrost_cli.config import Branch, Generate, Latents, Models, Recipe
from bifrost_cli.data.weights import save_tensors
from bifrost_cli.models import tiny
from bifrost_cli.models.controlnet import controlnet_config, latent_controlnet
from bifrost_cli.models.encoders import MllmEncoder
from bifrost_cli.models.flux import FluxPainter
from bifrost_cli.models.mllm import Mllm

WORDS = ("a", "red", "circle", "above", "blue", "square", "green", "star")
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


def tiny_painter(seed: int = 0) -> FluxPainter:
    """A frozen random painter: 64 px pictures, VAE factor 4, an 8x8 packed grid."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = tiny.clip_tokenizer(WORDS), tiny.t5_tokenizer(WORDS)
        modules = (tiny.flux_transformer(), tiny.vae(), tiny.clip_text(tokenizer), tiny.t5(tokenizer_2))
    for module in modules:
        module.eval().requires_grad_(False)
    return FluxPainter(*modules, tokenizer, tokenizer_2, tiny.scheduler())


def tiny_controlnet(painter: FluxPainter, channels: int = 12, seed: int = 1) -> FluxControlNetModel:
    """One double and one single block; the zero layers and the BatchNorm statistics made random."""
    controlnet = latent_controlnet(painter.transformer, 1, 1, channels).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in controlnet.state_dict().items():
        if name.startswith("controlnet_") and tensor.is_floating_point():
            shift = 0.5 if "running_var" in name else 0.0
            tensor.copy_(torch.randn(tensor.shape, generator=generator).mul(0.2).add(shift).abs())
    return controlnet


def save_painter(painter: FluxPainter, folder: Path) -> Path:
    """The folder layout of a diffusers FLUX pipeline."""
    for part in PARTS:
        getattr(painter, part).save_pretrained(folder / part)
    return folder


def save_mllm(mllm: Mllm, folder: Path) -> Path:
    """The folder layout of a Qwen2.5-VL checkpoint."""
    for part in (mllm.model, mllm.tokenizer, mllm.image_processor):
        part.save_pretrained(folder)
    return folder


def save_part(folder: Path, kind: str, module: torch.nn.Module, config: dict, identity: dict) -> Artifact:
    """A trained part as an artifact, without a training."""
    with Draft.open(folder, kind, identity) as draft:
        save_tensors(draft.path / "model.safetensors", module.state_dict())
        write_json(draft.path / "config.json", config)
        return draft.commit()


@dataclass(frozen=True)
class System:
    """Bases and one trained pair on disk, and the recipe that names them."""

    recipe: Recipe
    branch: Artifact
    controlnet: Artifact
    encoder: dict


def save_system(folder: Path, *, head: str = "linear", **settings: object) -> System:
    """A whole random system below `folder`; `settings` go into the recipe's `generate` section."""
    mllm, painter = random_mllm(), tiny_painter()
    models = Models(mllm=str(save_mllm(mllm, folder / "mllm")), painter=str(save_painter(painter, folder / "flux")),
                    dtype="float32")  # fmt: skip
    generate = Generate(**{"decode_steps": 2, "steps": 2, "painter_tokens": 8, "plan_tokens": 3, **settings})
    recipe = Recipe(models=models, generate=generate, latents=Latents(image_size=64, paint_size=64),
                    branch=Branch(max_text_tokens=40))  # fmt: skip
    branch = random_branch(mllm, head=head)
    encoder = MllmEncoder(mllm, 64).identity
    shared = {"encoder": encoder, "grid": [4, 4], "channels": mllm.width}
    controlnet = tiny_controlnet(painter, channels=mllm.width)
    return System(
        recipe,
        save_part(folder / "branch", "branch", branch, branch.config, {**shared, "mllm": mllm.weights_hash()}),
        save_part(
            folder / "controlnet", "controlnet", controlnet, controlnet_config(controlnet),
            {**shared, "painter": painter.weights_hash()},
        ),  # fmt: skip
        encoder,
    )
