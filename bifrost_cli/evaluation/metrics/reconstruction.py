"""How near reconstructions are to their originals, image by image: PSNR, SSIM, LPIPS, and the cosine of latents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bifrost_cli.errors import EnvironmentProblem, UsageError
from bifrost_cli.evaluation.metrics.metric import Line, Metric, MetricInputs, row

if TYPE_CHECKING:
    import numpy as np

    from bifrost_cli.data.image_sets import ImageSet
    from bifrost_cli.evaluation.networks.feature_network import Lpips
    from bifrost_cli.models.encoders import Encoder
    from bifrost_cli.runtime.ui import Ui

PROTOCOL = "bifrost-reconstruction/1"
_RULES = {
    "psnr": ("PSNR", "10 log10(255^2 / MSE) in dB"),
    "ssim": ("SSIM", "Wang et al. 2004: Gaussian windows of 11x11, deviation 1.5, the mean over channels"),
    "lpips": ("LPIPS", "Zhang et al. 2018, version 0.1 with AlexNet"),
    "latents_cosine": ("Cosine of latents", "the mean over patches of the cosine between the latents of both images"),
}


class Reconstruction(Metric):
    """Each image against its original, in the same order; `lpips` is the network, or why it is left out."""

    name, help = "reconstruction", "Generate --reference again; PSNR, SSIM, LPIPS, rFID."
    protocol = (
        f"{PROTOCOL}: each image of the reference becomes a square, patch latents, and an image again (the diffusion "
        "model reads no text; the recipe's steps and scale, seed 0). PSNR, SSIM and LPIPS compare uint8 with uint8, "
        "image by image; then means with standard errors. The cosine is that of both images' latents; rFID the "
        "Frechet distance to the originals."
    )
    needs_reference, reconstructs, keys = True, True, ("lpips_weights",)

    def __init__(self, originals: ImageSet, encoder: Encoder, lpips: Lpips | str) -> None:
        self._originals, self._encoder, self._lpips = originals, encoder, lpips
        network = None if isinstance(lpips, str) else lpips.identity
        self.identity = {"originals": originals.digest, "encoder": encoder.identity, "lpips": network,
                         "protocol": PROTOCOL}  # fmt: skip
        self.packages = ("lpips",) if network else ()

    @classmethod
    def check(cls, request: Any) -> None:
        if request.samples is not None or request.prompts is not None:
            raise UsageError("--reconstruction generates the images of --reference again; it measures no others",
                             fix="leave out --samples and --prompts, or --reconstruction")  # fmt: skip

    @classmethod
    def load(cls, inputs: MetricInputs) -> Reconstruction:
        from bifrost_cli.evaluation.networks.load_networks import load_lpips
        from bifrost_cli.loading.loaders import ModelLoader

        try:
            lpips: Lpips | str = load_lpips(inputs.settings, inputs.device)
        except EnvironmentProblem as error:
            if inputs.settings.lpips_weights:  # the recipe names a file, so that file must be there
                raise
            lpips = f"{error.message}. {error.at}; {error.fix}"
        encoder = ModelLoader(inputs.models, inputs.device).encoder(inputs.latents, inputs.rules)
        assert inputs.reference is not None and inputs.reference.images is not None  # `needs_reference`, `reconstructs`
        return cls(inputs.reference.images, encoder, lpips)

    def compute(self, images: ImageSet, lines: Sequence[Line], ui: Ui) -> list[dict[str, Any]]:
        with ui.progress(len(lines), "comparing with the originals") as bar:
            for line, made, true in zip(lines, images.entries, self._originals.entries, strict=True):
                line["numbers"] = self._numbers(made.load(), true.load())
                bar.advance(1)
        names = [name for name in _RULES if any(line["numbers"].get(name) is not None for line in lines)]
        return [self._row(name, [line["numbers"][name] for line in lines]) for name in names]

    def _numbers(self, made_HWC: np.ndarray, true_HWC: np.ndarray) -> dict[str, float | None]:
        """Of one image; equal images have no finite PSNR: None, as JSON knows no infinity."""
        import torch

        from bifrost_cli.data.images import square
        from bifrost_cli.evaluation.formulas import psnr, ssim

        decibels, size = psnr(made_HWC, true_HWC), self._encoder.image_size
        numbers = {"psnr": decibels if math.isfinite(decibels) else None, "ssim": ssim(made_HWC, true_HWC)}
        if not isinstance(self._lpips, str):
            numbers["lpips"] = self._lpips.distance(made_HWC, true_HWC)
        with torch.no_grad():
            made_PC, true_PC = (self._encoder.encode(square(rgb_HWC, size)[None].copy())[0].double().cpu()
                                for rgb_HWC in (made_HWC, true_HWC))  # fmt: skip
        numbers["latents_cosine"] = float(torch.cosine_similarity(made_PC, true_PC, dim=-1).mean())
        return numbers

    def _row(self, name: str, values: Sequence[float | None]) -> dict[str, Any]:
        """The mean over the images that have a value, at least one; the others equal their originals."""
        import numpy as np

        label, rule = _RULES[name]
        finite = np.array([value for value in values if value is not None], np.float64)
        count, equal = len(finite), len(values) - len(finite)
        deviation = float(finite.std(ddof=1)) if count > 1 else 0.0
        extractor = {"lpips": self.identity["lpips"], "latents_cosine": self._encoder.identity}.get(name)
        return row(
            name, label, float(finite.mean()), n_gen=count, sd=deviation, protocol=PROTOCOL, extractor=extractor,
            standard_error=deviation / math.sqrt(count), equal=equal,
            spread=f"standard deviation {deviation:.3g} over images",
            details=[f"{equal} images are equal to the last bit and not in the mean"] if equal else [],
            sentence=f"Mean over {count} images, each against its original as uint8: {rule}.",
        )  # fmt: skip

    def settings(self) -> dict[str, str]:
        height, width = self._encoder.grid
        return {"patch latents": f"{height}x{width} of {self._encoder.identity['name']}"}

    def warnings(self, images: ImageSet, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        found = [f"LPIPS is left out: {self._lpips}"] if isinstance(self._lpips, str) else []
        if all(line["numbers"]["psnr"] is None for line in lines):
            found.append("PSNR is left out: every image is equal to its original to the last bit.")
        return found
