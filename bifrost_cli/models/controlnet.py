"""The latent ControlNet: a stock ControlNet, FLUX's or SD3's, whose control embedder reads patch latents.

In: patch latents (B, P, C) on a square grid. Out: residuals for the painter's blocks, through the stock forward.
Nothing is forked: one module, the control embedder, is replaced. Does not know how latents are made, nor where weights
lie.
Legend: B images, P patches, C latent channels, D the painter's width, H W patch grid, N = 4 P image tokens.
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

# A painter's family -> the stock class, and the module of it that is replaced.
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


class PatchLatentEmbedder(nn.Module):
    """Patch latents -> one vector for each image token, on a grid twice as fine (the paper's x2 upsampler).

    `proj` starts at zero, so that an untrained ControlNet changes nothing; BatchNorm uses its running statistics in
    eval mode.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.upconv = nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.proj = nn.Linear(channels, width)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def upsample(self, latents_BPC: torch.Tensor) -> torch.Tensor:
        """(B, H*W, C) row-major -> (B, 2H*2W, C) row-major. Raises ValueError when P is no square."""
        side = math.isqrt(latents_BPC.shape[1])
        if side * side != latents_BPC.shape[1]:
            raise ValueError(f"{latents_BPC.shape[1]} patches are no square grid")
        grid_BCHW = latents_BPC.mT.unflatten(2, (side, side))
        fine_BCHW = torch.relu(self.bn1(self.upconv(grid_BCHW)))
        fine_BCHW = self.bn2(self.conv(fine_BCHW))
        skip_BCHW = nn.functional.interpolate(grid_BCHW, scale_factor=2, mode="nearest")
        return torch.relu(fine_BCHW + skip_BCHW).flatten(2).mT

    def forward(self, latents_BPC: torch.Tensor) -> torch.Tensor:
        """(B, P, C) -> (B, 4P, D)."""
        return self.proj(self.upsample(latents_BPC))


def latent_controlnet(
    transformer: FluxTransformer2DModel, double_blocks: int, single_blocks: int, channels: int
) -> FluxControlNetModel:
    """A new ControlNet for FLUX: its first blocks copied, the outputs and the control embedder at zero.

    Source: section 3 of the paper (4 double, 1 single block on FLUX.1-dev). float32, on the transformer's device.
    RecipeError when the transformer would not hear as many blocks.
    """
    _require_heard("double_blocks", double_blocks, _heard(double_blocks, len(transformer.transformer_blocks)))
    _require_heard("single_blocks", single_blocks, _heard(single_blocks, len(transformer.single_transformer_blocks)))
    shape = {"num_layers": double_blocks, "num_single_layers": single_blocks}
    heads = {key: transformer.config[key] for key in ("attention_head_dim", "num_attention_heads")}
    controlnet = FluxControlNetModel.from_transformer(transformer, **shape, **heads)
    return _with_embedder(controlnet, "FLUX", channels).to(transformer.device)


def latent_sd3_controlnet(
    transformer: SD3Transformer2DModel, double_blocks: int, single_blocks: int, channels: int
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
    _require_heard("double_blocks", double_blocks, len(transformer.transformer_blocks) // 2)
    source = copy.copy(transformer)
    source.register_to_config(force_zeros_for_pooled_projection=False)  # its own config: stock writes into the source's
    controlnet = SD3ControlNetModel.from_transformer(source, double_blocks, num_extra_conditioning_channels=0)
    return _with_embedder(controlnet, "SD3", channels).to(transformer.device)


def controlnet_config(controlnet: nn.Module) -> dict[str, Any]:
    """What `controlnet_from_config` needs to build the same empty model, as plain JSON values."""
    family, (kind, name) = next((key, pair) for key, pair in FAMILIES.items() if isinstance(controlnet, pair[0]))
    # `from_transformer` also keeps keys of the transformer's own config, which a ControlNet does not take.
    known = inspect.signature(kind.__init__).parameters
    stock = {key: value for key, value in controlnet.config.items() if key in known}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in stock.items()}
    told = {} if family == "FLUX" else {"family": family}  # FLUX was once the only one, and is not said
    return {**told, **plain, "control_channels": controlnet.get_submodule(name).proj.in_features}


def controlnet_from_config(config: dict[str, Any]) -> nn.Module:
    """An empty latent ControlNet in eval mode; `config` as `controlnet_config` gives it. Load its weights next."""
    family = config_family(config)
    stock = {key: value for key, value in config.items() if key not in ("control_channels", "family")}
    return _with_embedder(FAMILIES[family][0](**stock), family, config["control_channels"]).eval()


def config_family(config: dict[str, Any]) -> str:
    """The painter's family that the ControlNet of this config is for."""
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


def _with_embedder(controlnet: nn.Module, family: str, channels: int) -> nn.Module:
    controlnet.set_submodule(FAMILIES[family][1], PatchLatentEmbedder(channels, controlnet.inner_dim))
    return controlnet


def _heard(blocks: int, there: int) -> int:
    """How many residuals FLUX adds somewhere: one to each run of ceil(there / blocks) of its own blocks."""
    return math.ceil(there / math.ceil(there / blocks)) if blocks else 0


def _require_heard(key: str, blocks: int, heard: int) -> None:
    """Stock adds what it can, and fills blocks that it cannot copy with random numbers; it says nothing of either."""
    if blocks > heard:
        raise RecipeError(f"controlnet.{key} is {blocks}, but the painter would read the residuals of {heard}",
                          fix=f"--set controlnet.{key}={heard}", code="BF-RECIPE-005")  # fmt: skip
