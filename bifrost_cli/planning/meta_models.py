"""A recipe's models on the meta device: stock modules without storage, so nothing is read or fetched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPTextConfig,
    CLIPTextModel,
    T5Config,
    T5EncoderModel,
)

from bifrost_cli.artifacts.files import read_json
from bifrost_cli.config.schema import Recipe
from bifrost_cli.models.branch.visual_branch import VisualBranch
from bifrost_cli.models.diffusion.controlnet import latent_controlnet
from bifrost_cli.models.encoders import VAE_PATCH
from bifrost_cli.models.mllm.adapters import adapter_of, require_known
from bifrost_cli.planning.model_configs import DIFFUSION_PARTS, configs, require_plannable
from bifrost_cli.training.train_branch import tuned


@dataclass(frozen=True)
class MetaModels:
    """A recipe's models without their weights."""

    recipe: Recipe
    mllm: Any  # transformers and diffusers build classes at run time that no type checker sees
    transformer: Any
    vae: Any
    text_encoder: Any
    text_encoder_2: Any
    encoder: Any  # of images: the MLLM's vision tower, the VAE, or open_clip's visual part
    grid: int  # patch latents on a side
    channels: int  # of a patch latent

    def of(self, recipe: Recipe) -> MetaModels:
        """The same models under other settings; only what the settings change is built again."""
        other = replace(self, recipe=recipe)
        for name in ("branch", "controlnet"):
            before, after = (getattr(each, name).model_dump(exclude={"train"}) for each in (self.recipe, recipe))
            if before == after and name in vars(self):
                vars(other)[name] = vars(self)[name]
        return other

    @cached_property
    def branch(self) -> VisualBranch:
        """The branch that the recipe trains."""
        settings, text = self.recipe.branch, self.mllm.config.text_config
        how: dict[str, Any] = {name: getattr(settings, name) for name in ("head", "codes", "code_levels", "normalize")}
        with torch.device("meta"):
            return VisualBranch(text, self.grid**2, self.channels, **how, tune=tuned(self.recipe))

    @cached_property
    def controlnet(self) -> Any:
        """The ControlNet that the recipe trains."""
        settings, side = self.recipe.controlnet, self.recipe.images.output_size // self.factor // 2
        blocks, ratio = (settings.double_blocks, settings.single_blocks), max(1, side // self.grid)
        with torch.device("meta"):
            return latent_controlnet(self.transformer, *blocks, self.channels, ratio=ratio)

    @property
    def own_encoder(self) -> bool:
        """Whether the MLLM's vision tower encodes the images."""
        return self.recipe.latents.encoder == "mllm"

    @property
    def factor(self) -> int:
        """Pixels on a side of one VAE latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def image_tokens(self) -> int:
        """The transformer's image tokens at the recipe's output size."""
        return (self.recipe.images.output_size // self.factor // 2) ** 2

    @property
    def flux_width(self) -> int:
        """Channels of a token in the transformer."""
        return self.transformer.config.num_attention_heads * self.transformer.config.attention_head_dim


def numbers(*modules: nn.Module, trained: bool = False) -> int:
    """How many parameters the modules have, or with `trained` how many take a gradient."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad or not trained)


def build(recipe: Recipe) -> MetaModels:
    """The models of a recipe on the meta device. RecipeError: what `require_plannable` refuses. ArtifactError
    BF-ART-009: an MLLM of no known family."""
    require_plannable(recipe)
    mllm_folder, diffusion = configs(recipe.models.mllm), configs(recipe.models.diffusion)
    require_known(read_json(mllm_folder / "config.json").get("model_type"))
    config = AutoConfig.from_pretrained(mllm_folder, trust_remote_code=False)
    read = {part: read_json(diffusion / part / "config.json") for part in DIFFUSION_PARTS}
    with torch.device("meta"):
        mllm = AutoModelForImageTextToText.from_config(config)
        parts: dict[str, Any] = {
            "transformer": FluxTransformer2DModel.from_config(read["transformer"]),
            "vae": AutoencoderKL.from_config(read["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(read["text_encoder"])),
            "text_encoder_2": T5EncoderModel(T5Config.from_dict(read["text_encoder_2"])),
        }
        encoder, grid, channels = _encoder(recipe, mllm, parts["vae"])
    return MetaModels(recipe, mllm, **parts, encoder=encoder, grid=grid, channels=channels)


def _encoder(recipe: Recipe, mllm: Any, vae: Any) -> tuple[Any, int, int]:
    """The image encoder, its patches on a side, its channels."""
    name, side = recipe.latents.encoder, recipe.images.input_size
    if name == "mllm":
        tower = next(module for part, module in mllm.model.named_children() if part != "language_model")
        grid = side // adapter_of(mllm.config).pixels_per_patch(mllm.config)
        return tower, grid, mllm.config.text_config.hidden_size
    if name == "vae":
        unit = VAE_PATCH * 2 ** (len(vae.config.block_out_channels) - 1)
        return vae, side // unit, vae.config.latent_channels * VAE_PATCH**2
    import open_clip  # a second of import time that only this encoder needs

    model = name.removeprefix("open_clip:")
    if name.startswith("builtin:"):
        model = f"local-dir:{configs(name)}"
    elif ":" not in model:
        model = model.partition("/")[0]
    tower = open_clip.create_model(model, load_weights=False, pretrained_text=False, device="meta").visual
    side, patch = (value if isinstance(value, int) else value[0] for value in (tower.image_size, tower.patch_size))
    return tower, side // patch, tower.conv1.out_channels
