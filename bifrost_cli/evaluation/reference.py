"""What images are compared with: a folder, samples, a latents store's images, statistics, or the built-in world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bifrost_cli.artifacts import resolve
from bifrost_cli.artifacts.files import sha256_file
from bifrost_cli.config.schema import Images
from bifrost_cli.data.image_sets import ImageSet, drawn, from_folder, from_samples, squared
from bifrost_cli.errors import ArtifactError, DataError, UsageError
from bifrost_cli.evaluation.feature_cache import statistics_of
from bifrost_cli.evaluation.feature_statistics import Statistics, load_adm, load_statistics
from bifrost_cli.evaluation.networks.feature_network import FeatureNetwork
from bifrost_cli.extraction.choose_source import images_of_store
from bifrost_cli.runtime.ui import Ui

STATISTICS = (".safetensors", ".npz")  # suffixes of files of statistics
WORLD_SEED, FLOOR_SEED = 1, 2  # 0 is the seed of the prompts a default set is made from


@dataclass(frozen=True)
class Reference:
    """Images, or a file of statistics. `world`: drawings of the built-in world, of which any other are as good;
    `originals`: the images that the samples are reconstructions of, one by one."""

    what: str
    digest: str
    count: int
    images: ImageSet | None = None
    file: Path | None = None
    world: bool = False
    originals: bool = False

    @cached_property
    def identity(self) -> dict[str, Any]:
        return {"digest": self.digest, "n": self.count, "saved": self.file is not None}

    def statistics(
        self, network: FeatureNetwork, layers: Sequence[str], workspace: Path, ui: Ui
    ) -> dict[str, Statistics]:
        """By layer. ArtifactError BF-ART-004: saved statistics of another network or layer, with both identities."""
        if self.images is not None:
            return statistics_of(self.images, network, layers, workspace, ui, "features of the reference")
        assert self.file is not None  # images or a file
        if self.file.suffix == ".npz":
            _require_inception(self.what, network)
            return {layer: load_adm(self.file, layer) for layer in layers}
        saved = load_statistics(self.file)
        _require_same_features(self.what, saved.identity.get("features"), network.identity)
        if unlike := [layer for layer in layers if saved.identity.get("layer", "pool") != layer]:
            raise ArtifactError(
                f"{self.what} are of the layer {saved.identity.get('layer', 'pool')}, not {', '.join(unlike)}",
                fix="give the images themselves as --reference; their statistics are computed and kept",
                code="BF-ART-004",
            )
        return {layer: saved for layer in layers}


def reference_for(ref: Path | str | None, count: int, rules: Images, workspace: Path | str) -> Reference:
    """Find out what `ref` is.

    Args:
        ref: a folder, an artifact (path or id), or a file of statistics; None: `count` drawings of the built-in world.
        rules: how images are read, the recipe's images section.

    Raises:
        DataError: fewer than 4 images.
    """
    if ref is not None and Path(ref).suffix in STATISTICS:
        published = Path(ref).suffix == ".npz"
        count = (load_adm(Path(ref), "pool") if published else load_statistics(Path(ref))).count
        return Reference(f"saved statistics {ref}", sha256_file(Path(ref)), count, file=Path(ref))
    images = images_for(ref, count, rules, workspace)
    if len(images.entries) < 4:
        raise DataError(
            f"the reference, {images.what}, has {len(images.entries)} images; a covariance needs more",
            fix="give a folder with at least as many images as there are samples",
            code="BF-DATA-008",
        )
    return Reference(images.what, images.content, len(images.entries), images=images, world=ref is None)


def images_for(ref: Path | str | None, count: int, rules: Images, workspace: Path | str) -> ImageSet:
    """The images that `ref` means; arguments as `reference_for`."""
    if ref is None:
        return drawn(count, seed=WORLD_SEED)
    if Path(ref).is_dir() and not (Path(ref) / "manifest.json").exists():
        return from_folder(Path(ref), rules)
    artifact = resolve(workspace, ref)
    if artifact.kind == "latents":
        return images_of_store(artifact)
    return from_samples(resolve(workspace, ref, "samples"), rules)


def originals_for(ref: Path | str | None, count: int, rules: Images, workspace: Path | str) -> Reference:
    """The images as squares of `images.output_size`, to be reconstructed and compared with one by one.

    Raises:
        UsageError: a file of statistics, which holds no images.
    """
    if ref is not None and Path(ref).suffix in STATISTICS:
        raise UsageError(f"{ref} holds statistics, and a reconstruction needs the images", fix="--reference FOLDER")
    images = squared(images_for(ref, count, rules, workspace), rules.output_size)
    return Reference(images.what, images.content, len(images.entries), images=images, originals=True)


def _require_inception(what: str, network: FeatureNetwork) -> None:
    if network.identity["name"] != "inception":
        raise ArtifactError(
            f"{what} are of the Inception network, not {network.identity['name']}",
            fix="--features inception, or give the images themselves as --reference",
            code="BF-ART-004",
        )


def _require_same_features(what: str, saved: Any, needed: dict[str, Any]) -> None:
    if saved == needed:
        return
    saved = saved if isinstance(saved, dict) else {}
    changed = [f"{key}: {saved.get(key)} -> {value}" for key, value in needed.items() if saved.get(key) != value]
    raise ArtifactError(
        f"{what} were made with other features",
        at="; ".join(changed),
        fix="give the images themselves as --reference; their statistics are computed and kept",
        code="BF-ART-004",
    )
