"""LPIPS: the perceptual distance of two images (Zhang et al. 2018), by the `lpips` package: version 0.1, AlexNet."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import lpips
import numpy as np
import torch

from bifrost_cli.data.safetensors_io import weights_hash


class Lpips:
    """`trunk`: a state dict of torchvision's AlexNet; what is not of its features is ignored. KeyError or RuntimeError
    names what is missing or does not fit."""

    def __init__(self, trunk: Mapping[str, torch.Tensor], device: torch.device) -> None:
        with warnings.catch_warnings():  # the package still names torchvision's old arguments
            warnings.simplefilter("ignore")
            self._net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        inner = self._net.net  # its slices keep the numbers of AlexNet's modules: slice2.3.weight is features.3.weight
        inner.load_state_dict({name: trunk[f"features.{name.split('.', 1)[1]}"] for name in inner.state_dict()})
        self._net.to(device).eval()
        self._device, self.device = device, str(device)
        self.identity: dict[str, Any] = {"name": "lpips-alex-0.1", "weights": weights_hash(self._net.state_dict())}

    @torch.inference_mode()
    def distance(self, first_HWc: np.ndarray, second_HWc: np.ndarray) -> float:
        """0 for equal images. ValueError: not two uint8 images of one size."""
        if first_HWc.dtype != np.uint8 or second_HWc.dtype != np.uint8 or first_HWc.shape != second_HWc.shape:
            raise ValueError("two uint8 images of one size are needed")
        return float(self._net(self._tensor(first_HWc), self._tensor(second_HWc)))

    def _tensor(self, pixels_HWc: np.ndarray) -> torch.Tensor:
        """(1, 3, H, W) in [-1, 1], which is what the package reads; [0, 1] would give no error and another number."""
        return torch.from_numpy(np.array(pixels_HWc)).permute(2, 0, 1)[None].to(self._device) / 127.5 - 1
