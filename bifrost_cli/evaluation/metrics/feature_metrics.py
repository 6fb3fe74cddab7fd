"""Metrics of two sets of images in a network's features: FID, sFID, KID, the Inception score, precision and recall.

Features are computed in one pass for all metrics that read the same network.
"""

from __future__ import annotations

from collections import Counter
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
    from bifrost_cli.evaluation.inputs import Reference
    from bifrost_cli.evaluation.networks import FeatureNetwork
    from bifrost_cli.runtime.ui import Ui

PROTOCOL = "bifrost-distribution/2"
LOSSY_APART = 0.1  # share of lossy files by which samples and reference may differ unsaid
NOT_FID = "not Inception FID: compare it only with numbers of the same features, reference and number of images."


@dataclass
class Features:
    """What a metric computes from."""

    images_ND: np.ndarray
    reference: Statistics | None
    floor_ND: np.ndarray | None  # true images in the images' place; None where the reference is not the built-in world
    seeds: Sequence[int | None]  # of the images, a row each


class FeatureSets:
    """Features of the images, the reference and true images in one network, computed once for all its metrics."""

    def __init__(self, network: FeatureNetwork, reference: Reference | None, workspace: Path) -> None:
        self.network, self.reference, self._workspace = network, reference, workspace
        self.metrics: list[str] = []
        self.identity = {"features": network.identity, "metrics": self.metrics, "protocol": PROTOCOL}
        self.layers: dict[str, bool] = {}  # of the metrics, and whether any compares it with the reference
        self._sides: tuple[dict[str, Statistics], ...] = ()

    def prepare(self, images: ImageSet, ui: Ui) -> None:
        """Compute everything, in one pass over each set of images; the processes of a job share it, and the first
        one has it."""
        from bifrost_cli.data.image_sets import drawn
        from bifrost_cli.evaluation.feature_statistics import statistics_of
        from bifrost_cli.evaluation.inputs import FLOOR_SEED

        if self._sides:
            return
        place, compared = self._workspace, sorted(name for name, needed in self.layers.items() if needed)
        made = statistics_of(images, self.network, sorted(self.layers), place, ui, "features of the samples")
        real, floor = {}, {}
        if self.reference is not None and compared:
            real = self.reference.statistics(self.network, compared, place, ui)
        if self.reference is not None and self.reference.world:
            true = drawn(len(images.entries), seed=FLOOR_SEED, of=self.reference.world)
            floor = statistics_of(true, self.network, compared, place, ui, "features of true images")
        self._sides = made, real, floor

    def of(self, layer: str, images: ImageSet, ui: Ui) -> Features:
        """The features of a layer that a metric was added for; the images are the same at every call."""
        self.prepare(images, ui)
        made, real, floor = self._sides
        images_ND = made[layer].features_ND
        assert images_ND is not None  # only published moments lack them
        seeds = [entry.seed for entry in sorted(images.entries, key=lambda entry: entry.digest)]  # as `statistics_of`
        return Features(images_ND, real.get(layer), floor[layer].features_ND if layer in floor else None, seeds)


