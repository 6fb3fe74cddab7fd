"""DINOv2 as a feature network: images in, the class token out.

Comes in: a stock transformers Dinov2Model and uint8 images. Goes out: float32 (B, D). The rule is dgm-eval's, so that
a ViT-L/14 gives the FD-DINOv2 of papers: Pillow's bicubic to 224 x 224, ImageNet's mean and deviation. Knows no path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from bifrost_cli.data.safetensors_io import weights_hash

SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DinoFeatures:
    """`name` is what the identity calls the model."""

    layers = ("pool",)

    def __init__(self, model: torch.nn.Module, name: str) -> None:
        self._model = model.eval().requires_grad_(False).float()
        self.device = str(next(model.parameters()).device)
        self.identity: dict[str, Any] = {
            "name": name,
            "family": "dinov2",
            "weights": weights_hash(model.state_dict()),
            "layer": "class token after the final norm",
            "width": model.config.hidden_size,
            "image_size": SIZE,
            "resize": "Pillow bicubic to a square, uint8",
        }

    def prepare(self, rgb_HWc: np.ndarray) -> np.ndarray:
        """Squashed to 224 x 224 by Pillow's antialiasing bicubic."""
        return np.asarray(Image.fromarray(rgb_HWc).resize((SIZE, SIZE), Image.Resampling.BICUBIC))

    @torch.inference_mode()
    def outputs(self, pixels_BHWc: np.ndarray, layers: Sequence[str]) -> dict[str, np.ndarray]:
        """Prepared images uint8 (B, 224, 224, 3) to {"pool": float32 (B, D)}."""
        pixels_BHWc = torch.from_numpy(np.array(pixels_BHWc)).to(self.device).float().div(255)
        mean_c, std_c = (torch.tensor(values, device=pixels_BHWc.device) for values in (MEAN, STD))
        pixels_BcHW = ((pixels_BHWc - mean_c) / std_c).permute(0, 3, 1, 2)
        token_BD = self._model(pixel_values=pixels_BcHW).last_hidden_state[:, 0]
        return {layer: {"pool": token_BD}[layer].float().cpu().numpy() for layer in layers}
