"""The hash of a frozen model's weights, kept in the user's cache so that it is computed once, not at every start.

It is the sha256 over its tensors in `models.dtype`, as artifacts record it, kept under the path, size, inode and times
of every file and the versions of the libraries that read them: a file written in place is noticed even when its
modification time was put back, by the time of its last change. `bifrost artifacts verify` reads the bytes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bifrost_cli.artifacts.files import make_folder, read_json, write_json
from bifrost_cli.artifacts.identity import digest_of, provenance
from bifrost_cli.config.schema import Models
from bifrost_cli.errors import BifrostError
from bifrost_cli.loading.loaders import ModelLoader
from bifrost_cli.loading.resolve import resolve_model
from bifrost_cli.models.diffusion.base import DiffusionModel
from bifrost_cli.models.mllm.frozen_mllm import Mllm

SETTLED = 2.0  # seconds: files touched later than this before hashing could change again within one tick of the clock
_LIBRARIES = ("torch", "transformers", "diffusers", "bifrost-cli")


def mllm_fingerprint(models: Models, loaded: Mllm | None = None) -> str:
    """Of the MLLM; `loaded` in full saves loading it when the hash is not kept."""
    return _cached("mllm", models, models.mllm, models.mllm_revision, ModelLoader(models).mllm, loaded)


def diffusion_fingerprint(models: Models, loaded: DiffusionModel | None = None) -> str:
    """Of the diffusion model, as `mllm_fingerprint`."""
    return _cached(
        "painter", models, models.diffusion, models.diffusion_revision, ModelLoader(models).diffusion, loaded
    )


def _cached(what: str, models: Models, ref: str, revision: str | None, load: Callable[..., Any], loaded: Any) -> str:
    folder = Path(resolve_model(ref, revision=revision, patterns=["model_index.json", "config.json"]))
    facts = _facts(folder)
    versions = {name: provenance()["versions"].get(name) for name in _LIBRARIES}
    key = digest_of([what, models.dtype, str(folder.resolve()), versions, facts])
    place = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bifrost" / "bases" / f"{key}.json"
    if found := _read(place):
        return found
    newest = max((max(times) for _, _, _, *times in facts), default=0) / 1e9
    settled = time.time() - newest > SETTLED
    computed = (loaded or load()).weights_hash()
    if settled and _facts(folder) == facts:
        _write(place, computed)
    return computed


def _facts(folder: Path) -> list[list[Any]]:
    """Name, size, inode and times of every file that a model is read from."""
    files = sorted(path for kind in ("safetensors", "json") for path in folder.rglob(f"*.{kind}"))
    stats = [(str(path.relative_to(folder)), path.stat()) for path in files]
    return [[name, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats]


def _read(place: Path) -> str | None:
    try:
        return str(read_json(place)["sha256"]) if place.is_file() else None
    except (BifrostError, KeyError, TypeError):
        return None  # a cache: what cannot be read is made again


def _write(place: Path, value: str) -> None:
    try:
        make_folder(place.parent)
        write_json(place, {"sha256": value})
    except (BifrostError, OSError):
        pass  # a home that cannot be written to only costs the time
