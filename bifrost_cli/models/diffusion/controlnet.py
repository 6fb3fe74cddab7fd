"""The latent ControlNet: a stock ControlNet, FLUX's or SD3's, whose control embedder reads patch latents.

In: patch latents (B, P, C) on a square grid. Out: residuals for the diffusion model's blocks, through the stock forward.
Nothing is forked: one module, the control embedder, is replaced. Does not know how latents are made, nor where weights
lie.
Legend: B images, P patches, C latent channels, D the diffusion model's width, H W patch grid, r image tokens a side for each
patch (2 in the paper), N = r r P image tokens.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel, SD3ControlNetModel, SD3Transformer2DModel
from torch import nn

from bifrost_cli.errors import RecipeError
from bifrost_cli.models.diffusion.conditioners import CONTROLS
from bifrost_cli.models.diffusion.latent_embedder import PatchLatentEmbedder

# A diffusion model's family -> the stock class, and the module of it that is replaced.
FAMILIES = {
    "FLUX": (FluxControlNetModel, "controlnet_x_embedder"),
    "SD3": (SD3ControlNetModel, "pos_embed_input"),
}

# Published name -> ours, as prefixes; every other name of `flux_controlnet/` is diffusers' own and stays.
PUBLISHED_NAMES = {
    "up_sampling_block.": "controlnet_x_embedder.",
    "controlnet_x_embedder.": "controlnet_x_embedder.proj.",
}


# Stock FluxControlNetModel (diffusers 0.42) itself imports the rotary embedding from its deprecated place.
warnings.filterwarnings("ignore", message="`FluxPosEmbed` is deprecated", category=FutureWarning)


def latent_controlnet(
    transformer: FluxTransformer2DModel, double_blocks: int, single_blocks: int, channels: int, ratio: int = 2
) -> FluxControlNetModel:
    """A new ControlNet for FLUX: its first blocks copied, the outputs and the control embedder at zero.

    Source: section 3 of the paper (4 double, 1 single block on FLUX.1-dev). float32, on the transformer's device.
    RecipeError when the transformer would not hear as many blocks.
    """
    _require_conditioned(
        "double_blocks", double_blocks, _conditioned(double_blocks, len(transformer.transformer_blocks))
    )
    _require_conditioned(
        "single_blocks", single_blocks, _conditioned(single_blocks, len(transformer.single_transformer_blocks))
    )
    shape = {"num_layers": double_blocks, "num_single_layers": single_blocks}
    heads = {key: transformer.config[key] for key in ("attention_head_dim", "num_attention_heads")}
    controlnet = FluxControlNetModel.from_transformer(transformer, **shape, **heads)
    return _with_embedder(controlnet, "FLUX", channels, ratio).to(transformer.device)


def latent_sd3_controlnet(
    transformer: SD3Transformer2DModel, double_blocks: int, single_blocks: int, channels: int, ratio: int = 2
) -> SD3ControlNetModel:
    """`latent_controlnet` for SD3, whose blocks are all double; its last one takes no residual.

    It reads the pooled text, as in diffusers' own training of it; the published ones that read zeros are not ours.
    """
    if single_blocks:
        raise RecipeError(
            f"controlnet.single_blocks is {single_blocks}, but SD3 has no single blocks",
            fix="--set controlnet.single_blocks=0",
            code="BF-RECIPE-005",
        )
    _require_conditioned("double_blocks", double_blocks, len(transformer.transformer_blocks) // 2)
    source = copy.copy(transformer)
    source.register_to_config(force_zeros_for_pooled_projection=False)  # its own config: stock writes into the source's
    controlnet = SD3ControlNetModel.from_transformer(source, double_blocks, num_extra_conditioning_channels=0)
    return _with_embedder(controlnet, "SD3", channels, ratio).to(transformer.device)


def controlnet_config(controlnet: nn.Module) -> dict[str, Any]:
    """What `controlnet_from_config` needs to build the same empty model, as plain JSON values."""
    if isinstance(controlnet, tuple(CONTROLS.values())):
        return controlnet.config
    family, (kind, name) = next((key, pair) for key, pair in FAMILIES.items() if isinstance(controlnet, pair[0]))
    # `from_transformer` also keeps keys of the transformer's own config, which a ControlNet does not take.
    known = inspect.signature(kind.__init__).parameters
    stock = {key: value for key, value in controlnet.config.items() if key in known}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in stock.items()}
    told = {} if family == "FLUX" else {"family": family}  # FLUX was once the only one, and is not said
    embedder = controlnet.get_submodule(name)
    finer = {} if embedder.ratio == 2 else {"control_ratio": embedder.ratio}  # 2 was once the only one
    return {**told, **plain, "control_channels": embedder.proj.in_features, **finer}


def controlnet_from_config(config: dict[str, Any]) -> nn.Module:
    """An empty latent ControlNet in eval mode; `config` as `controlnet_config` gives it. Load its weights next."""
    if "control" in config:
        kind = CONTROLS[config["control"]]
        return kind(**{key: value for key, value in config.items() if key != "control"}).eval()
    family, ours = config_family(config), ("control_channels", "control_ratio", "family")
    stock = {key: value for key, value in config.items() if key not in ours}
    sizes = (config["control_channels"], config.get("control_ratio", 2))
    return _with_embedder(FAMILIES[family][0](**stock), family, *sizes).eval()


def image_tokens(controlnet: nn.Module, patches: int) -> int | None:
    """The image tokens N that a control of so many patches is for; None: any number."""
    ratios = [module.ratio for module in controlnet.modules() if isinstance(module, PatchLatentEmbedder)]
    return ratios[0] ** 2 * patches if ratios else None


def config_family(config: dict[str, Any]) -> str:
    """The diffusion model's family that the ControlNet of this config is for."""
    return config.get("family", "FLUX")


def config_from_published(config: dict[str, Any], channels: int) -> dict[str, Any]:
    """A `flux_controlnet/config.json` as `controlnet_from_config` takes it; what the stock class does not know is left
    out. `channels`: of the patch latents, which the published code does not write down."""
    known = inspect.signature(FluxControlNetModel.__init__).parameters
    return {**{key: value for key, value in config.items() if key in known}, "control_channels": channels}


def from_published(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The published `flux_controlnet/` state dict under our names (same tensors, nothing dropped)."""
    return {_renamed(name, PUBLISHED_NAMES.items()): tensor for name, tensor in weights.items()}


def to_published(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `from_published`."""
    # The other way round: our name of the projection begins with our name of the upsampler.
    names = [(ours, published) for published, ours in reversed(PUBLISHED_NAMES.items())]
    return {_renamed(name, names): tensor for name, tensor in weights.items()}


def _renamed(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _with_embedder(controlnet: nn.Module, family: str, channels: int, ratio: int) -> nn.Module:
    controlnet.set_submodule(FAMILIES[family][1], PatchLatentEmbedder(channels, controlnet.inner_dim, ratio))
    return controlnet


def _conditioned(blocks: int, there: int) -> int:
    """How many residuals FLUX adds somewhere: one to each run of ceil(there / blocks) of its own blocks."""
    return math.ceil(there / math.ceil(there / blocks)) if blocks else 0


def _require_conditioned(key: str, blocks: int, heard: int) -> None:
    """Stock adds what it can, and fills blocks that it cannot copy with random numbers; it says nothing of either."""
    if blocks > heard:
        raise RecipeError(f"controlnet.{key} is {blocks}, but the diffusion model would read the residuals of {heard}",
                          fix=f"--set controlnet.{key}={heard}", code="BF-RECIPE-005")  # fmt: skip
