"""The Inception network of FID, as torch-fidelity has it: images of any size in, features and logits out.

Layers: `pool` (2048, for FID, KID and PRDC), `spatial` (7 channels of a 17x17 layer, for sFID) and `logits` (1008
classes without bias, for the Inception score). The resize to 299 pixels is TensorFlow 1's (bilinear, no antialiasing),
part of the network; another resize gives another number. Shapes: B batch, H W pixels, D features.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from bifrost_cli.data.safetensors_io import weights_hash

_STOCK = {"pool": "2048", "logits": "logits_unbiased"}
SPATIAL_CHANNELS = 7  # Nash et al. 2021, appendix B; ADM's evaluator reads the first seven of mixed_6/conv


class InceptionFeatures:
    """torch-fidelity's extractor in float32. `state` is checked strictly: RuntimeError names what does not fit."""

    layers: tuple[str, ...] = ("pool", "spatial", "logits")

    def __init__(self, state: Mapping[str, torch.Tensor], device: torch.device) -> None:
        own = io.BytesIO()  # the stock class reads a file by unpickling: it gets one that was written here
        torch.save(dict(state), own)
        own.seek(0)
        self._model = FeatureExtractorInceptionV3("inception", list(_STOCK.values()), own).to(device)
        self._spatial: list[torch.Tensor] = []
        self._model.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, out: self._spatial.append(out))
        self.device = str(device)
        self.identity: dict[str, Any] = {
            "name": "inception",
            "family": "inception-2015-12-05",
            "weights": weights_hash(dict(state)),
            "width": 2048,
            "image_size": 299,
            "resize": "bilinear as in TensorFlow 1, no antialiasing",
        }

    def prepare(self, rgb_HWc: np.ndarray) -> np.ndarray:
        """The image as it is: the network resizes."""
        return rgb_HWc

    @torch.inference_mode()
    def outputs(self, pixels_BHWc: np.ndarray, layers: Sequence[str]) -> dict[str, np.ndarray]:
        """Images uint8 (B, H, W, 3) to float32 (B, D) for each of `layers`; the spatial layer row by row, NHWC."""
        pixels_BcHW = torch.from_numpy(np.array(pixels_BHWc)).permute(0, 3, 1, 2).to(self.device)
        self._spatial.clear()
        found = dict(zip(_STOCK, self._model(pixels_BcHW), strict=True))
        spatial_BHWc = self._spatial[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1)
        found["spatial"] = spatial_BHWc.flatten(1)
        return {layer: found[layer].float().cpu().numpy() for layer in layers}
