"""The hash of a frozen base, kept beside the facts of its files so that it is computed once, not at every start.

In: the recipe's models, and a loaded base where there is one. Out: sha256 over its tensors in `models.dtype`, as
artifacts record it. A hash is kept in the user's cache folder under the path, size, inode and times of every file of
the model and the versions of the libraries that read them. So a file that was written to in place is noticed even when
its size and its modification time were put back: the time of the last change (ctime) cannot be. Not noticed is what
bypasses the file system (a damaged disk), which no stat can tell; `bifrost artifacts verify` reads bytes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bifrost_cli.artifacts.files import make_folder, read_json, write_json
from bifrost_cli.artifacts.identity import digest_of, provenance
from bifrost_cli.config import Models
from bifrost_cli.errors import BifrostError
from bifrost_cli.models.mllm import Mllm
from bifrost_cli.models.painter import Painter
from bifrost_cli.stages.loading import load_mllm, load_painter
from bifrost_cli.stages.place import model_place

SETTLED = 2.0  # seconds: files touched later than this before hashing could change again within one tick of the clock
_LIBRARIES = ("torch", "transformers", "diffusers", "bifrost-cli")
_CPU = torch.device("cpu")


def mllm_hash(models: Models, loaded: Mllm | None = None) -> str:
    """Of the MLLM; `loaded` in full saves loading it when the hash is not kept."""
    return _kept("mllm", models, models.mllm, _of(load_mllm, models, models.mllm, loaded))


def painter_hash(models: Models, loaded: Painter | None = None) -> str:
    """Of the painter, as `mllm_hash`."""
    return _kept("painter", models, models.painter, _of(load_painter, models, models.painter, loaded))


def _of(load: Callable[..., Any], models: Models, ref: str, loaded: Any) -> Callable[[], str]:
    def compute() -> str:
        base = loaded or load(ref, _CPU, getattr(torch, models.dtype), revision=models.revision)
        return base.weights_hash()

    return compute


def _kept(what: str, models: Models, ref: str, compute: Callable[[], str]) -> str:
    folder = Path(model_place(ref, revision=models.revision, patterns=["model_index.json", "config.json"]))
    facts = _facts(folder)
    versions = {name: provenance()["versions"].get(name) for name in _LIBRARIES}
    key = digest_of([what, models.dtype, str(folder.resolve()), versions, facts])
    place = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bifrost" / "bases" / f"{key}.json"
    if found := _read(place):
        return found
    newest = max((max(times) for _, _, _, *times in facts), default=0) / 1e9
    settled, computed = time.time() - newest > SETTLED, compute()
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
