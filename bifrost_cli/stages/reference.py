"""What samples are compared with: a folder, a samples artifact, a statistics file, or the built-in world.

Comes in: the user's reference and a feature network. Goes out: a Gaussian, computed once and kept by content in
`workspace/statistics`. Does not know the samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import PIL
import torch

from bifrost_cli.artifacts import resolve
from bifrost_cli.artifacts.files import sha256_file
from bifrost_cli.config import Recipe
from bifrost_cli.data.picture_set import PictureSet, drawn, from_folder, from_samples
from bifrost_cli.data.statistics import Statistics, load_statistics, save_statistics, statistics_path
from bifrost_cli.errors import ArtifactError, DataError, UsageError
from bifrost_cli.maths.frechet import Gaussian, from_moments, gaussian
from bifrost_cli.models.features import FeatureNetwork
from bifrost_cli.stages.measure import set_features
from bifrost_cli.stages.ui import Ui

WORLD_SEED, FLOOR_SEED = 1, 2  # 0 is the seed of the prompts a default set is made from


@dataclass(frozen=True)
class Reference:
    """Pictures, or the statistics that a user saved; `world` is True for drawings of the built-in world."""

    what: str
    digest: str
    count: int
    pictures: PictureSet | None = None
    saved: Statistics | None = None
    world: bool = False

    @cached_property
    def identity(self) -> dict[str, Any]:
        return {"digest": self.digest, "n": self.count, "saved": self.saved is not None}

    def moments(self, network: FeatureNetwork, workspace: Path, ui: Ui) -> Gaussian:
        """Mean and covariance of the reference in the network's features.

        ArtifactError BF-ART-004: saved statistics of another network, with both identities.
        """
        if self.saved is not None:
            _require_same_features(self.what, self.saved.identity.get("features"), network.identity)
            return from_moments(self.saved.mean_D, self.saved.covariance_DD, self.saved.count)
        statistics = _kept(self.pictures, network, workspace, ui)
        return from_moments(statistics.mean_D, statistics.covariance_DD, statistics.count)


def reference_for(recipe: Recipe, ref: Path | str | None, count: int, workspace: Path | str) -> Reference:
    """Find out what `ref` is. None: `count` drawings of the built-in world.

    DataError: fewer than 4 pictures. UsageError: None, with a recipe of another world.
    """
    if ref is not None and str(ref).endswith(".safetensors"):
        saved = load_statistics(Path(ref))
        return Reference(f"saved statistics {ref}", sha256_file(Path(ref)), saved.count, saved=saved)
    if ref is None:
        _require_world(recipe)
        pictures = drawn(count, seed=WORLD_SEED)
    elif Path(ref).is_dir() and not (Path(ref) / "manifest.json").exists():
        pictures = from_folder(Path(ref), recipe.latents)
    else:
        pictures = from_samples(resolve(workspace, ref, "samples"), recipe.latents)
    if len(pictures.entries) < 4:
        raise DataError(
            f"the reference, {pictures.what}, has {len(pictures.entries)} pictures; a covariance needs more",
            fix="give a folder with at least as many pictures as there are samples",
            code="BF-DATA-008",
        )
    return Reference(pictures.what, pictures.content, len(pictures.entries), pictures=pictures, world=ref is None)


def _require_world(recipe: Recipe) -> None:
    if not recipe.models.painter.startswith("builtin:"):
        raise UsageError(
            f"recipe {recipe.name} does not paint the built-in world, so there is no default reference",
            fix="give --reference FOLDER, a samples artifact, or a saved statistics file",
        )


def _kept(pictures: PictureSet, network: FeatureNetwork, workspace: Path, ui: Ui) -> Statistics:
    """Statistics from the workspace when this network measured these pictures before, else computed and kept."""
    identity = {
        "pictures": pictures.content,
        "features": network.identity,
        "made with": {"pillow": PIL.__version__, "torch": torch.__version__, "device": network.device},
    }
    path = statistics_path(workspace / "statistics", identity)
    if path.exists():
        try:
            found = load_statistics(path)
            if found.identity == identity:
                return found
        except ArtifactError as error:
            ui.say(f"statistics are computed again: {error.message}")
    moments = gaussian(set_features(network, pictures, ui, "features of the reference"))
    statistics = Statistics(moments.mean_D, moments.covariance_DD, moments.count, identity)
    save_statistics(path, statistics)
    return statistics


def _require_same_features(what: str, saved: Any, wanted: dict[str, Any]) -> None:
    if saved == wanted:
        return
    saved = saved if isinstance(saved, dict) else {}
    changed = [f"{key}: {saved.get(key)} -> {value}" for key, value in wanted.items() if saved.get(key) != value]
    raise ArtifactError(
        f"{what} were made with other features",
        at="; ".join(changed),
        fix="give the pictures themselves as --reference; their statistics are computed and kept",
        code="BF-ART-004",
    )
