"""Statistics of image sets, computed once: cached in `workspace/statistics` under the hash of what they describe.

A cached file counts only when its identity (the images' contents, the network with its weights and resize rule, the
layer, library versions) is the same, and its checksum too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from bifrost_cli.data.image_sets import EvalImage, ImageSet
from bifrost_cli.data.images import BadImage
from bifrost_cli.data.sources.item import Problem, SourceError
from bifrost_cli.errors import ArtifactError
from bifrost_cli.evaluation.feature_statistics import Statistics, load_statistics, save_statistics, statistics_path
from bifrost_cli.evaluation.formulas.frechet import gaussian
from bifrost_cli.evaluation.networks.feature_network import FeatureNetwork, feature_batches
from bifrost_cli.runtime.ui import Ui


def statistics_of(
    images: ImageSet, network: FeatureNetwork, layers: Sequence[str], workspace: Path, ui: Ui, what: str
) -> dict[str, Statistics]:
    """Statistics of each layer, from the workspace where they are kept, else computed (in one pass) and kept."""
    identities = {layer: _identity(images, network, layer) for layer in layers}
    paths = {layer: statistics_path(workspace / "statistics", identities[layer]) for layer in layers}
    found = {layer: _cached(paths[layer], identities[layer], ui) for layer in layers}
    missing = [layer for layer in layers if found[layer] is None]
    for layer, features_ND in set_features(network, images, missing, ui, what).items():
        moments = gaussian(features_ND)
        made = Statistics(moments.mean_D, moments.covariance_DD, moments.count, identities[layer], features_ND)
        save_statistics(paths[layer], made)
        found[layer] = made
    return {layer: statistics for layer, statistics in found.items() if statistics is not None}


def set_features(
    network: FeatureNetwork, images: ImageSet, layers: Sequence[str], ui: Ui, what: str
) -> dict[str, np.ndarray]:
    """Features (N, D) float32 by layer in the order of the images' digests: names and listing order change no bit.

    SourceError: images that cannot be read, each with its reason.
    """
    if not layers:
        return {}
    ordered = sorted(images.entries, key=lambda entry: entry.digest)
    batches: dict[str, list[np.ndarray]] = {layer: [] for layer in layers}
    problems: list[Problem] = []
    with ui.progress(len(ordered), what) as bar:
        for batch in feature_batches(network, _prepared(ordered, network, problems), layers):
            for layer, features_BD in batch.items():
                batches[layer].append(features_BD)
            bar.advance(len(features_BD))
    if problems:
        raise SourceError(f"{len(problems)} of {len(ordered)} images cannot be read", problems, code="BF-DATA-003")
    return {layer: np.concatenate(parts) for layer, parts in batches.items()}


def _prepared(entries: Sequence[EvalImage], network: FeatureNetwork, problems: list[Problem]) -> Iterator[np.ndarray]:
    for entry in entries:
        try:
            yield network.prepare(entry.load())
        except BadImage as error:
            problems.append(Problem("image", entry.name, error.message))


def _identity(images: ImageSet, network: FeatureNetwork, layer: str) -> dict[str, Any]:
    return {
        "pictures": images.content,
        "features": network.identity,
        "layer": layer,
        "made with": {"pillow": PIL.__version__, "torch": torch.__version__, "device": network.device},
    }


def _cached(path: Path, identity: dict[str, Any], ui: Ui) -> Statistics | None:
    if not path.exists():
        return None
    try:
        found = load_statistics(path)
    except ArtifactError as error:
        ui.say(f"statistics are computed again: {error.message}")
        return None
    if found.identity == identity and found.checked:
        return found
    ui.say(f"statistics are computed again: {path} {'is of other images' if found.checked else 'has no checksum'}")
    return None
