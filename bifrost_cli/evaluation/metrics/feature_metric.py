"""Metrics of two sets of images in a network's features: what FID, KID, the Inception score and PRDC share.

Features are computed in one pass for all metrics that read the same network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bifrost_cli.errors import DataError, UsageError
from bifrost_cli.evaluation.metrics.metric import Line, Metric, MetricInputs, row

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from bifrost_cli.data.image_sets import ImageSet
    from bifrost_cli.evaluation.feature_statistics import Statistics
    from bifrost_cli.evaluation.networks.feature_network import FeatureNetwork
    from bifrost_cli.evaluation.reference import Reference
    from bifrost_cli.runtime.ui import Ui

PROTOCOL = "bifrost-distribution/2"
FEATURES = (
    "Images are resized by the network's own rule (report.json, extractor.resize); statistics are float64 and cached "
    "under the hash of images, rule and weights."
)
NOT_FID = (
    " This is not Inception FID: compare it only with numbers of the same features, reference and number of images."
)


@dataclass
class Features:
    """What a metric computes from: features (N, D) of the images, statistics of the reference, features of true images
    in the images' place (None where the reference is not the built-in world), and the images' seeds, a row each."""

    images_ND: np.ndarray
    reference: Statistics | None
    floor_ND: np.ndarray | None
    seeds: Sequence[int | None]


class FeatureSets:
    """Features of the images, the reference and true images in one network, computed once for all its metrics."""

    def __init__(self, network: FeatureNetwork, reference: Reference | None, workspace: Path) -> None:
        self.network, self.reference, self._workspace = network, reference, workspace
        self.metrics: list[str] = []
        self.identity = {"features": network.identity, "metrics": self.metrics, "protocol": PROTOCOL}
        self._layers: set[str] = set()
        self._compared: set[str] = set()
        self._sides: tuple[dict[str, Statistics], ...] = ()

    @classmethod
    def load(cls, ref: str, inputs: MetricInputs) -> FeatureSets:
        """Load the network `ref`, see `load_features`."""
        from bifrost_cli.evaluation.networks.load_networks import load_features

        return cls(load_features(ref, inputs.settings, inputs.device), inputs.reference, inputs.workspace)

    def add(self, metric: type[FeatureMetric]) -> None:
        """A metric that will read these features."""
        self.metrics.append(metric.name)
        self._layers.add(metric.layer)
        self._compared |= {metric.layer} if metric.needs_reference else set()

    def of(self, layer: str, images: ImageSet, ui: Ui) -> Features:
        """The features of a layer that a metric was added for; the images are the same at every call."""
        if not self._sides:
            self._sides = self._computed(images, ui)
        made, real, floor = self._sides
        seeds = [entry.seed for entry in sorted(images.entries, key=lambda entry: entry.digest)]  # as `set_features`
        images_ND, true = made[layer].features_ND, floor.get(layer)
        assert images_ND is not None  # only published moments lack them
        return Features(images_ND, real.get(layer), None if true is None else true.features_ND, seeds)

    def _computed(self, images: ImageSet, ui: Ui) -> tuple[dict[str, Statistics], ...]:
        from bifrost_cli.data.image_sets import drawn
        from bifrost_cli.evaluation.feature_cache import statistics_of
        from bifrost_cli.evaluation.reference import FLOOR_SEED

        network, compared = self.network, sorted(self._compared)
        made = statistics_of(images, network, sorted(self._layers), self._workspace, ui, "features of the samples")
        real: dict[str, Statistics] = {}
        floor: dict[str, Statistics] = {}
        if self.reference is not None and compared:
            real = self.reference.statistics(network, compared, self._workspace, ui)
        if self.reference is not None and self.reference.world:
            true = drawn(len(images.entries), seed=FLOOR_SEED)
            floor = statistics_of(true, network, compared, self._workspace, ui, "features of true images")
        return made, real, floor


class FeatureMetric(Metric):
    """A metric of sets of features. A subclass gives names, layer and `measure`.

    Attributes:
        layer: of the network, which it reads; others than `pool` only Inception has.
        keyed: its name in report.json and its label; `inception`: the names it has in Inception features alone.
    """

    needs_many, needs_reference = True, True
    keys = ("features", "inception_weights")
    layer: ClassVar[str] = "pool"
    keyed: ClassVar[tuple[str, str]]
    inception: ClassVar[tuple[str, str] | None] = None

    def __init__(self, features: FeatureSets) -> None:
        features.add(type(self))
        self.features, self.identity, network = features, features.identity, features.network
        self.packages = ("torch-fidelity",) if network.identity["name"] == "inception" else ()
        self.device = network.device

    @classmethod
    def check(cls, request: Any) -> None:
        if cls.layer != "pool" and request.features != "inception":
            raise UsageError(
                f"--{cls.name} needs the Inception network, and the features are {request.features}",
                fix=f"--features inception, or leave out --{cls.name}",
            )

    @classmethod
    def load(cls, inputs: MetricInputs) -> FeatureMetric:
        return cls(inputs.share("features", lambda: FeatureSets.load(inputs.settings.features, inputs)))

    def measure(self, features: Features) -> dict[str, Any]:
        """The value with its uncertainty: what `row` is given, but for names and sentence."""
        raise NotImplementedError

    def compute(self, images: ImageSet, lines: Sequence[Line], ui: Ui) -> list[dict[str, Any]]:
        features, reference = self.features.of(self.layer, images, ui), self.features.reference
        measured, count = self.measure(features), len(features.images_ND)
        identity = self.features.network.identity
        inception = identity["name"] == "inception"
        key, label = self.inception if inception and self.inception else self.keyed
        compared = reference if self.needs_reference else None
        sentence = (
            f"{label} of {count} images{f' to {compared.what}' if compared else ''}, in features of {identity['name']} "
            f"(weights {identity['weights'][:12]}, {identity['resize']}).{'' if inception else NOT_FID}"
        )
        if reference is not None and reference.originals:
            label = "rFID" if label == "FID" else f"{label} to the originals"
        n_ref = (features.reference.count or None) if self.needs_reference and features.reference else None
        return [row(key, label, measured.pop("value"), n_gen=count, n_ref=n_ref, protocol=PROTOCOL, extractor=identity,
                    layer=self.layer, sentence=sentence, **measured)]  # fmt: skip

    def reference_features(self, features: Features) -> np.ndarray:
        """Features (M, D) of the reference. DataError: saved statistics that hold only its moments."""
        if features.reference is None or features.reference.features_ND is None:
            raise DataError(
                f"--{self.name} compares image with image, and the saved reference holds only mean and covariance",
                fix="give the reference images themselves, or statistics that bifrost saved",
                code="BF-DATA-009",
            )
        return features.reference.features_ND

    def settings(self) -> dict[str, str]:
        identity = self.features.network.identity
        facts = f"{identity['name']}, {identity['resize']}, {identity['image_size']} px"
        named = f"features ({', '.join(self.features.metrics)})"
        return {named: facts, f"{named}, sha256": identity["weights"], "protocol": PROTOCOL}

    def warnings(self, images: ImageSet, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        identity, count, found = self.features.network.identity, len(images.entries), []
        if identity["name"].startswith("builtin:"):
            found.append(
                f"The distances here are in features of {identity['name']}, a tiny network trained on the built-in "
                "world. They are not Inception's and not comparable with any published FID or KID."
            )
        if count <= identity["width"]:
            found.append(f"{count} images for {identity['width']} features of {identity['name']}: the distance is "
                         "mostly bias.")  # fmt: skip
        return found
