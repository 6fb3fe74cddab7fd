"""Feature networks for the Frechet distance: pictures in, one vector a picture out.

Comes in: a loaded open_clip model and pictures (B, H, W, 3) uint8 of exactly its size. Goes out: float32 (B, D), the
image tower's projected embedding, not normalised. Does not know where weights or pictures lie, nor who cropped them.

Shapes: B batch, N pictures, H W pixels, D feature width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch

from bifrost_cli.data.weights import weights_hash

BATCH = 32  # fixed: another batch size gives other last bits


class FeatureNetwork(Protocol):
    """What the Frechet distance needs of a network; `identity` names it and its weights."""

    identity: dict[str, Any]
    image_size: int
    device: str

    def features(self, pixels_BHWC: np.ndarray) -> np.ndarray: ...


class ClipFeatures:
    """The image tower of an open_clip model, in float32."""

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

    @torch.inference_mode()
    def features(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        """Pictures uint8 (B, S, S, 3), S = `image_size`, to float32 (B, D). ValueError on another shape or type."""
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


def feature_batches(network: FeatureNetwork, pictures: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Features (b, D) of pictures (S, S, 3), in order, `BATCH` at a time.

    The last batch is filled up with empty pictures, so that a picture's features do not depend on how many follow it.
    """
    pictures = iter(pictures)
    while batch := list(islice(pictures, BATCH)):
        missing = [np.zeros_like(batch[0])] * (BATCH - len(batch))
        yield network.features(np.stack(batch + missing))[: len(batch)]
