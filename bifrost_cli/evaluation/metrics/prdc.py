"""Precision, recall, density and coverage as a metric."""

from __future__ import annotations

from typing import Any

from bifrost_cli.evaluation.metrics.feature_metric import FeatureMetric, Features

NEIGHBOURS, ADM_NEIGHBOURS = 5, 3


class Prdc(FeatureMetric):
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020)."""

    name, help = "prdc", "Precision, recall, density, coverage."
    protocol = (
        f"Precision, recall, density and coverage with {NEIGHBOURS} neighbours; precision and recall also with "
        f"{ADM_NEIGHBOURS}, as ADM's evaluator."
    )
    keyed = ("prdc", "Precision")

    def measure(self, features: Features) -> dict[str, Any]:
        from bifrost_cli.evaluation.formulas.feature_formulas import prdc
        from bifrost_cli.stats import wilson

        made_ND, real_MD = features.images_ND, self.reference_features(features)
        found = prdc(made_ND, real_MD, neighbours=NEIGHBOURS)
        adm = prdc(made_ND, real_MD, neighbours=ADM_NEIGHBOURS)
        precision = found["precision"]
        return {
            "value": precision,
            **found,
            "neighbours": NEIGHBOURS,
            "adm": {"precision": adm["precision"], "recall": adm["recall"], "neighbours": ADM_NEIGHBOURS},
            "interval95": list(wilson(round(precision * len(made_ND)), len(made_ND))),
            "standard_error": float((precision * (1 - precision) / len(made_ND)) ** 0.5),
            "spread": f"recall {found['recall']:.4g}, density {found['density']:.4g}, coverage {found['coverage']:.4g}",
            "details": [f"with {ADM_NEIGHBOURS} neighbours, as ADM: precision {adm['precision']:.4g}, "
                        f"recall {adm['recall']:.4g}"],
        }  # fmt: skip
