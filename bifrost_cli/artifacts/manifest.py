"""An artifact: a folder whose manifest was written last, by rename. Until then it is a draft.

In: a folder. Out: its manifest, checked: kind, identity (what was computed and on what), parents, payload digests; and,
apart from them, who made it and what it cost. The identity and the payload hold no time, no path and no host, so two
runs are compared by `Artifact.files`. Does not know what a payload means. `info["recipe"]`, where a stage sets it, is
the resolved recipe that `load_recipe` reads back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import Any

from bifrost_cli.artifacts.files import TEMP_PREFIX, exists, read_json, sha256_file
from bifrost_cli.artifacts.identity import FORMATS, KINDS, digest_of
from bifrost_cli.artifacts.lock import LOCK_NAME
from bifrost_cli.errors import ArtifactError, BifrostError, UsageError

MANIFEST, DRAFT, WORK = "manifest.json", "draft.json", "work"
_FIELDS = {"format", "kind", "id", "identity", "parents", "files", "made", "cost", "info", "digest"}


@dataclass(frozen=True)
class Artifact:
    """A complete artifact. Opening checks the manifest; `check` reads the payload too."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> Artifact:
        """Read and check `path/manifest.json`. ArtifactError: absent, a draft, of a newer format, or changed since."""
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise _not_complete(path)
        manifest = read_json(path / MANIFEST)
        _check_manifest(path, manifest)
        return cls(path, manifest)

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

    @property
    def id(self) -> str:
        return self.manifest["id"]

    @property
    def identity(self) -> dict[str, Any]:
        return self.manifest["identity"]

    @property
    def parents(self) -> list[dict[str, Any]]:
        return self.manifest["parents"]

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        return self.manifest["files"]

    @property
    def info(self) -> dict[str, Any]:
        return self.manifest["info"]

    def file(self, name: str) -> Path:
        """The path of one payload file; ArtifactError when the artifact has none of that name."""
        if name not in self.files:
            raise ArtifactError(f"{self.path} has no file {name}", at=f"it has {', '.join(self.files) or 'none'}")
        return self.path / name

    def verify(self) -> list[str]:
        """Every payload file that is missing or changed, one sentence each. Empty means whole."""
        return [problem for name in self.files if (problem := self._problem(name))]

    def check(self) -> None:
        """ArtifactError at the first payload file that is missing or changed."""
        for name in self.files:
            if problem := self._problem(name):
                raise ArtifactError(
                    f"{self.path} is damaged: {problem}",
                    fix=f"see all: bifrost artifacts verify {quote(str(self.path))}; then make it again elsewhere",
                    code="BF-ART-005",
                )

    def strays(self) -> list[str]:
        """Files in the folder that are not part of the artifact."""
        return [name for name in payload_files(self.path) if name not in self.files]

    def _problem(self, name: str) -> str | None:
        path, entry = self.path / name, self.files[name]
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != entry["size"]:
            return f"{name} has {size} bytes, not {entry['size']}"
        if (found := sha256_file(path)) != entry["sha256"]:
            return f"{name} was changed: sha256 {found[:12]}, not {entry['sha256'][:12]}"
        return None


def payload_files(folder: Path) -> list[str]:
    """The files that belong to an artifact's payload, relative, with forward slashes, sorted."""
    return sorted(_walk(Path(folder), PurePosixPath()))


def require_new(output: Path) -> None:
    """Refuse an output that exists, or that lies below an artifact: UsageError BF-USE-002."""
    require_outside(output)
    if os.path.lexists(output):
        raise exists(output)


def require_outside(output: Path) -> None:
    """Refuse an output below an artifact, finished or not: what an artifact holds stays as it is.

    Raises:
        UsageError: BF-USE-002, naming the artifact.
    """
    for folder in Path(os.path.realpath(output)).parents:
        if any(_is_header(folder / name) for name in (MANIFEST, DRAFT)):
            raise UsageError(f"{output} lies inside the artifact {folder}", fix="choose another place with -o",
                             code="BF-USE-002")  # fmt: skip


def _is_header(path: Path) -> bool:
    """True for our manifest or draft.json; programs of other kinds have files of these names too."""
    if not os.path.isfile(path):
        return False
    try:
        value = read_json(path)
    except ArtifactError:
        return False
    return isinstance(value, dict) and {"kind", "id", "identity", "parents"} <= set(value)


def _walk(folder: Path, prefix: PurePosixPath) -> Iterator[str]:
    skipped = {LOCK_NAME, MANIFEST, DRAFT, WORK} if not prefix.parts else set()
    for path in folder.iterdir():
        if path.name in skipped or path.name.startswith(TEMP_PREFIX):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path, prefix / path.name)
        else:
            yield str(prefix / path.name)


def _not_complete(path: Path) -> BifrostError:
    if (path / DRAFT).is_file():
        return ArtifactError(f"{path} is unfinished", fix="give the command that made it again; it continues")
    if not path.exists():
        return ArtifactError(f"{path} does not exist", fix="see what there is: bifrost artifacts ls")
    return ArtifactError(
        f"{path} is not an artifact: it has no {MANIFEST}", fix="see what there is: bifrost artifacts ls"
    )


def _check_manifest(path: Path, manifest: Any) -> None:
    kind = manifest.get("kind") if isinstance(manifest, dict) else None
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if kind in KINDS and isinstance(version, int) and version > FORMATS[kind]:
        raise ArtifactError.newer(f"{path} is a {kind} artifact", version, FORMATS[kind])
    known = kind in KINDS and type(version) is int and version >= 1
    if not known or not _FIELDS <= set(manifest) or not _intact(path, manifest):
        raise ArtifactError(
            f"{path / MANIFEST} was damaged or edited after it was written",
            fix="make the artifact again, or restore the file from a copy",
            code="BF-ART-005",
        )


def _intact(path: Path, manifest: dict[str, Any]) -> bool:
    """The digest fits and the file's bytes are the ones we write for these values (so no flipped bit can hide)."""
    body = {key: value for key, value in manifest.items() if key != "digest"}
    try:
        text = json.dumps(manifest, sort_keys=True, indent=1, ensure_ascii=False).encode("utf-8") + b"\n"
        same = manifest["digest"] == digest_of(body) and (path / MANIFEST).read_bytes() == text
    except ValueError:  # text that has no UTF-8
        return False
    return same and _well_formed(manifest)


def _well_formed(manifest: dict[str, Any]) -> bool:
    """The types that readers rely on, and no payload file outside the folder."""
    shapes = {"id": str, "identity": dict, "parents": list, "files": dict, "made": dict, "cost": dict, "info": dict}
    if not all(isinstance(manifest[name], kind) for name, kind in shapes.items()):
        return False
    paths = [PurePosixPath(name) for name in manifest["files"]]
    entries = [*manifest["files"].values()]
    return (
        not any(path.is_absolute() or ".." in path.parts for path in paths)
        and all(isinstance(entry, dict) and {"sha256", "size"} <= set(entry) for entry in entries)
        and all(isinstance(parent, dict) and {"kind", "id", "path"} <= set(parent) for parent in manifest["parents"])
    )
