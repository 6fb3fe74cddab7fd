"""Statistics of a network's layer over a set of images: mean, covariance and features in one safetensors file.

They are kept in `workspace/statistics` under the hash of what they describe; npz files of ADM's evaluator are read too.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from bifrost_cli.artifacts.files import canonical_json, make_folder
from bifrost_cli.data.image_sets import EvalImage, ImageSet
from bifrost_cli.data.images import BadImage
from bifrost_cli.data.safetensors_io import load_tensors, save_tensors, weights_hash
from bifrost_cli.data.sources.item import Problem, SourceError
from bifrost_cli.errors import ArtifactError
from bifrost_cli.evaluation.formulas import gaussian
from bifrost_cli.evaluation.networks import BATCH, FeatureNetwork, feature_batches
from bifrost_cli.runtime import distributed
from bifrost_cli.runtime.ahead import map_ahead
from bifrost_cli.runtime.ui import Ui

FORMAT = "bifrost.statistics/3"
READABLE = ("bifrost.statistics/1", "bifrost.statistics/2", FORMAT)  # 1 and 2 had no checksum, 1 no features
_NAME, _, _NUMBER = FORMAT.rpartition("/")
_ADM = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass(frozen=True)
class Statistics:
    """Moments, float64, of the features of `count` images."""

    mean_D: np.ndarray
    covariance_DD: np.ndarray
    count: int
    identity: dict[str, Any]  # names images, network and layer
    features_ND: np.ndarray | None = None  # float32, in the order of the images' digests; None: only moments are known
    checked: bool = True  # the file that they were read from has a checksum, and it is theirs


def statistics_of(
    images: ImageSet, network: FeatureNetwork, layers: Sequence[str], workspace: Path, ui: Ui, what: str
) -> dict[str, Statistics]:
    """Statistics of each layer, from the workspace where they are kept, else computed (in one pass) and kept.

    The processes of a job compute the features of a part each; the first one gets all statistics, the others those that
    were kept.
    """
    made_with = {"pillow": PIL.__version__, "torch": torch.__version__, "device": network.device}
    found, missing = {}, {}
    for layer in layers:
        identity = {"pictures": images.content, "features": network.identity, "layer": layer, "made with": made_with}
        name = hashlib.sha256(canonical_json(identity)).hexdigest()[:24]
        path = workspace / "statistics" / f"{name}.safetensors"
        if kept := _kept(path, identity, ui):
            found[layer] = kept
        else:
            missing[layer] = path, identity
    layers = distributed.run_on_main(lambda: list(missing))  # one process may see a file that another did not
    if not layers:
        return found
    ordered = sorted(images.entries, key=lambda entry: entry.digest)  # names and listing order change no bit
    batches, problems = _computed(network, _own(ordered), layers, ui, what)
    problems = sum(distributed.all_gather_object(problems), [])
    if problems:
        raise SourceError(f"{len(problems)} of {len(ordered)} images cannot be read", problems, code="BF-DATA-003")
    gathered = distributed.gather_object(batches)
    for layer, (path, identity) in missing.items() if gathered else ():
        features_ND = np.concatenate([batch[layer] for batches in gathered for batch in batches])
        moments = gaussian(features_ND)
        found[layer] = Statistics(moments.mean_D, moments.covariance_DD, moments.count, identity, features_ND)
        save_statistics(path, found[layer])
    return found


def _own(entries: Sequence[EvalImage]) -> Sequence[EvalImage]:
    """This process's part: whole batches, as one process would make them."""
    batches = [entries[start : start + BATCH] for start in range(0, len(entries), BATCH)]
    return [entry for batch in distributed.part(batches) for entry in batch]


