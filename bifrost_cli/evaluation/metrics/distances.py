"""Distances of samples to a reference in one network's features, as a measure: which features of which images.

Comes in: a feature network, the metrics asked for, a reference, the folder of kept statistics. Goes out: results of
`distribution`. Does not know how a distance is computed, nor pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bifrost_cli.data.image_sets import ImageSet, drawn
from bifrost_cli.evaluation.feature_cache import statistics_of
from bifrost_cli.evaluation.metrics.distribution import (
    LAYERS,
    PROTOCOL,
    WITHOUT_REFERENCE,
    distribution_results,
    require_layers,
)
from bifrost_cli.evaluation.metrics.metric import Line, Metric
from bifrost_cli.evaluation.networks.feature_network import FeatureNetwork
from bifrost_cli.evaluation.reference import FLOOR_SEED, Reference
from bifrost_cli.runtime.ui import Ui


class DistanceMetric(Metric):
    """`names`: metrics of `distribution.LAYERS`; `reference` None is for those that need none. UsageError: a metric
    whose layer the network does not have."""

    needs_many = True

    def __init__(self, network: FeatureNetwork, names: list[str], reference: Reference | None, workspace: Path) -> None:
        require_layers(names, network)
        self.name, self._names, self._network = ", ".join(names), names, network
        self._reference, self._workspace = reference, workspace
        self.identity = {"features": network.identity, "metrics": names, "protocol": PROTOCOL}
        self.packages = ("torch-fidelity",) if network.identity["name"] == "inception" else ()
        self.device = network.device

    def results(self, images: ImageSet, lines: Sequence[Line], ui: Ui) -> list[dict[str, Any]]:
        network, names, reference = self._network, self._names, self._reference
        layers = sorted({LAYERS[name] for name in names})
        compared = sorted({LAYERS[name] for name in names if name not in WITHOUT_REFERENCE})
        made = statistics_of(images, network, layers, self._workspace, ui, "features of the samples")
        real, floor = {}, {}
        if reference is not None and compared:
            real = reference.statistics(network, compared, self._workspace, ui)
        if reference is not None and reference.world:
            true = drawn(len(images.entries), seed=FLOOR_SEED)
            floor = statistics_of(true, network, compared, self._workspace, ui, "features of true pictures")
        features = [{layer: found.features_ND for layer, found in side.items()} for side in (made, floor)]
        described = reference.what if reference is not None else ""
        seeds = [entry.seed for entry in sorted(images.entries, key=lambda entry: entry.digest)]  # as `set_features`
        results = distribution_results(names, network.identity, features[0], real, features[1], described, seeds)
        if reference is not None and reference.originals:
            for result in results:
                result["label"] = "rFID" if result["label"] == "FID" else f"{result['label']} to the originals"
        return results

    def settings(self) -> dict[str, str]:
        identity = self._network.identity
        return {
            f"features ({self.name})": f"{identity['name']}, {identity['resize']}, {identity['image_size']} px",
            f"features ({self.name}), sha256": identity["weights"],
            "protocol": PROTOCOL,
        }

    def warnings(self, images: ImageSet, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        name, width, count = self._network.identity["name"], self._network.identity["width"], len(images.entries)
        found = []
        if name.startswith("builtin:"):
            found.append(
                f"The distances here are in features of {name}, a tiny network trained on the built-in world. They are "
                "not Inception's and not comparable with any published FID or KID."
            )
        if count <= width:
            found.append(f"{count} images for {width} features of {name}: the distance is mostly bias.")
        return found
