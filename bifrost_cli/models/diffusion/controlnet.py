"""The latent ControlNet: the stock ControlNet of FLUX or SD3, with a control embedder that reads patch latents. Legend:
B images, P patches, C latent channels, D the transformer's width, H W patch grid, r image tokens on a side of each
patch (2 in the paper), N = r r P image tokens, T text tokens."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from abc import ABC, abstractmethod
from typing import Any

from diffusers import FluxControlNetModel, SD3ControlNetModel
from torch import Tensor, nn, relu

from bifrost_cli.runtime.plugins import Plugins

# Family of diffusion models -> the stock class, and its module that is replaced.
FAMILIES: dict[str, tuple[type[Any], str]] = {
    "FLUX": (FluxControlNetModel, "controlnet_x_embedder"),
    "SD3": (SD3ControlNetModel, "pos_embed_input"),
}

# Stock FluxControlNetModel (diffusers 0.42) itself imports the rotary embedding from its deprecated place.
warnings.filterwarnings("ignore", message="`FluxPosEmbed` is deprecated", category=FutureWarning)


class UnsupportedControl(ValueError):
    """A ControlNet or conditioner that the diffusion model cannot have: its setting `key` (`control`, `double_blocks`
    or `single_blocks`) is wrong, and `value` the nearest that works."""

    def __init__(self, message: str, key: str, value: str | int) -> None:
        super().__init__(message)
        self.key, self.value = key, value


class Conditioner(nn.Module, ABC):
    """A way for patch latents to condition FLUX that is not a ControlNet, for comparison."""

    config: dict[str, Any]

    @classmethod
    @abstractmethod
    def for_transformer(cls, transformer: Any, channels: int, patches: int, ratio: int) -> Conditioner:
        """An untrained one for a FLUX transformer; `ratio` as for `DiffusionModel.new_controlnet`."""

    @abstractmethod
    def condition(self, sequence_BTD: Tensor, latents_BPC: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        """The text sequence that the transformer reads, and what is added to its embedded input (B, N, D) or None."""


# `controlnet.control` -> class, imported when an artifact or a recipe names it: they exist only to be compared.
CONDITIONERS = Plugins(
    "bifrost.conditioners",
    {
        "cross_attention": "bifrost_cli.ablations.conditioners:TokenConditioner",
        "concat": "bifrost_cli.ablations.conditioners:ConcatConditioner",
    },
    base=Conditioner,
)


class PatchLatentEmbedder(nn.Module):
    """Upsamples patch latents r times and projects them to the transformer's width (r = 2: the paper's upsampler);
    `proj` starts at zero, so that an untrained ControlNet changes nothing."""

    def __init__(self, channels: int, width: int, ratio: int = 2) -> None:
        super().__init__()
        self.ratio = ratio
        self.upconv = nn.ConvTranspose2d(channels, channels, kernel_size=ratio, stride=ratio)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.proj = nn.Linear(channels, width)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def upsample(self, latents_BPC: Tensor) -> Tensor:
        """(B, H*W, C) row-major -> (B, rH*rW, C) row-major. ValueError: P is not a square number."""
        side = math.isqrt(latents_BPC.shape[1])
        if side * side != latents_BPC.shape[1]:
            raise ValueError(f"{latents_BPC.shape[1]} patches are not a square grid")
        grid_BCHW = latents_BPC.mT.unflatten(2, (side, side))
        fine_BCHW = relu(self.bn1(self.upconv(grid_BCHW)))
        fine_BCHW = self.bn2(self.conv(fine_BCHW))
        skip_BCHW = nn.functional.interpolate(grid_BCHW, scale_factor=self.ratio, mode="nearest")
        return relu(fine_BCHW + skip_BCHW).flatten(2).mT

    def forward(self, latents_BPC: Tensor) -> Tensor:
        """(B, P, C) -> (B, N, D)."""
        return self.proj(self.upsample(latents_BPC))


def latent_controlnet(transformer: Any, double_blocks: int, single_blocks: int, channels: int, ratio: int = 2) -> Any:
    """A new ControlNet for FLUX: copies of its first blocks (4 double and 1 single of FLUX.1-dev in the paper, section
    3); outputs and control embedder at zero, in float32. UnsupportedControl: it would not read so many residuals."""
    for key, blocks, available in (
        ("double_blocks", double_blocks, len(transformer.transformer_blocks)),
        ("single_blocks", single_blocks, len(transformer.single_transformer_blocks)),
    ):
        # FLUX adds one residual to each run of ceil(available / blocks) of its blocks
        _require_read(key, blocks, math.ceil(available / math.ceil(available / blocks)) if blocks else 0)
    shape = {"num_layers": double_blocks, "num_single_layers": single_blocks}
    heads = {key: transformer.config[key] for key in ("attention_head_dim", "num_attention_heads")}
    controlnet = FluxControlNetModel.from_transformer(transformer, **shape, **heads)
    return _with_embedder(controlnet, "FLUX", channels, ratio).to(transformer.device)


def latent_sd3_controlnet(
    transformer: Any, double_blocks: int, single_blocks: int, channels: int, ratio: int = 2
) -> Any:
    """`latent_controlnet` for SD3, which has no single blocks and whose last block takes no residual. It reads the
    pooled text, as in diffusers' training of it; published ControlNets that read zeros are not supported."""
    if single_blocks:
        raise UnsupportedControl(f"{single_blocks}, but SD3 has no single blocks", "single_blocks", 0)
    _require_read("double_blocks", double_blocks, len(transformer.transformer_blocks) // 2)
    source = copy.copy(transformer)
    source.register_to_config(force_zeros_for_pooled_projection=False)  # its own config: stock writes into the source's
    controlnet = SD3ControlNetModel.from_transformer(source, double_blocks, num_extra_conditioning_channels=0)
    return _with_embedder(controlnet, "SD3", channels, ratio).to(transformer.device)


def controlnet_config(controlnet: Any) -> dict[str, Any]:
    """What `controlnet_from_config` needs to build the same empty model, as plain JSON values."""
    if isinstance(controlnet, Conditioner):
        return controlnet.config
    family, (kind, name) = next((key, pair) for key, pair in FAMILIES.items() if isinstance(controlnet, pair[0]))
    # `from_transformer` also keeps keys of the transformer's config, which a ControlNet does not take.
    known = inspect.signature(kind.__init__).parameters
    stock = {key: value for key, value in controlnet.config.items() if key in known}
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in stock.items()}
    embedder = controlnet.get_submodule(name)
    # Artifacts that are older than SD3 and other ratios do not name them: FLUX and 2 are left out.
    of_family = {} if family == "FLUX" else {"family": family}
    ratio = {} if embedder.ratio == 2 else {"control_ratio": embedder.ratio}
    return {**of_family, **config, "control_channels": embedder.proj.in_features, **ratio}