def _computed(
    network: FeatureNetwork, entries: Sequence[EvalImage], layers: Sequence[str], ui: Ui, what: str
) -> tuple[list[dict[str, np.ndarray]], list[Problem]]:
    """Features of images, a batch each, and what cannot be read."""
    problems: list[Problem] = []

    def prepare(entry: EvalImage) -> np.ndarray | Problem:
        try:
            return network.prepare(entry.load())
        except BadImage as error:
            return Problem("image", entry.name, error.message)

    def prepared() -> Iterator[np.ndarray]:
        for image in map_ahead(prepare, entries, ahead=2 * BATCH):
            if isinstance(image, Problem):
                problems.append(image)
            else:
                yield image

    batches = []
    with ui.progress(len(entries), what) as bar:
        for batch in feature_batches(network, prepared(), layers):
            batches.append(batch)
            bar.advance(len(next(iter(batch.values()))))
    return batches, problems


def _kept(path: Path, identity: dict[str, Any], ui: Ui) -> Statistics | None:
    """A file counts only when its identity is the same, and its checksum too."""
    if not path.exists():
        return None
    try:
        found = load_statistics(path)
        if found.identity == identity and found.checked:
            return found
        why = f"{path} {'is of other images' if found.checked else 'has no checksum'}"
    except ArtifactError as error:
        why = error.message
    ui.say(f"statistics are computed again: {why}")
    return None


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Write the file whole or not at all. DiskFull."""
    make_folder(path.parent)
    tensors = {"mu": statistics.mean_D.astype(np.float64), "sigma": statistics.covariance_DD.astype(np.float64)}
    if statistics.features_ND is not None:
        tensors["features"] = statistics.features_ND.astype(np.float32)
    described = {"format": FORMAT, "n": statistics.count, "identity": statistics.identity}
    save_tensors(path, tensors, {**described, "digest": _digest(described, tensors)})


def load_statistics(path: Path) -> Statistics:
    """Read a file of `save_statistics`, of this format or an earlier one."""
    tensors, meta = load_tensors(path)
    name, _, number = str(meta.get("format")).rpartition("/")
    if name == _NAME and number.isdecimal() and int(number) > int(_NUMBER):
        raise ArtifactError.newer(f"{path} holds statistics", number, int(_NUMBER))
    arrays = {name: value.numpy() for name, value in tensors.items()}
    whole = {"mu", "sigma"} <= set(arrays) <= {"mu", "sigma", "features"} and isinstance(meta.get("n"), int)
    if meta.get("format") not in READABLE or not whole or not isinstance(meta.get("identity"), dict):
        raise ArtifactError(f"{path} holds no reference statistics ({FORMAT})", code="BF-ART-005")
    if {arrays["mu"].dtype, arrays["sigma"].dtype} != {np.dtype(np.float64)}:
        raise ArtifactError(f"{path} holds statistics in another precision than float64", code="BF-ART-005")
    checked, digest = meta["format"] == FORMAT, meta.pop("digest", None)
    if checked and digest != _digest(meta, arrays):
        raise ArtifactError(f"{path} is damaged: its checksum is another", fix="delete it", code="BF-ART-005")
    return Statistics(arrays["mu"], arrays["sigma"], meta["n"], meta["identity"], arrays.get("features"), checked)


def _digest(described: dict[str, Any], tensors: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(canonical_json([described, weights_hash(tensors)])).hexdigest()


ADM_BYTES = 1 << 29  # of an array in an npz, unpacked: a covariance of 8192 features


def load_adm(path: Path, layer: str) -> Statistics:
    """The moments in an npz of ADM's evaluator; it says neither its network nor how many images: the count is 0."""
    try:
        with zipfile.ZipFile(path) as archive:
            if large := [one.filename for one in archive.infolist() if one.file_size > ADM_BYTES]:
                raise ValueError(f"{large[0]} unpacks to more than {ADM_BYTES:,} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            mean_D, covariance_DD = (np.asarray(arrays[name], np.float64) for name in _ADM[layer])
    except KeyError as error:
        raise ArtifactError(f"{path} has no statistics of the {layer} layer", at=str(error),
                            code="BF-ART-005") from error  # fmt: skip
    except Exception as error:  # the archive's bytes decide what is raised
        code = "BF-ART-008" if "pickle" in str(error) else "BF-ART-005"
        raise ArtifactError(f"{path} is not an npz of statistics", at=str(error)[:200], code=code) from error
    return Statistics(mean_D, covariance_DD, 0, {"published": path.name, "layer": layer})
