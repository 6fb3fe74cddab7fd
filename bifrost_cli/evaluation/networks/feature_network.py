"""Feature networks for distances between sets of images: images in, one vector an image out.

Comes in: a loaded network and images (H, W, 3) uint8. Goes out: float32 (N, D) for each layer asked for. The resize
rule belongs to the network: it is part of its identity. Does not know where weights or images lie.

Shapes: B batch, N images, H W pixels, D feature width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from bifrost_cli.data.images import square
from bifrost_cli.data.safetensors_io import weights_hash

BATCH = 32  # fixed: another batch size gives other last bits


class FeatureNetwork(Protocol):
    """`identity` names the network, its weights and its resize rule; `layers` are what `outputs` can be asked for."""

    identity: dict[str, Any]
    layers: tuple[str, ...]
    device: str

    def prepare(self, rgb_HWc: np.ndarray) -> np.ndarray:
        """An image uint8 (H, W, 3) as the network reads it."""

    def outputs(self, pixels_BHWc: np.ndarray, layers: Sequence[str]) -> dict[str, np.ndarray]:
        """Prepared images of one size (B, H, W, 3) to float32 (B, D) by layer."""


class ClipFeatures:
    """The image tower of an open_clip model, in float32: its projected embedding, not normalised."""

    layers = ("pool",)

    def __init__(self, model: torch.nn.Module, name: str) -> None:
        self._model = model.eval().requires_grad_(False).float()
        visual = model.visual
        size = visual.image_size
        self.image_size: int = size if isinstance(size, int) else size[0]
        device = next(model.parameters()).device
        self.device = str(device)
        self._mean_C11 = torch.tensor(visual.image_mean, device=device).view(-1, 1, 1)
        self._std_C11 = torch.tensor(visual.image_std, device=device).view(-1, 1, 1)
        self.identity: dict[str, Any] = {
            "name": name,
            "family": "open_clip",
            "weights": weights_hash(visual.state_dict()),
            "layer": "image embedding, projected, not normalised",
            "width": self._width(),
            "image_size": self.image_size,
            "resize": "short side by bicubic with antialiasing, centre crop, uint8",
            "activation": _activation(visual),
            "mean": list(visual.image_mean),
            "std": list(visual.image_std),
        }

    def _width(self) -> int:
        return self.features(np.zeros((1, self.image_size, self.image_size, 3), np.uint8)).shape[1]

    def prepare(self, rgb_HWc: np.ndarray) -> np.ndarray:
        """The central square at the tower's size."""
        return square(rgb_HWc, self.image_size)

    def outputs(self, pixels_BHWc: np.ndarray, layers: Sequence[str]) -> dict[str, np.ndarray]:
        """As the protocol says; the only layer is `pool`."""
        return {layer: {"pool": self.features(pixels_BHWc)}[layer] for layer in layers}

    @torch.inference_mode()
    def features(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        """Images uint8 (B, S, S, 3), S = `image_size`, to float32 (B, D). ValueError on another shape or type."""
        wanted = (self.image_size, self.image_size, 3)
        if pixels_BHWC.dtype != np.uint8 or pixels_BHWC.shape[1:] != wanted:
            raise ValueError(f"pictures must be uint8 (B, {', '.join(map(str, wanted))}), not {pixels_BHWC.shape}")
        pixels_BCHW = torch.from_numpy(np.ascontiguousarray(pixels_BHWC)).permute(0, 3, 1, 2)
        pixels_BCHW = pixels_BCHW.to(self._mean_C11.device, torch.float32).div(255)
        embedding_BD = self._model.encode_image((pixels_BCHW - self._mean_C11) / self._std_C11)
        return embedding_BD.float().cpu().numpy()


def _activation(visual: torch.nn.Module) -> str:
    """Belongs to the identity: the same weights with QuickGELU and with GELU are two networks."""
    names = {type(module).__name__ for module in visual.modules()}
    return "QuickGELU" if "QuickGELU" in names else "GELU"


def feature_batches(
    network: FeatureNetwork, images: Iterable[np.ndarray], layers: Sequence[str]
) -> Iterator[dict[str, np.ndarray]]:
    """Features {layer: (b, D)} of prepared images, in order, at most `BATCH` at a time, one size a batch.

    A batch is filled up with empty images, so that an image's features do not depend on what stands beside it.
    """
    batch: list[np.ndarray] = []
    for image in images:
        if batch and (len(batch) == BATCH or image.shape != batch[0].shape):
            yield _filled(network, batch, layers)
            batch = []
        batch.append(image)
    if batch:
        yield _filled(network, batch, layers)


def _filled(network: FeatureNetwork, batch: list[np.ndarray], layers: Sequence[str]) -> dict[str, np.ndarray]:
    missing = [np.zeros_like(batch[0])] * (BATCH - len(batch))
    found = network.outputs(np.stack(batch + missing), layers)
    return {layer: values_BD[: len(batch)] for layer, values_BD in found.items()}
