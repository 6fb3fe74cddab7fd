"""The kernel distance to a reference: KID, and the same distance in other features."""

from __future__ import annotations

from typing import Any

from bifrost_cli.evaluation.metrics.feature_metric import FeatureMetric, Features

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020  # what torch-fidelity and so most papers use


class Kid(FeatureMetric):
    """Kernel distance (Binkowski et al. 2018); called KID only in Inception features."""

    name, help = "kid", "Kernel distance to a reference."
    protocol = (
        "Squared maximum mean discrepancy under (x.y/d + 1)^3, unbiased: it may be below 0. Its error is a "
        f"jackknife; with enough images the mean over {SUBSETS} subsets of {SUBSET_SIZE} is given as well."
    )
    gates = ("kid", "kernel_distance")
    keyed, inception = ("kernel_distance", "Kernel distance"), ("kid", "KID")

    def measure(self, features: Features) -> dict[str, Any]:
        from bifrost_cli.evaluation.formulas.feature_formulas import kernel_distance, kernel_error, subset_distances

        made_ND, real_MD = features.images_ND, self.reference_features(features)
        error = kernel_error(made_ND, real_MD)
        found: dict[str, Any] = {"value": kernel_distance(made_ND, real_MD), "standard_error": error,
                 "spread": f"standard error {error:.2g}", "details": []}  # fmt: skip
        if min(len(made_ND), len(real_MD)) >= SUBSET_SIZE:
            values = subset_distances(made_ND, real_MD, subsets=SUBSETS, size=SUBSET_SIZE, seed=SEED)
            found["subsets"] = {"mean": float(values.mean()), "sd": float(values.std()), "count": SUBSETS,
                                "size": SUBSET_SIZE, "seed": SEED}  # fmt: skip
            found["details"].append(f"mean over {SUBSETS} subsets of {SUBSET_SIZE}: {values.mean():.4g}")
        return found
