"""The parts of a system on the meta device: how many numbers each has, with no weight read and nothing fetched.

In: a recipe. Out: a `System` of stock modules without storage, built from configurations: a local folder's own, or the
published ones kept in `recipes/configs/`. Does not know what a part costs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxControlNetModel, FluxTransformer2DModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)

from bifrost_cli.artifacts.files import read_json
from bifrost_cli.config.load import recipes_folder
from bifrost_cli.config.schema import Recipe
from bifrost_cli.errors import RecipeError
from bifrost_cli.loading.resolve import BUILTIN
from bifrost_cli.models.branch.visual_branch import VisualBranch
from bifrost_cli.models.diffusion.controlnet import latent_controlnet
from bifrost_cli.models.encoders import VAE_PATCH
from bifrost_cli.models.mllm.adapters import adapter_of, require_known
from bifrost_cli.training.train_branch import tuned

DIFFUSION_PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class MetaModels:
    """A recipe's models without their weights. `grid` counts patch latents on a side; `channels` is their width."""

    recipe: Recipe
    mllm: PreTrainedModel
    transformer: FluxTransformer2DModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel
    encoder: nn.Module
    grid: int
    channels: int

    def of(self, recipe: Recipe) -> MetaModels:
        """The same models under other settings; what the settings do not change is not built again."""
        other = replace(self, recipe=recipe)
        for name in ("branch", "controlnet"):
            before, now = (getattr(one, name).model_dump(exclude={"train"}) for one in (self.recipe, recipe))
            if before == now and name in vars(self):
                vars(other)[name] = vars(self)[name]
        return other

    @cached_property
    def branch(self) -> VisualBranch:
        """The branch that this recipe trains."""
        with torch.device("meta"):
            settings, text = self.recipe.branch, self.mllm.config.text_config
            kind = {"head": settings.head, "normalize": settings.normalize, "tune": tuned(self.recipe)}
            return VisualBranch(text, self.grid**2, self.channels, **kind)

    @cached_property
    def controlnet(self) -> FluxControlNetModel:
        """The ControlNet that this recipe trains."""
        settings = self.recipe.controlnet
        with torch.device("meta"):
            sizes = (settings.double_blocks, settings.single_blocks, self.channels)
            return latent_controlnet(self.transformer, *sizes, ratio=max(1, self.tokens_per_side() // self.grid))

    @property
    def own_encoder(self) -> bool:
        """True when the MLLM's visual encoder makes the latents."""
        return self.recipe.latents.encoder == "mllm"

    @property
    def factor(self) -> int:
        """Pixels a side of one VAE latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def tokens_per_side(self) -> int:
        """Image tokens a side of the transformer at the recipe's output size."""
        return self.recipe.images.output_size // self.factor // 2

    def image_tokens(self) -> int:
        """All of them."""
        return self.tokens_per_side() ** 2


def numbers(*modules: nn.Module, trained: bool = False) -> int:
    """Parameters of the modules, or with `trained` those that take a gradient."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad or not trained)


def build(recipe: Recipe) -> MetaModels:
    """The system of a recipe. RecipeError BF-RECIPE-004: a model whose configuration is not here, or cannot be planned;
    ArtifactError BF-ART-009: an MLLM of no known family."""
    control, target = recipe.controlnet.control, recipe.branch.target
    for key, value, usual in (("controlnet.control", control, "controlnet"), ("branch.target", target, "latents")):
        if value != usual:
            raise RecipeError(f"{key} {value} cannot be planned: its memory has not been measured",
                              fix=f"plan with --set {key}={usual}", code="BF-RECIPE-005")  # fmt: skip
    mllm_folder, diffusion = configs(recipe.models.mllm), configs(recipe.models.diffusion)
    require_known(read_json(mllm_folder / "config.json").get("model_type"))
    config = AutoConfig.from_pretrained(mllm_folder, trust_remote_code=False)
    read = {part: read_json(diffusion / part / "config.json") for part in _diffusion_parts(diffusion)}
    with torch.device("meta"):
        mllm = AutoModelForImageTextToText.from_config(config)
        parts = {
            "transformer": FluxTransformer2DModel.from_config(read["transformer"]),
            "vae": AutoencoderKL.from_config(read["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(read["text_encoder"])),
            "text_encoder_2": T5EncoderModel(T5Config.from_dict(read["text_encoder_2"])),
        }
        encoder, grid, channels = _encoder(recipe, mllm, parts["vae"])
    return MetaModels(recipe, mllm, **parts, encoder=encoder, grid=grid, channels=channels)


def configs(ref: str) -> Path:
    """The folder with a model's configuration: itself, or the copy kept beside the recipes."""
    folder = BUILTIN / ref.removeprefix("builtin:") if ref.startswith("builtin:") else Path(ref).expanduser()
    if folder.is_dir():
        return folder
    kept = recipes_folder() / "configs"
    if (kept / ref.replace("/", "--")).is_dir():
        return kept / ref.replace("/", "--")
    known = ", ".join(sorted(path.name.replace("--", "/") for path in kept.iterdir()))
    raise RecipeError(f"the configuration of {ref} is not kept here, so it cannot be planned", at=f"kept: {known}",
                      fix="fetch the model, and give its folder", code="BF-RECIPE-004")  # fmt: skip


def about(ref: str) -> dict[str, Any]:
    """Licence and gate of a model on the hub; empty for a folder."""
    file = recipes_folder() / "configs" / ref.replace("/", "--") / "about.json"
    return read_json(file) if file.is_file() else {}


def _diffusion_parts(folder: Path) -> tuple[str, ...]:
    """RecipeError for a diffusion model that is not FLUX: its memory has not been measured."""
    kind = read_json(folder / "transformer" / "config.json").get("_class_name")
    if kind != FluxTransformer2DModel.__name__:
        raise RecipeError(f"{folder.name} generates with a {kind}, which cannot be planned yet", fix="plan with a FLUX",
                          code="BF-RECIPE-004")  # fmt: skip
    return DIFFUSION_PARTS


def _encoder(recipe: Recipe, mllm: PreTrainedModel, vae: AutoencoderKL) -> tuple[nn.Module, int, int]:
    """The image encoder, patches on a side, channels."""
    name = recipe.latents.encoder
    if name == "mllm":
        grid = recipe.images.input_size // adapter_of(mllm.config).pixels_per_patch(mllm.config)
        tower = next(module for part, module in mllm.model.named_children() if part != "language_model")
        return tower, grid, mllm.config.text_config.hidden_size
    if name == "vae":
        unit = VAE_PATCH * 2 ** (len(vae.config.block_out_channels) - 1)
        return vae, recipe.images.input_size // unit, vae.config.latent_channels * VAE_PATCH**2
    import open_clip  # a second of imports that only this needs

    place = name.removeprefix("open_clip:")
    if name.startswith("builtin:"):
        place = f"local-dir:{configs(name)}"
    elif ":" not in place:
        place = place.partition("/")[0]
    tower = open_clip.create_model(place, load_weights=False, pretrained_text=False, device="meta").visual
    side, patch = (value if isinstance(value, int) else value[0] for value in (tower.image_size, tower.patch_size))
    return tower, side // patch, tower.conv1.out_channels
