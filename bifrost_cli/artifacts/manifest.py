"""An artifact: a folder whose manifest was written last, by rename. Until then it is a draft.

The identity and the payload hold no time, no path and no host. `info["recipe"]`, where a stage sets it, is the recipe.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import Any

from bifrost_cli.artifacts.files import TEMP_PREFIX, exists, read_json, sha256_file
from bifrost_cli.artifacts.identity import FORMATS, digest_of
from bifrost_cli.artifacts.lock import LOCK_NAME
from bifrost_cli.errors import ArtifactError, UsageError

MANIFEST, DRAFT, WORK = "manifest.json", "draft.json", "work"
_ID = re.compile(rf"({'|'.join(FORMATS)})-[0-9a-f]{{12}}")
_TYPES = {"id": str, "identity": dict, "parents": list, "files": dict, "made": dict, "cost": dict, "info": dict}
# Dotted names of values that may be missing, and that readers of other artifacts rely on too.
_VALUES: dict[str, Any] = {
    "made.when": str, "made.command": str, "made.versions": dict, "cost.seconds": (int, float), "cost.devices": int,
    "info.recipe": dict, "info.parameters": int, "info.funnel": dict, "info.counts": dict, "info.metrics": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Artifact:
    """A complete artifact. Opening checks the manifest; `check` reads the payload too."""

    path: Path
    manifest: dict[str, Any]
    kind: str
    id: str
    identity: dict[str, Any]
    parents: list[dict[str, Any]]
    files: dict[str, dict[str, Any]]
    info: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> Artifact:
        """Read and check `path/manifest.json`. ArtifactError: absent, a draft, of a newer format, or changed since."""
        path = Path(path)
        if not (path / MANIFEST).is_file():
            if (path / DRAFT).is_file():
                raise ArtifactError(f"{path} is unfinished", fix="give the command that made it again; it continues")
            what = f"is not an artifact: it has no {MANIFEST}" if path.exists() else "does not exist"
            raise ArtifactError(f"{path} {what}", fix="see what there is: bifrost artifacts ls")
        manifest = read_json(path / MANIFEST)
        given = manifest if isinstance(manifest, dict) else {}
        kind, version = str(given.get("kind")), given.get("format")
        if kind in FORMATS and isinstance(version, int) and version > FORMATS[kind]:
            raise ArtifactError.newer(f"{path} is a {kind} artifact", version, FORMATS[kind])
        if kind not in FORMATS or type(version) is not int or version < 1 or not _intact(path, manifest):
            what = f"{path / MANIFEST} was damaged or edited after it was written"
            raise ArtifactError(what, fix="make the artifact again, or restore the file from a copy", code="BF-ART-005")
        if odd := next(_odd(manifest), None):  # the digest fits: it was written so, and not by us
            raise ArtifactError(f"{path / MANIFEST} has a value that makes no sense: {odd}", code="BF-ART-005",
                                fix="ask for the artifact again where it comes from")  # fmt: skip
        named = ("kind", "id", "identity", "parents", "files", "info")
        return cls(path, manifest, *(manifest[name] for name in named))

    def file(self, name: str) -> Path:
        """The path of one payload file; ArtifactError when the artifact has none of that name."""
        if name not in self.files:
            raise ArtifactError(f"{self.path} has no file {name}", at=f"it has {', '.join(self.files) or 'none'}")
        return self.path / name

    def verify(self) -> list[str]:
        """Every payload file that is missing or changed, one sentence each. Empty means whole."""
        return list(self._problems())

    def check(self) -> None:
        """ArtifactError at the first payload file that is missing or changed."""
        for problem in self._problems():
            fix = f"see all: bifrost artifacts verify {quote(str(self.path))}; then make it again elsewhere"
            raise ArtifactError(f"{self.path} is damaged: {problem}", fix=fix, code="BF-ART-005")

    def strays(self) -> list[str]:
        """Files in the folder that are not part of the artifact."""
        return [name for name in payload_files(self.path) if name not in self.files]

    def _problems(self) -> Iterator[str]:
        for name, entry in self.files.items():
            path = self.path / name
            if not path.is_file():
                yield f"{name} is missing"
            elif (size := path.stat().st_size) != entry["size"]:
                yield f"{name} has {size} bytes, not {entry['size']}"
            elif (found := sha256_file(path)) != entry["sha256"]:
                yield f"{name} was changed: sha256 {found[:12]}, not {entry['sha256'][:12]}"


def payload_files(folder: Path) -> list[str]:
    """The files that belong to an artifact's payload, relative, with forward slashes, sorted."""
    return sorted(_walk(Path(folder), PurePosixPath()))


