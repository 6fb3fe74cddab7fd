"""The Inception score as a metric."""

from __future__ import annotations

from typing import Any

from bifrost_cli.evaluation.metrics.feature_metric import FeatureMetric, Features

SPLITS, SEED = 10, 2020


class InceptionScore(FeatureMetric):
    """Inception score (Salimans et al. 2016)."""

    name, help = "is", "Inception score (Inception only)."
    protocol = (
        f"Inception score: exp of the mean KL of p(y|x) against p(y), over {SPLITS} splits shuffled with seed {SEED}, "
        "as torch-fidelity. It needs no reference."
    )
    gates, needs_reference = ("inception_score",), False
    layer, keyed = "logits", ("inception_score", "Inception score")

    def measure(self, features: Features) -> dict[str, Any]:
        from bifrost_cli.evaluation.formulas.feature_formulas import inception_scores

        scores = inception_scores(features.images_ND, splits=SPLITS, seed=SEED)
        error = float(scores.std(ddof=1) / SPLITS**0.5)
        return {
            "value": float(scores.mean()),
            "sd": float(scores.std()),
            "standard_error": error,
            "splits": SPLITS,
            "seed": SEED,
            "spread": f"standard error {error:.2g} over {SPLITS} splits",
            "details": [f"a split of {len(features.images_ND) // SPLITS} images cannot score above that number"],
        }
