"""The Frechet distance to a reference: FID, sFID, and the same distance in other features."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar

from bifrost_cli.evaluation.metrics.feature_metric import FEATURES, PROTOCOL, FeatureMetric, Features

if TYPE_CHECKING:
    from bifrost_cli.evaluation.formulas.frechet import Gaussian

POINTS = 15  # sizes of subsets that the limit is extrapolated from
BELOW_ZERO = ", below zero: too few images to tell the distance from none"
SEED_IMAGES = 4  # images of each seed, at least, for a distance of its own


class Fid(FeatureMetric):
    """Frechet distance (Heusel et al. 2017); called FID only in Inception features."""

    name, help = "fid", "Frechet distance to a reference; the default."
    protocol = (
        f"{PROTOCOL}: Frechet distance between two Gaussians fitted to features, |m1-m2|^2 + "
        f"tr(C1+C2-2(C1 C2)^1/2). {FEATURES} Its error is a jackknife over ten blocks, never a bootstrap; its limit "
        f"for N -> infinity images (FID_inf) a line in 1/N through {POINTS} sizes (seed 0). It is called FID only in "
        "Inception features. With several seeds each seed's value is given."
    )
    gates: ClassVar[tuple[str, ...]] = ("fid", "frechet_distance")
    keyed, inception = ("frechet_distance", "Frechet distance"), ("fid", "FID")

    def measure(self, features: Features) -> dict[str, Any]:
        from bifrost_cli.evaluation.formulas.frechet import (
            frechet,
            frechet_at_infinity,
            gaussian,
            jackknife_error,
            shown,
        )

        reference = self.gaussian_of(features)
        raw, error = frechet(gaussian(features.images_ND), reference), jackknife_error(features.images_ND, reference)
        limit = frechet_at_infinity(features.images_ND, reference, points=POINTS)
        found: dict[str, Any] = {
            "value": shown(raw),
            "raw": raw,
            "standard_error": error,
            "at_infinity": {"value": limit, "seed": 0, "points": POINTS},
            "spread": f"standard error {error:.2g}",
            "details": [f"extrapolated to N -> infinity (FID_inf): {limit:.4g}{BELOW_ZERO if limit < 0 else ''}"],
        }
        if features.floor_ND is not None:
            true = frechet(gaussian(features.floor_ND), reference)
            found["floor"] = {"value": shown(true), "raw": true, "n": len(features.floor_ND)}
            found["details"].append(f"true images in the samples' place: {shown(true):.4g}")
        return found | self._by_seed(features, reference, found["details"])

    def gaussian_of(self, features: Features) -> Gaussian:
        """The reference's moments."""
        from bifrost_cli.evaluation.formulas.frechet import from_moments

        assert features.reference is not None
        return from_moments(features.reference.mean_D, features.reference.covariance_DD, features.reference.count)

    def _by_seed(self, features: Features, reference: Gaussian, details: list[str]) -> dict[str, Any]:
        """The distance of each seed's images, where several seeds made equally many: the spread between seeds is the
        only one that says what another run would give. Each is of fewer images, so more biased."""
        import numpy as np

        from bifrost_cli.evaluation.formulas.frechet import frechet, gaussian

        counts = Counter(features.seeds)
        size = len(features.images_ND) // max(1, len(counts))
        if None in counts or len(counts) < 2 or set(counts.values()) != {size} or size < SEED_IMAGES:
            return {}
        row_seeds, seeds = np.array(features.seeds), sorted(seed for seed in counts if seed is not None)
        values = [frechet(gaussian(features.images_ND[row_seeds == seed]), reference) for seed in seeds]
        mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
        details.append(f"{len(counts)} seeds of {size} images: {mean:.4g}, standard deviation {deviation:.2g}")
        return {"seeds": seeds, "per_seed": values, "sd": deviation}


class SpatialFid(Fid):
    """sFID (Nash et al. 2021)."""

    name, help = "sfid", "The same of spatial features (Inception only)."
    protocol = (
        "As fid, of the first 7 channels of Inception's mixed_6/conv, flattened row by row (NHWC), as ADM's evaluator."
    )
    gates = ("sfid",)
    layer, keyed, inception = "spatial", ("sfid", "sFID"), ("sfid", "sFID")