def _walk(folder: Path, prefix: PurePosixPath) -> Iterator[str]:
    skipped = {LOCK_NAME, MANIFEST, DRAFT, WORK} if not prefix.parts else set()
    for path in folder.iterdir():
        if path.name in skipped or path.name.startswith(TEMP_PREFIX):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path, prefix / path.name)
        else:
            yield str(prefix / path.name)


def require_new(output: Path) -> None:
    """Refuse an output that exists, or that lies below an artifact: UsageError BF-USE-002."""
    require_outside(output)
    if os.path.lexists(output):
        raise exists(output)


def require_outside(output: Path) -> None:
    """Refuse an output below an artifact, finished or not, which stays as it is: UsageError BF-USE-002."""
    for folder in Path(os.path.realpath(output)).parents:
        if any(_is_header(folder / name) for name in (MANIFEST, DRAFT)):
            what = f"{output} lies inside the artifact {folder}"
            raise UsageError(what, fix="choose another place with -o", code="BF-USE-002")


def require_place(path: Path) -> None:
    """Refuse a link, a file, or a folder with files that are not ours: UsageError BF-USE-002, naming what is there."""
    require_outside(path)
    fix, code = "choose another place with -o", "BF-USE-002"
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError(f"{path} exists and is not a folder", fix=fix, code=code)
    names = {entry.name for entry in path.iterdir()} if path.exists() else set()
    foreign = sorted(name for name in names if name != LOCK_NAME and not name.startswith(TEMP_PREFIX))
    if foreign and not names & {MANIFEST, DRAFT}:
        held = "it holds " + ", ".join(foreign[:5])
        raise UsageError(f"{path} exists and was not made by bifrost", at=held, fix=fix, code=code)


def _is_header(path: Path) -> bool:
    """True for our manifest or draft.json; programs of other kinds have files of these names too."""
    try:
        value = read_json(path) if os.path.isfile(path) else None
    except ArtifactError:
        return False
    return isinstance(value, dict) and {"kind", "id", "identity", "parents"} <= set(value)


def _intact(path: Path, manifest: dict[str, Any]) -> bool:
    """The digest fits, the file's bytes are the ones we write for these values (so no flipped bit can hide), the types
    are what readers rely on, and no payload file is outside the folder."""
    if not all(isinstance(manifest.get(name), kind) for name, kind in _TYPES.items()):
        return False
    body = {key: value for key, value in manifest.items() if key != "digest"}
    try:
        text = json.dumps(manifest, sort_keys=True, indent=1, ensure_ascii=False).encode("utf-8") + b"\n"
        same = manifest.get("digest") == digest_of(body) and (path / MANIFEST).read_bytes() == text
    except ValueError:  # text that has no UTF-8
        return False
    names = [PurePosixPath(name) for name in manifest["files"]]
    return same and not any(name.is_absolute() or ".." in name.parts for name in names)


def _odd(manifest: dict[str, Any]) -> Iterator[str]:
    """What no artifact of ours has, `name: value` each: readers would stumble over it, or leave the folder."""
    parents = {f"parents.{place}": parent for place, parent in enumerate(manifest["parents"])}
    wanted: dict[str, dict[str, type]] = dict.fromkeys(parents, {"kind": str, "id": str, "path": str})
    wanted |= dict.fromkeys(manifest["files"], {"sha256": str, "size": int})
    for name, part in {**parents, **manifest["files"]}.items():
        if not (isinstance(part, dict) and all(isinstance(part.get(key), kind) for key, kind in wanted[name].items())):
            yield f"{name}: {part!r:.60}"
    for name, own in [("id", manifest), *parents.items()]:
        if not (found := _ID.fullmatch(own["id"])) or found[1] != own["kind"]:
            yield f"{name}: {own['id']!r:.60}"
    for name, kind in _VALUES.items():
        section, _, key = name.partition(".")
        value = manifest[section].get(key, kind[0]() if isinstance(kind, tuple) else kind())
        if not isinstance(value, kind) or (isinstance(value, int | float) and not 0 <= value < 2**63):
            yield f"{name}: {value!r:.60}"
