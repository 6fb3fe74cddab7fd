"""How near reconstructions are to their originals, as a measure: PSNR, SSIM, LPIPS, and the cosine of their latents.

Comes in: the originals in the order of the reconstructions, an encoder, LPIPS or the reason why it is not here. Goes
out: the mean over images of each, with its standard error. The Frechet distance to the originals is `distances`'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bifrost_cli.data.image_sets import ImageSet
from bifrost_cli.data.images import square
from bifrost_cli.evaluation.formulas.similarity import psnr, ssim
from bifrost_cli.evaluation.metrics.metric import Line, Metric
from bifrost_cli.models.encoders import Encoder
from bifrost_cli.runtime.ui import Ui

if TYPE_CHECKING:
    from bifrost_cli.evaluation.networks.lpips import Lpips

PROTOCOL = "bifrost-reconstruction/1"
_RULES = {
    "psnr": ("PSNR", "10 log10(255^2 / MSE) in dB"),
    "ssim": ("SSIM", "Wang et al. 2004: Gaussian windows of 11x11, deviation 1.5, the mean over channels"),
    "lpips": ("LPIPS", "Zhang et al. 2018, version 0.1 with AlexNet"),
    "latents_cosine": ("Cosine of latents", "the mean over patches of the cosine between the latents of both pictures"),
}


class ReconstructionMetric(Metric):
    """Each image against the one it was made from; `lpips` is the network, or why it is left out."""

    name = "reconstruction"

    def __init__(self, originals: ImageSet, encoder: Encoder, lpips: Lpips | str) -> None:
        self._originals, self._encoder, self._lpips = originals, encoder, lpips
        measured = None if isinstance(lpips, str) else lpips.identity
        self.identity = {"originals": originals.digest, "encoder": encoder.identity, "lpips": measured,
                         "protocol": PROTOCOL}  # fmt: skip
        self.packages = ("lpips",) if measured else ()

    def results(self, images: ImageSet, lines: Sequence[Line], ui: Ui) -> list[dict[str, Any]]:
        with ui.progress(len(lines), "comparing with the originals") as bar:
            for line, made, true in zip(lines, images.entries, self._originals.entries, strict=True):
                line["numbers"] = self._numbers(made.load(), true.load())
                bar.advance(1)
        names = [name for name in _RULES if any(line["numbers"].get(name) is not None for line in lines)]
        return [_result(name, [line["numbers"][name] for line in lines], self._described(name)) for name in names]

    def _numbers(self, made_HWC: np.ndarray, true_HWC: np.ndarray) -> dict[str, float | None]:
        """Of one image; equal images have no finite PSNR: None, as JSON knows no infinity."""
        decibels = psnr(made_HWC, true_HWC)
        numbers = {"psnr": decibels if math.isfinite(decibels) else None, "ssim": ssim(made_HWC, true_HWC)}
        if not isinstance(self._lpips, str):
            numbers["lpips"] = self._lpips.distance(made_HWC, true_HWC)
        made_PC, true_PC = (self._latents(rgb_HWC) for rgb_HWC in (made_HWC, true_HWC))
        numbers["latents_cosine"] = float(torch.cosine_similarity(made_PC, true_PC, dim=-1).mean())
        return numbers

    @torch.no_grad()
    def _latents(self, rgb_HWC: np.ndarray) -> torch.Tensor:
        return self._encoder.encode(square(rgb_HWC, self._encoder.image_size)[None].copy())[0].double().cpu()

    def _described(self, name: str) -> dict[str, Any]:
        networks = {"lpips": self.identity["lpips"], "latents_cosine": self._encoder.identity}
        return {"protocol": PROTOCOL, "extractor": networks.get(name)}

    def settings(self) -> dict[str, str]:
        height, width = self._encoder.grid
        return {"patch latents": f"{height}x{width} of {self._encoder.identity['name']}"}

    def warnings(self, images: ImageSet, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        found = [f"LPIPS is left out: {self._lpips}"] if isinstance(self._lpips, str) else []
        if all(line["numbers"]["psnr"] is None for line in lines):
            found.append("PSNR is left out: every image is equal to its original to the last bit.")
        return found


def _result(name: str, values: Sequence[float | None], described: dict[str, Any]) -> dict[str, Any]:
    """The mean over the images that have a value, at least one; the others equal their originals and are counted."""
    label, rule = _RULES[name]
    finite = np.array([value for value in values if value is not None], np.float64)
    deviation = float(finite.std(ddof=1)) if len(finite) > 1 else 0.0
    equal = len(values) - len(finite)
    return {
        "metric": name,
        "label": label,
        "format": "number",
        "value": float(finite.mean()),
        "sd": deviation,
        "standard_error": deviation / math.sqrt(len(finite)),
        "spread": f"standard deviation {deviation:.3g} over pictures",
        "details": [f"{equal} images are equal to the last bit and not in the mean"] if equal else [],
        "equal": equal,
        "n_gen": len(finite),
        **described,
        "sentence": f"Mean over {len(finite)} images, each against its original as uint8: {rule}.",
    }
