"""Feature networks: images in, one vector for each image out; open_clip models, DINOv2, and CLIP's text side.

The resize rule belongs to a network: it is part of its identity. Where weights lie is not known here.
Shapes: B batch, N images, H W pixels, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from bifrost_cli.data.images import square
from bifrost_cli.data.safetensors_io import weights_hash

BATCH = 32  # fixed: another batch size gives other last bits
DINO_SIZE, IMAGENET_MEAN, IMAGENET_STD = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HESSEL_PREFIX = "A photo depicts "  # Hessel et al. 2021
_LONGER = 8  # a text is tokenized at this many context lengths to see whether it is cut


class FeatureNetwork(Protocol):
    """`identity` names the network, its weights and its resize rule; `layers` are what `outputs` can be asked for."""

    identity: dict[str, Any]
    layers: tuple[str, ...]
    device: str

    def prepare(self, rgb_HWc: np.ndarray) -> np.ndarray:
        """An image uint8 (H, W, 3) as the network reads it."""

    def outputs(self, pixels_BHWc: np.ndarray, layers: Sequence[str]) -> dict[str, np.ndarray]:
        """Prepared images of one size, uint8 (B, H, W, 3), to float32 (B, D) by layer."""


class ClipFeatures:
    """The image tower of an open_clip model, in float32: its projected embedding, not normalised."""

    layers: tuple[str, ...] = ("pool",)

    def __init__(self, model: torch.nn.Module, name: str) -> None:
        self._model: Any = model.eval().requires_grad_(False).float()
        visual: Any = model.visual
        size = visual.image_size
        self.image_size: int = size if isinstance(size, int) else size[0]
        device = next(model.parameters()).device
        self.device = str(device)
        self._mean_C11 = torch.tensor(visual.image_mean, device=device).view(-1, 1, 1)
        self._std_C11 = torch.tensor(visual.image_std, device=device).view(-1, 1, 1)
        width = self.features(np.zeros((1, self.image_size, self.image_size, 3), np.uint8)).shape[1]
        kinds = {type(module).__name__ for module in visual.modules()}  # the same weights with QuickGELU are another
        self.identity: dict[str, Any] = {
            "name": name,
            "family": "open_clip",
            "weights": weights_hash(visual.state_dict()),
            "layer": "image embedding, projected, not normalised",
            "width": width,
            "image_size": self.image_size,
            "resize": "short side by bicubic with antialiasing, centre crop, uint8",
            "activation": "QuickGELU" if "QuickGELU" in kinds else "GELU",
            "mean": list(visual.image_mean),
            "std": list(visual.image_std),
        }

    def prepare(self, rgb_HWc: np.ndarray) -> np.ndarray:
        """The central square at the tower's size."""
        return square(rgb_HWc, self.image_size)

    def outputs(self, pixels_BHWc: np.ndarray, layers: Sequence[str]) -> dict[str, np.ndarray]:
        """As the protocol says; the only layer is `pool`."""
        return {layer: {"pool": self.features(pixels_BHWc)}[layer] for layer in layers}

    @torch.inference_mode()
    def features(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        """Images uint8 (B, S, S, 3), S = `image_size`, to float32 (B, D). ValueError on another shape or type."""
        shape = (self.image_size, self.image_size, 3)
        if pixels_BHWC.dtype != np.uint8 or pixels_BHWC.shape[1:] != shape:
            raise ValueError(f"images must be uint8 (B, {', '.join(map(str, shape))}), not {pixels_BHWC.shape}")
        pixels_BCHW = torch.from_numpy(np.ascontiguousarray(pixels_BHWC)).permute(0, 3, 1, 2)
        pixels_BCHW = pixels_BCHW.to(self._mean_C11.device, torch.float32).div(255)
        embedding_BD = self._model.encode_image((pixels_BCHW - self._mean_C11) / self._std_C11)
        return embedding_BD.float().cpu().numpy()


class ClipScorer:
    """Cosines between a CLIP's embeddings of images and texts; `tokenize(texts, context_length)` is open_clip's own."""

    def __init__(self, model: torch.nn.Module, tokenize: Callable[..., torch.Tensor], name: str) -> None:
        self._model: Any = model
        self._features, self._tokenize = ClipFeatures(model, name), tokenize
        self.identity, self.prepare = self._features.identity, self._features.prepare
        self.images = self._features.features

    def cosines(self, pixels_BHWc: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """Prepared images uint8 (B, S, S, 3) and as many texts -> cosines (B,) float64."""
        image_BD, text_BD = self.images(pixels_BHWc), self.texts(texts)
        norms_B = np.linalg.norm(image_BD, axis=1) * np.linalg.norm(text_BD, axis=1)
        return (image_BD * text_BD).sum(axis=1) / norms_B

    def cut(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than the model reads (77 tokens for most)."""
        length = self._tokenize(["a"]).shape[1]
        ids_BT = torch.cat([self._tokenize([text], _LONGER * length) for text in texts])
        return int((ids_BT[:, length:] != ids_BT[:, -1:]).any(dim=1).sum())

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings (B, D) float64 of texts, not normalised."""
        ids_BT = self._tokenize(list(texts)).to(self._features.device)
        return self._model.encode_text(ids_BT).double().cpu().numpy()


class DinoFeatures:
    """The class token of a transformers Dinov2Model by dgm-eval's rule: with ViT-L/14 the FD-DINOv2 of papers."""

    layers: tuple[str, ...] = ("pool",)

    def __init__(self, model: torch.nn.Module, name: str) -> None:
        self._model: Any = model.eval().requires_grad_(False).float()
        config: Any = model.config
        self.device = str(next(model.parameters()).device)
        self.identity: dict[str, Any] = {
            "name": name,
            "family": "dinov2",
            "weights": weights_hash(model.state_dict()),
            "layer": "class token after the final norm",
            "width": config.hidden_size,
            "image_size": DINO_SIZE,
            "resize": "Pillow bicubic to a square, uint8",
        }

    def prepare(self, rgb_HWc: np.ndarray) -> np.ndarray:
        """Squashed to 224 x 224 by Pillow's antialiasing bicubic."""
        return np.asarray(Image.fromarray(rgb_HWc).resize((DINO_SIZE, DINO_SIZE), Image.Resampling.BICUBIC))

    @torch.inference_mode()
    def outputs(self, pixels_BHWc: np.ndarray, layers: Sequence[str]) -> dict[str, np.ndarray]:
        """As the protocol says; the only layer is `pool`."""
        scaled_BHWc = torch.from_numpy(np.array(pixels_BHWc)).to(self.device).float().div(255)
        mean_c, std_c = (torch.tensor(values, device=scaled_BHWc.device) for values in (IMAGENET_MEAN, IMAGENET_STD))
        pixels_BcHW = ((scaled_BHWc - mean_c) / std_c).permute(0, 3, 1, 2)
        token_BD = self._model(pixel_values=pixels_BcHW).last_hidden_state[:, 0]
        return {layer: {"pool": token_BD}[layer].float().cpu().numpy() for layer in layers}


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
    outputs = network.outputs(np.stack(batch + missing), layers)
    return {layer: values_BD[: len(batch)] for layer, values_BD in outputs.items()}
