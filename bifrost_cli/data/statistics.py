"""Saved reference statistics: mean and covariance of a feature network over a set of pictures.

Comes in: float64 arrays, a count and the identity of what they describe. Goes out: one safetensors file, named by that
identity, never by a name a user chose. Does not know the network, the pictures or the distance.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bifrost_cli.artifacts.files import canonical_json, make_folder
from bifrost_cli.data.weights import load_tensors, save_tensors
from bifrost_cli.errors import ArtifactError

FORMAT = "bifrost.statistics/1"


@dataclass(frozen=True)
class Statistics:
    """`mean_D` and `covariance_DD` float64 of `count` pictures; `identity` names pictures and network."""

    mean_D: np.ndarray
    covariance_DD: np.ndarray
    count: int
    identity: dict[str, Any]


def statistics_path(folder: Path, identity: dict[str, Any]) -> Path:
    """Where statistics of this identity are kept below `folder`."""
    return Path(folder) / f"{hashlib.sha256(canonical_json(identity)).hexdigest()[:24]}.safetensors"


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Write the file whole or not at all. Errors: DiskFull."""
    make_folder(path.parent)
    tensors = {"mu": statistics.mean_D, "sigma": statistics.covariance_DD}
    meta = {"format": FORMAT, "n": statistics.count, "identity": statistics.identity}
    save_tensors(path, {name: np.asarray(value, dtype=np.float64) for name, value in tensors.items()}, meta)


def load_statistics(path: Path) -> Statistics:
    """Read a file of `save_statistics`. ArtifactError: another format, missing tensors, or not float64."""
    tensors, meta = load_tensors(path)
    arrays = {name: value.numpy() for name, value in tensors.items()}
    whole = set(arrays) == {"mu", "sigma"} and isinstance(meta.get("n"), int) and isinstance(meta.get("identity"), dict)
    if meta.get("format") != FORMAT or not whole:
        raise ArtifactError(f"{path} holds no reference statistics ({FORMAT})", code="BF-ART-005")
    if {array.dtype for array in arrays.values()} != {np.dtype(np.float64)}:
        raise ArtifactError(f"{path} holds statistics in another precision than float64", code="BF-ART-005")
    return Statistics(arrays["mu"], arrays["sigma"], meta["n"], meta["identity"])