class FeatureMetric(Metric):
    """A metric of sets of features. A subclass gives names, layer and `measure`."""

    needs_many, needs_reference = True, True
    keys = ("features", "inception_weights")
    layer: ClassVar[str] = "pool"  # of the network; others only Inception has
    keyed: ClassVar[tuple[str, str]]  # its name in report.json and its label
    inception: ClassVar[tuple[str, str] | None] = None  # the names it has in Inception features alone

    def __init__(self, features: FeatureSets) -> None:
        features.metrics.append(self.name)
        features.layers[self.layer] = features.layers.get(self.layer, False) or self.needs_reference
        self.features, self.identity, self.device = features, features.identity, features.network.device
        self._network = features.network.identity
        self.packages = ("torch-fidelity",) if self._network["name"] == "inception" else ()

    @classmethod
    def check(cls, request: Any) -> None:
        if cls.layer != "pool" and request.features != "inception":
            raise UsageError(f"--{cls.name} needs the Inception network, and the features are {request.features}",
                             fix=f"--features inception, or leave out --{cls.name}")  # fmt: skip

    @classmethod
    def load(cls, inputs: MetricInputs) -> FeatureMetric:
        return cls.load_from(inputs.settings.features, inputs, "features")

    @classmethod
    def load_from(cls, ref: str, inputs: MetricInputs, key: Any = None) -> FeatureMetric:
        """In features of the network `ref`, which are shared by all metrics that ask for the same `key`."""
        from bifrost_cli.evaluation.networks import load_features

        def load() -> FeatureSets:
            network = load_features(ref, inputs.settings, inputs.device)
            return FeatureSets(network, inputs.reference, inputs.workspace)

        return cls(inputs.share(key, load) if key else load())

    def measure(self, features: Features) -> dict[str, Any]:
        """The value with its uncertainty: what `row` is given, but for names and sentence."""
        raise NotImplementedError

    def prepare(self, images: ImageSet, ui: Ui) -> None:
        self.features.prepare(images, ui)

    def compute(self, images: ImageSet, lines: Sequence[Line], ui: Ui) -> list[dict[str, Any]]:
        features, reference, network = self.features.of(self.layer, images, ui), self.features.reference, self._network
        measured, count, inception = self.measure(features), len(features.images_ND), network["name"] == "inception"
        key, label = self.inception if inception and self.inception else self.keyed
        compared = f" to {reference.what}" if reference and self.needs_reference else ""
        sentence = (
            f"{label} of {count} images{compared}, in features of {network['name']} "
            f"(weights {network['weights'][:12]}, {network['resize']}).{'' if inception else ' This is ' + NOT_FID}"
        )
        if reference is not None and reference.originals:
            label = "rFID" if label == "FID" else f"{label} to the originals"
        n_ref = (features.reference.count or None) if self.needs_reference and features.reference else None
        return [row(key, label, measured.pop("value"), n_gen=count, n_ref=n_ref, protocol=PROTOCOL, extractor=network,
                    layer=self.layer, sentence=sentence, **measured)]  # fmt: skip

    def reference_features(self, features: Features) -> np.ndarray:
        """Features (M, D) of the reference. DataError: saved statistics that hold only its moments."""
        if features.reference is None or features.reference.features_ND is None:
            raise DataError(
                f"--{self.name} compares image with image, and the saved reference holds only mean and covariance",
                fix="give the reference images themselves, or statistics that bifrost saved", code="BF-DATA-009",
            )  # fmt: skip
        return features.reference.features_ND

    def settings(self) -> dict[str, str]:
        network, named = self._network, f"features ({', '.join(self.features.metrics)})"
        return {named: f"{network['name']}, {network['resize']}, {network['image_size']} px",
                f"{named}, sha256": network["weights"], "protocol": PROTOCOL}  # fmt: skip

    def warnings(self, images: ImageSet, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        name, width, count, found = self._network["name"], self._network["width"], len(images.entries), []
        reference = self.features.reference if self.needs_reference else None
        if reference and reference.images and not reference.originals:
            made, true = ([entry.lossy for entry in one.entries] for one in (images, reference.images))
            if abs(sum(made) / count - sum(true) / len(true)) > LOSSY_APART:
                found.append(f"{sum(made)} of {count} samples and {sum(true)} of {len(true)} images of the reference "
                             "are lossy (JPEG or such): the distance measures their compression, too.")  # fmt: skip
        if name.startswith("builtin:"):
            found.append(f"The distances here are in features of {name}, a tiny network trained on the built-in world. "
                         "They are not Inception's and not comparable with any published FID or KID.")  # fmt: skip
        if count <= width:
            found.append(f"{count} images for {width} features of {name}: the distance is mostly bias.")
        return found


class Fid(FeatureMetric):
    """Frechet distance (Heusel et al. 2017); called FID only in Inception features."""

    POINTS = 15  # sizes of subsets that the limit is extrapolated from
    SEED_IMAGES = 4  # images of each seed, at least, for a distance of its own

    name, help = "fid", "Frechet distance to a reference; the default."
    protocol = (
        f"{PROTOCOL}: Frechet distance between two Gaussians fitted to features, |m1-m2|^2 + tr(C1+C2-2(C1 C2)^1/2). "
        "Images are resized by the network's own rule (report.json, extractor.resize); statistics are float64 and "
        "cached under the hash of images, rule and weights. Its error is a jackknife over ten blocks, never a "
        f"bootstrap; its limit for N -> infinity images (FID_inf) a line in 1/N through {POINTS} sizes (seed 0). It is "
        "called FID only in Inception features. With several seeds each seed's value is given."
    )
    gates: ClassVar[tuple[str, ...]] = ("fid", "frechet_distance")
    keyed, inception = ("frechet_distance", "Frechet distance"), ("fid", "FID")

    def measure(self, features: Features) -> dict[str, Any]:
        from bifrost_cli.evaluation import formulas

        made_ND, saved = features.images_ND, features.reference
        assert saved is not None
        real, shown = formulas.from_moments(saved.mean_D, saved.covariance_DD, saved.count), formulas.shown

        def distance(features_ND: np.ndarray) -> float:
            return formulas.frechet(formulas.gaussian(features_ND), real)

        raw, error = distance(made_ND), formulas.jackknife_error(made_ND, distance)
        limit = formulas.frechet_at_infinity(made_ND, real, points=self.POINTS)
        below = ", below zero: too few images to tell the distance from none" if limit < 0 else ""
        found: dict[str, Any] = {
            "value": shown(raw), "raw": raw, "standard_error": error,
            "at_infinity": {"value": limit, "seed": 0, "points": self.POINTS},
            "spread": f"standard error {error:.2g}",
            "details": [f"extrapolated to N -> infinity (FID_inf): {limit:.4g}{below}"],
        }  # fmt: skip
        if features.floor_ND is not None:
            true = distance(features.floor_ND)
            found["floor"] = {"value": shown(true), "raw": true, "n": len(features.floor_ND)}
            found["details"].append(f"true images in the samples' place: {shown(true):.4g}")
        return found | self._by_seed(features, distance, found["details"])

    def _by_seed(self, features: Features, distance: Any, details: list[str]) -> dict[str, Any]:
        """The distance of each seed's images, where several seeds made equally many: the spread between seeds is the
        only one that says what another run would give. Each is of fewer images, so more biased."""
        import numpy as np

        counts = Counter(features.seeds)
        size = len(features.images_ND) // max(1, len(counts))
        if None in counts or len(counts) < 2 or set(counts.values()) != {size} or size < self.SEED_IMAGES:
            return {}
        row_seeds, seeds = np.array(features.seeds), sorted(seed for seed in counts if seed is not None)
        values = [distance(features.images_ND[row_seeds == seed]) for seed in seeds]
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


class Kid(FeatureMetric):
    """Kernel distance (Binkowski et al. 2018); called KID only in Inception features."""

    SUBSETS, SIZE, SEED = 100, 1000, 2020  # what torch-fidelity and so most papers use

    name, help = "kid", "Kernel distance to a reference."
    protocol = (
        "Squared maximum mean discrepancy under (x.y/d + 1)^3, unbiased: it may be below 0. Its error is a "
        f"jackknife; with enough images the mean over {SUBSETS} subsets of {SIZE} is given as well."
    )
    gates = ("kid", "kernel_distance")
    keyed, inception = ("kernel_distance", "Kernel distance"), ("kid", "KID")

    def measure(self, features: Features) -> dict[str, Any]:
        from bifrost_cli.evaluation.formulas import jackknife_error, kernel_distance, subset_distances

        made_ND, real_MD = features.images_ND, self.reference_features(features)
        error = jackknife_error(made_ND, lambda some_ND: kernel_distance(some_ND, real_MD))
        found: dict[str, Any] = {"value": kernel_distance(made_ND, real_MD), "standard_error": error,
                                 "spread": f"standard error {error:.2g}", "details": []}  # fmt: skip
        if min(len(made_ND), len(real_MD)) >= self.SIZE:
            values = subset_distances(made_ND, real_MD, subsets=self.SUBSETS, size=self.SIZE, seed=self.SEED)
            found["subsets"] = {"mean": float(values.mean()), "sd": float(values.std()), "count": self.SUBSETS,
                                "size": self.SIZE, "seed": self.SEED}  # fmt: skip
            found["details"].append(f"mean over {self.SUBSETS} subsets of {self.SIZE}: {values.mean():.4g}")
        return found


class InceptionScore(FeatureMetric):
    """Inception score (Salimans et al. 2016)."""

    SPLITS, SEED = 10, 2020

    name, help = "is", "Inception score (Inception only)."
    protocol = (
        f"Inception score: exp of the mean KL of p(y|x) against p(y), over {SPLITS} splits shuffled with seed {SEED}, "
        "as torch-fidelity. It needs no reference."
    )
    gates, needs_reference = ("inception_score",), False
    layer, keyed = "logits", ("inception_score", "Inception score")

    def measure(self, features: Features) -> dict[str, Any]:
        from bifrost_cli.evaluation.formulas import inception_scores

        splits, scores = self.SPLITS, inception_scores(features.images_ND, splits=self.SPLITS, seed=self.SEED)
        error = float(scores.std(ddof=1) / splits**0.5)
        return {
            "value": float(scores.mean()), "sd": float(scores.std()), "standard_error": error, "splits": splits,
            "seed": self.SEED, "spread": f"standard error {error:.2g} over {splits} splits",
            "details": [f"a split of {len(features.images_ND) // splits} images cannot score above that number"],
        }  # fmt: skip


class Prdc(FeatureMetric):
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020)."""

    NEIGHBOURS, ADM = 5, 3

    name, help = "prdc", "Precision, recall, density, coverage."
    protocol = (
        f"Precision, recall, density and coverage with {NEIGHBOURS} neighbours; precision and recall also with "
        f"{ADM}, as ADM's evaluator."
    )
    keyed = ("prdc", "Precision")

    def measure(self, features: Features) -> dict[str, Any]:
        from bifrost_cli.evaluation.formulas import prdc
        from bifrost_cli.stats import wilson

        made_ND, real_MD = features.images_ND, self.reference_features(features)
        found = prdc(made_ND, real_MD, neighbours=self.NEIGHBOURS)
        adm, precision, count = prdc(made_ND, real_MD, neighbours=self.ADM), found["precision"], len(made_ND)
        return {
            "value": precision, **found, "neighbours": self.NEIGHBOURS,
            "adm": {"precision": adm["precision"], "recall": adm["recall"], "neighbours": self.ADM},
            "interval95": list(wilson(round(precision * count), count)),
            "standard_error": float((precision * (1 - precision) / count) ** 0.5),
            "spread": f"recall {found['recall']:.4g}, density {found['density']:.4g}, coverage {found['coverage']:.4g}",
            "details": [f"with {self.ADM} neighbours, as ADM: precision {adm['precision']:.4g}, "
                        f"recall {adm['recall']:.4g}"],
        }  # fmt: skip
