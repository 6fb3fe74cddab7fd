"""Distances between two sets of images in a network's features: Frechet (FID, sFID), kernel, PRDC, Inception score.

Comes in: features of the samples, statistics of a reference, a network's identity. Goes out: results with their
uncertainty, each by the method that is right for it. Does not know artifacts, workspaces or pages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from bifrost_cli.errors import DataError, UsageError
from bifrost_cli.evaluation.feature_statistics import Statistics
from bifrost_cli.evaluation.formulas.frechet import (
    frechet,
    frechet_at_infinity,
    from_moments,
    gaussian,
    jackknife_error,
    shown,
)
from bifrost_cli.evaluation.formulas.inception_score import SEED, SPLITS, inception_scores
from bifrost_cli.evaluation.formulas.kernel_distance import SUBSET_SIZE, SUBSETS, kernel_distance, subset_distances
from bifrost_cli.evaluation.formulas.kernel_distance import jackknife_error as kernel_error
from bifrost_cli.evaluation.formulas.manifold import NEIGHBOURS, prdc

PROTOCOL = "bifrost-distribution/2"
LAYERS = {"fid": "pool", "sfid": "spatial", "kid": "pool", "is": "logits", "prdc": "pool"}  # what each metric reads
WITHOUT_REFERENCE = ("is",)
POINTS = 15
SEED_IMAGES = 4  # of each seed, for a distance of its own


def require_layers(names: list[str], network: Any) -> None:
    """UsageError: a metric whose layer this network does not have."""
    for name in names:
        if LAYERS[name] not in network.layers:
            raise UsageError(
                f"--{name} needs the Inception network, and the features are {network.identity['name']}",
                fix=f"--features inception, or leave out --{name}",
            )


def distribution_results(
    names: list[str],
    identity: dict[str, Any],
    made: dict[str, np.ndarray],
    real: dict[str, Statistics],
    floor: dict[str, np.ndarray],
    described: str,
    seeds: Sequence[int | None] = (),
) -> list[dict[str, Any]]:
    """The asked metrics. `made`, `floor`: features (N, D) by layer of samples and of true images in their place;
    `real`: the reference's statistics by layer; `seeds`: those of the samples, a row each. DataError: too few images,
    or a reference without features."""
    results = []
    for name in names:
        layer = LAYERS[name]
        if name in ("fid", "sfid"):
            found = _frechet(made[layer], real[layer], floor.get(layer))
            found |= _by_seed(made[layer], seeds, real[layer], found["details"])
        elif name == "kid":
            found = _kernel(made[layer], _features(real[layer], name))
        elif name == "prdc":
            found = _manifold(made[layer], _features(real[layer], name))
        else:
            found = _inception(made[layer])
        n_ref = None if name in WITHOUT_REFERENCE else real[layer].count or None
        results.append({**found, **_described(name, identity, described, len(made[layer]), n_ref), "n_ref": n_ref})
    return results


def _features(real: Statistics, name: str) -> np.ndarray:
    if real.features_ND is None:
        raise DataError(
            f"--{name} compares image with image, and the saved reference holds only mean and covariance",
            fix="give the reference images themselves, or statistics that bifrost saved",
            code="BF-DATA-009",
        )
    return real.features_ND


# ---- the metrics ----------------------------------------------------------------------------------------------------


def _frechet(made_ND: np.ndarray, real: Statistics, floor_ND: np.ndarray | None) -> dict[str, Any]:
    reference = from_moments(real.mean_D, real.covariance_DD, real.count)
    raw, error = frechet(gaussian(made_ND), reference), jackknife_error(made_ND, reference)
    limit = frechet_at_infinity(made_ND, reference, points=POINTS)
    found = {
        "value": shown(raw),
        "raw": raw,
        "standard_error": error,
        "at_infinity": {"value": limit, "seed": 0, "points": POINTS},
        "spread": f"standard error {error:.2g}",
        "details": [f"extrapolated to endlessly many samples: {limit:.4g}"],
    }
    if floor_ND is not None:
        true = frechet(gaussian(floor_ND), reference)
        found["floor"] = {"value": shown(true), "raw": true, "n": len(floor_ND)}
        found["details"].append(f"true images in the samples' place: {shown(true):.4g}")
    return found


def _by_seed(made_ND: np.ndarray, seeds: Sequence[int | None], real: Statistics, details: list[str]) -> dict[str, Any]:
    """The distance of each seed's images, where several seeds made equally many: the spread between seeds is the only
    one that says what another run would give. Each is of fewer images, so more biased than the value over all."""
    counts = Counter(seeds)
    size = len(made_ND) // max(1, len(counts))
    if None in counts or len(counts) < 2 or set(counts.values()) != {size} or size < SEED_IMAGES:
        return {}
    reference, row_seeds = from_moments(real.mean_D, real.covariance_DD, real.count), np.array(seeds)
    values = [frechet(gaussian(made_ND[row_seeds == seed]), reference) for seed in sorted(counts)]
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    details.append(f"{len(counts)} seeds of {size} images: {mean:.4g}, standard deviation {deviation:.2g}")
    return {"seeds": sorted(counts), "per_seed": values, "sd": deviation}


def _kernel(made_ND: np.ndarray, real_MD: np.ndarray) -> dict[str, Any]:
    value, error = kernel_distance(made_ND, real_MD), kernel_error(made_ND, real_MD)
    found = {"value": value, "standard_error": error, "spread": f"standard error {error:.2g}", "details": []}
    if min(len(made_ND), len(real_MD)) >= SUBSET_SIZE:
        values = subset_distances(made_ND, real_MD)
        found["subsets"] = {"mean": float(values.mean()), "sd": float(values.std()), "count": SUBSETS,
                            "size": SUBSET_SIZE, "seed": SEED}  # fmt: skip
        found["details"].append(f"mean over {SUBSETS} subsets of {SUBSET_SIZE}: {values.mean():.4g}")
    return found


def _inception(logits_NK: np.ndarray) -> dict[str, Any]:
    scores = inception_scores(logits_NK)
    error = float(scores.std(ddof=1) / np.sqrt(SPLITS))
    return {
        "value": float(scores.mean()),
        "sd": float(scores.std()),
        "standard_error": error,
        "splits": SPLITS,
        "seed": SEED,
        "spread": f"standard error {error:.2g} over {SPLITS} splits",
        "details": [f"a split of {len(logits_NK) // SPLITS} images cannot score above that number"],
    }


def _manifold(made_ND: np.ndarray, real_MD: np.ndarray) -> dict[str, Any]:
    found, adm = prdc(made_ND, real_MD), prdc(made_ND, real_MD, neighbours=3)
    error = np.sqrt(found["precision"] * (1 - found["precision"]) / len(made_ND))
    return {
        "value": found["precision"],
        **found,
        "neighbours": NEIGHBOURS,
        "adm": {"precision": adm["precision"], "recall": adm["recall"], "neighbours": 3},
        "standard_error": float(error),
        "spread": f"recall {found['recall']:.4g}, density {found['density']:.4g}, coverage {found['coverage']:.4g}",
        "details": [f"with 3 neighbours, as ADM: precision {adm['precision']:.4g}, recall {adm['recall']:.4g}"],
    }


# ---- what each number is called -------------------------------------------------------------------------------------

_KEYS = {"fid": "frechet_distance", "sfid": "sfid", "kid": "kernel_distance", "is": "inception_score", "prdc": "prdc"}
_LABELS = {"fid": "Frechet distance", "sfid": "sFID", "kid": "Kernel distance", "is": "Inception score",
           "prdc": "Precision"}  # fmt: skip
_INCEPTION = {"fid": ("fid", "FID"), "kid": ("kid", "KID")}  # these names belong to Inception features alone


def _described(name: str, identity: dict[str, Any], described: str, n_gen: int, n_ref: int | None) -> dict[str, Any]:
    inception = identity["name"] == "inception"
    key, label = _INCEPTION.get(name, (_KEYS[name], _LABELS[name])) if inception else (_KEYS[name], _LABELS[name])
    against = "" if n_ref is None else f" to {described}"
    no_fid = "" if inception else " This is not Inception FID: compare it only with numbers of the same features, " \
        "reference and number of pictures."  # fmt: skip
    return {
        "metric": key,
        "label": label,
        "format": "number",
        "n_gen": n_gen,
        "protocol": PROTOCOL,
        "extractor": identity,
        "layer": LAYERS[name],
        "sentence": f"{label} of {n_gen} images{against}, in features of {identity['name']} (weights "
        f"{identity['weights'][:12]}, {identity['resize']}).{no_fid}",
    }
