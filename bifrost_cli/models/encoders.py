"""Image encoders: uint8 images to patch latents, and an identity that says which encoder made them. Latents are taken
before any pooling, unscaled. Two encoders are the same exactly when their identities are equal: weights, dtype,
preprocessing, layer and activation (the same weights with another activation silently give other latents). Legend: B
images, H W the patch grid, P = H*W patches row by row, C channels, S pixels a side."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from bifrost_cli.data.safetensors_io import weights_hash
from bifrost_cli.models.diffusion.base import vae_encode
from bifrost_cli.models.mllm.frozen_mllm import Mllm

VAE_PATCH = 4  # VAE latents on a side of a patch: 2x2 of FLUX's packed tokens, the grid of the MLLM's encoder
RESIZE = "short side to size by bicubic with antialiasing, centre crop, uint8"
_ACTIVATIONS = ("gelu", "relu", "silu", "swish")


class UnsupportedSize(ValueError):
    """An image size that an encoder cannot read; `nearest` is one that it can."""

    def __init__(self, message: str, nearest: int) -> None:
        super().__init__(message)
        self.nearest = nearest


class UnsupportedTower(ValueError):
    """An image tower without patch tokens."""


class Encoder(Protocol):
    """What extraction needs of an encoder; `identity` are the JSON values that decide the latents. A constructor raises
    `UnsupportedSize` when it cannot read images of `image_size`."""

    @property
    def identity(self) -> dict[str, Any]: ...

    image_size: int  # S
    grid: tuple[int, int]
    channels: int

    def encode(self, pixels_BSS3: np.ndarray | Tensor) -> Tensor:
        """uint8 (B, S, S, 3) -> float32 (B, P, C). ValueError: images of another shape."""
        ...


class MllmEncoder:
    """The MLLM's own visual encoder, whose latents are the tokens its decoder reads: the paper's choice (3.1)."""

    def __init__(self, mllm: Mllm, image_size: int) -> None:
        patch = mllm.pixels_per_patch
        if mllm.image_size not in (None, image_size):
            raise UnsupportedSize(f"{image_size}, but the MLLM reads {mllm.image_size} pixels", mllm.image_size)
        if mllm.image_size is None and image_size % patch:
            nearest = max(patch, image_size // patch * patch)
            raise UnsupportedSize(f"{image_size}, not a whole number of the MLLM's patches of {patch} pixels", nearest)
        self._mllm, self.image_size, self.channels = mllm, image_size, mllm.width
        self.grid, self.encode = (image_size // patch, image_size // patch), mllm.encode

    @cached_property
    def identity(self) -> dict[str, Any]:
        adapter, model = self._mllm.adapter, self._mllm.model
        facts = adapter.encoder_identity(model)
        return _identity(self, "mllm", adapter.visual(model), facts, self._mllm.image_processor)


class OpenClipEncoder:
    """The image tower of an open_clip model: patch tokens of its last block, normed as the tower norms them."""

    def __init__(self, model: Any, name: str, image_size: int) -> None:
        self._visual: Any = model.visual.eval().requires_grad_(False)
        size = self._visual.image_size
        self.name, self.image_size = name, size if isinstance(size, int) else size[0]
        if self.image_size != image_size:
            raise UnsupportedSize(f"{image_size}, but {name} reads {self.image_size} pixels", self.image_size)
        if not hasattr(self._visual, "forward_intermediates"):
            raise UnsupportedTower(f"the image tower of {name} has no patch tokens")
        # A tower that normalises after pooling, or pools by attention, has no norm that belongs to its patch tokens.
        pools_first = getattr(self._visual, "final_ln_after_pool", False)
        self._normalise = not pools_first and getattr(self._visual, "attn_pool", None) is None
        probe_1CHW = self._maps(torch.zeros(1, self.image_size, self.image_size, 3, dtype=torch.uint8))
        self.channels, self.grid = probe_1CHW.shape[1], (probe_1CHW.shape[2], probe_1CHW.shape[3])

    @cached_property
    def identity(self) -> dict[str, Any]:
        norm = "after the final norm" if self._normalise else "without a norm"
        # The classes of the tower's activation functions: weights do not tell GELU from QuickGELU.
        names = {type(module).__name__ for module in self._visual.modules()}
        names = {name for name in names if any(word in name.lower() for word in _ACTIVATIONS)}
        layer = f"last block, patch tokens {norm}, before pooling"
        facts = {"activation": "+".join(sorted(names)), "layer": layer}
        return _identity(self, self.name, self._visual, facts, self._visual)

    def encode(self, pixels_BSS3: np.ndarray | Tensor) -> Tensor:
        pixels = torch.as_tensor(pixels_BSS3)
        if pixels.shape[1:] != (self.image_size, self.image_size, 3):
            raise ValueError(f"images must be (B, {self.image_size}, {self.image_size}, 3), not {tuple(pixels.shape)}")
        return self._maps(pixels).flatten(2).transpose(1, 2).float()

    @torch.no_grad()
    def _maps(self, pixels_BSS3: Tensor) -> Tensor:
        weight, statistics = next(self._visual.parameters()), (self._visual.image_mean, self._visual.image_std)
        mean_C11, std_C11 = (torch.tensor(v, device=weight.device).view(-1, 1, 1) for v in statistics)
        pixels_BCSS = pixels_BSS3.to(weight.device).permute(0, 3, 1, 2).float() / 255
        out = self._visual.forward_intermediates(
            ((pixels_BCSS - mean_C11) / std_C11).to(weight.dtype),
            indices=1,
            normalize_intermediates=self._normalise,
            intermediates_only=True,
            output_fmt="NCHW",
        )
        return out["image_intermediates"][-1]


class VaePatchEncoder:
    """The diffusion model's VAE latents as patch latents, 4x4 in a patch: compared with CLIP latents in the paper."""

    def __init__(self, vae: Any, image_size: int) -> None:
        self._vae, self.image_size = VaeEncoder(vae, image_size), image_size
        channels, side, _ = self._vae.shape
        if side % VAE_PATCH:
            nearest = image_size // side * VAE_PATCH * max(1, side // VAE_PATCH)
            raise UnsupportedSize(f"{image_size}, whose {side} VAE latents a side do not split by {VAE_PATCH}", nearest)
        self.grid, self.channels = (side // VAE_PATCH, side // VAE_PATCH), channels * VAE_PATCH**2

    @cached_property
    def identity(self) -> dict[str, Any]:
        vae = self._vae.identity
        return {
            "name": "vae",
            **{name: vae[name] for name in ("weights", "dtype", "scaling_factor", "shift_factor", "resize")},
            "layer": f"VAE latents, {VAE_PATCH}x{VAE_PATCH} a patch, channel first",
            "image_size": self.image_size,
            "grid": list(self.grid),
            "channels": self.channels,
        }

    def encode(self, pixels_BSS3: np.ndarray | Tensor) -> Tensor:
        tiles_BcHhWw = self._vae.encode(pixels_BSS3).unflatten(3, (-1, VAE_PATCH)).unflatten(2, (-1, VAE_PATCH))
        return tiles_BcHhWw.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class VaeEncoder:
    """A diffusion model's VAE alone, for the latents that a ControlNet is trained on: shifted and scaled."""

    def __init__(self, vae: Any, image_size: int) -> None:
        unit = 2 ** len(vae.config.block_out_channels)
        if image_size % unit:
            nearest = max(unit, image_size // unit * unit)
            raise UnsupportedSize(f"{image_size}, not a multiple of {unit}", nearest)
        self._vae, self.image_size = vae.eval().requires_grad_(False), image_size
        side = 2 * image_size // unit
        self.shape: tuple[int, int, int] = (vae.config.latent_channels, side, side)

    @cached_property
    def identity(self) -> dict[str, Any]:
        config = self._vae.config
        return {
            "weights": weights_hash(self._vae.state_dict()),
            "dtype": str(self._vae.dtype).removeprefix("torch."),
            "paint_size": self.image_size,
            "shape": list(self.shape),
            "scaling_factor": config.scaling_factor,
            "shift_factor": config.shift_factor,
            "resize": RESIZE,
        }

    @torch.no_grad()
    def encode(self, pixels_BSS3: np.ndarray | Tensor) -> Tensor:
        """uint8 (B, S, S, 3) -> float32 (B, c, h, w); the mean, so deterministic."""
        return vae_encode(self._vae, torch.as_tensor(pixels_BSS3)).float()


def _identity(encoder: Encoder, name: str, module: nn.Module, facts: dict[str, Any], source: Any) -> dict[str, Any]:
    """`source` has the mean and standard deviation that pixels are normalised by."""
    return {
        "name": name,
        "weights": weights_hash(module.state_dict()),
        "dtype": str(next(module.parameters()).dtype).removeprefix("torch."),
        **facts,
        "image_size": encoder.image_size,
        "grid": list(encoder.grid),
        "channels": encoder.channels,
        "resize": RESIZE,
        "mean": list(source.image_mean),
        "std": list(source.image_std),
    }
