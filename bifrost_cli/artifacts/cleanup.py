"""What of a workspace can be removed: artifacts that no other one needs, and leftovers of work that was given up."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bifrost_cli.artifacts.files import TEMP_PREFIX, remove
from bifrost_cli.artifacts.lock import Lock, is_held, is_locked
from bifrost_cli.artifacts.manifest import DRAFT, MANIFEST, Artifact
from bifrost_cli.artifacts.workspace import BUILTIN, resolve, survey
from bifrost_cli.errors import ArtifactError, UsageError

_IN_USE = 3600  # seconds in which a temporary folder that no lock covers may still be written


@dataclass(frozen=True)
class Removable:
    """A file or folder that can go: what it is, and how many bytes it holds."""

    path: Path
    what: str
    size: int


def removable(workspace: Path, refs: Sequence[str]) -> list[Removable]:
    """The artifacts and unfinished folders that `refs` name, none of which another artifact needs.

    Raises:
        ArtifactError: BF-ART-011 an artifact that stays was made from one of them, BF-ART-006 one is being written,
            BF-ART-001 there is none.
        UsageError: one ships with the package, or its folder holds files that are not part of it.
    """
    chosen: dict[Path, Artifact | None] = {}
    items = []
    for ref in refs:
        path, artifact = _named(workspace, ref)
        chosen[path.resolve()] = artifact
        _require_ours(path, artifact)
        items.append(Removable(path, artifact.id if artifact else "unfinished", _size(path)))
    _require_unneeded(workspace, chosen)
    return list({item.path.resolve(): item for item in items}.values())


def leftovers(workspace: Path) -> list[Removable]:
    """Unfinished folders that nobody writes, and temporary files of killed processes. Artifacts are not among them."""
    found = [Removable(path, "unfinished", _size(path)) for path in survey(workspace).drafts if not is_locked(path)]
    taken = tuple(item.path for item in found)
    found += [Removable(path, "leftover", _size(path)) for path in _temporary(workspace) if path.parent not in taken]
    return found


def remove_all(items: Sequence[Removable]) -> None:
    """Remove each, under its lock where it has one, so that nobody begins to write it meanwhile."""
    for item in items:
        if (item.path / MANIFEST).is_file() or (item.path / DRAFT).is_file():
            Lock(item.path).acquire().release()
        remove(item.path)


def _named(workspace: Path, ref: str) -> tuple[Path, Artifact | None]:
    folder = Path(ref)
    if (folder / DRAFT).is_file():
        return folder, None
    artifact = resolve(workspace, ref)
    return artifact.path, artifact


def _require_ours(path: Path, artifact: Artifact | None) -> None:
    if path.resolve().is_relative_to(BUILTIN.resolve()):
        raise UsageError(f"{path} ships with bifrost and is not removed", fix="leave it out")
    if is_locked(path):
        Lock(path).acquire().release()  # says by whom
    if artifact and (strays := artifact.strays()):
        raise UsageError(
            f"{path} holds files that are not part of the artifact",
            at=", ".join(strays[:5]),
            fix="move them elsewhere first",
        )


def _require_unneeded(workspace: Path, chosen: dict[Path, Artifact | None]) -> None:
    everything = survey(workspace, outside=True).artifacts
    staying = [artifact for artifact in everything if artifact.path.resolve() not in chosen]
    going = {artifact.id for artifact in chosen.values() if artifact} - {artifact.id for artifact in staying}
    for artifact in staying:
        needed = [parent["id"] for parent in artifact.parents if parent["id"] in going]
        if needed:
            raise ArtifactError(
                f"{needed[0]} is needed: {artifact.id} was made from it",
                at=str(artifact.path),
                fix=f"remove both, or neither: bifrost artifacts rm {needed[0]} {artifact.id}",
                code="BF-ART-011",
            )


def _temporary(workspace: Path) -> Iterator[Path]:
    """Temporary names in the workspace and in its artifacts; in folders that nobody writes, or not written for long."""
    if not workspace.is_dir():
        return
    for path in sorted(workspace.iterdir()):
        if path.name.startswith(TEMP_PREFIX):
            if time.time() - _newest(path) > _IN_USE and not is_held(path):
                yield path
        elif os.path.isfile(path / MANIFEST) and not is_locked(path):  # a private folder is not ours to look into
            yield from sorted(path.glob(f"{TEMP_PREFIX}*"))


def _newest(path: Path) -> float:
    return max(inner.lstat().st_mtime for inner in (path, *path.rglob("*")))


def _size(path: Path) -> int:
    return sum(inner.lstat().st_size for inner in (path, *path.rglob("*")) if not inner.is_dir())
