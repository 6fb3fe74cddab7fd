"""A latents store behind an address (s3://, https://, ...): its manifest, index and Zarr metadata are copied once, and
checked against the manifest; of its shards only the rows that are asked for are fetched."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from bifrost_cli.artifacts import Artifact
from bifrost_cli.artifacts.files import make_folder, sha256_file, write_bytes
from bifrost_cli.artifacts.manifest import MANIFEST
from bifrost_cli.data.images import BadImage
from bifrost_cli.data.sources.remote import read_place
from bifrost_cli.errors import ArtifactError, StoreError

CONNECTIONS = 16  # at least; more where there are more cores


def copy_of(address: str, cache: Path | None = None) -> Artifact:
    """The artifact at an address without its shards.

    Args:
        address: its folder.
        cache: where the copy lies, in a folder named by the store's id; None is `bifrost` in the user's cache.

    Raises:
        EnvironmentProblem: (3) the way to the store fails, or takes longer than the time limit.
        ArtifactError, StoreError: (5) there is no store, or a file is not the one in the manifest.
    """
    place = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bifrost"
    data = _fetched(address, MANIFEST)
    try:
        manifest: Any = json.loads(data)
        folder = place / PurePosixPath(str(manifest["id"])).name
        names = {str(name): entry for name, entry in manifest["files"].items() if "/c/" not in name}
        outside = [name for name in names if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{address}/{MANIFEST} is damaged: {error}", code="BF-ART-005") from error
    if outside:
        raise ArtifactError(f"{address}/{MANIFEST} names files outside of the store", at=outside[0], code="BF-ART-005")

    def fetch(name: str) -> None:
        if not (folder / name).is_file() or sha256_file(folder / name) != names[name]["sha256"]:
            make_folder((folder / name).parent)
            write_bytes(folder / name, _fetched(address, name))

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(fetch, names))
    make_folder(folder)
    write_bytes(folder / MANIFEST, data)
    return Artifact.open(folder)


def _fetched(address: str, name: str) -> bytes:
    try:
        return read_place(f"{address.rstrip('/')}/{name}")
    except BadImage as error:
        message = f"{address} is no latents store: it has no {name}"
        raise StoreError(message, at=error.message, fix="give the address of a store's folder") from error