def controlnet_from_config(config: dict[str, Any]) -> nn.Module:
    """An empty ControlNet or conditioner in eval mode. UsageError: a conditioner of a plug-in that is not installed."""
    if "control" in config:
        kind = CONDITIONERS[config["control"]]
        return kind(**{key: value for key, value in config.items() if key != "control"}).eval()
    family, ours = config_family(config), ("control_channels", "control_ratio", "family")
    stock = {key: value for key, value in config.items() if key not in ours}
    sizes = (config["control_channels"], config.get("control_ratio", 2))
    return _with_embedder(FAMILIES[family][0](**stock), family, *sizes).eval()


def image_tokens(controlnet: nn.Module, patches: int) -> int | None:
    """The number N of image tokens that a control of so many patches is made for; None: any number."""
    ratios = [module.ratio for module in controlnet.modules() if isinstance(module, PatchLatentEmbedder)]
    return ratios[0] ** 2 * patches if ratios else None


def config_family(config: dict[str, Any]) -> str:
    """The family of diffusion models that the ControlNet of this config is for."""
    return config.get("family", "FLUX")


def _with_embedder(controlnet: Any, family: str, channels: int, ratio: int) -> Any:
    controlnet.set_submodule(FAMILIES[family][1], PatchLatentEmbedder(channels, controlnet.inner_dim, ratio))
    return controlnet


def _require_read(key: str, blocks: int, read: int) -> None:
    """Stock adds the residuals it can, and fills blocks it cannot copy with random numbers, silently in both cases."""
    if blocks > read:
        raise UnsupportedControl(f"{blocks}, but the diffusion model would read the residuals of {read}", key, read)
