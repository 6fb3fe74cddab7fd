"""A workspace: a folder of artifacts, and the list of those that its commands wrote elsewhere; what of it can go.

Drafts and damaged folders are reported, never used.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import NamedTuple

import bifrost_cli
from bifrost_cli.artifacts.files import TEMP_PREFIX, append, make_folder, remove
from bifrost_cli.artifacts.lock import Lock, is_held, is_locked
from bifrost_cli.artifacts.manifest import DRAFT, MANIFEST, Artifact
from bifrost_cli.errors import ArtifactError, BifrostError, UsageError

SHIPPED = ("builtin:branch", "builtin:branch-linear", "builtin:controlnet")
MAKERS = {
    "latents": "bifrost extract-latents",
    "branch": "bifrost train branch",
    "controlnet": "bifrost train controlnet",
    "samples": 'bifrost generate "a red circle above a blue square" -o out.png',
    "report": "bifrost eval --fid",
}
GENERATIONS = 100  # of a lineage; ours has four
OUTSIDE = ".outside"  # in a workspace: a line of JSON for the path of each artifact that was written elsewhere
BUILTIN = Path(__file__).parents[1] / "builtin"  # what ships with the package: models, and a trained artifact a kind
_IN_USE = 3600  # seconds in which a temporary folder that no lock covers may still be written


@dataclass(frozen=True)
class Survey:
    """What a workspace holds: artifacts newest first, unfinished folders, and broken ones with the reason."""

    artifacts: list[Artifact] = field(default_factory=list)
    drafts: list[Path] = field(default_factory=list)
    broken: list[tuple[Path, str]] = field(default_factory=list)


class Ancestor(NamedTuple):
    """One line of a lineage; `artifact` is None when it is not here any more."""

    depth: int
    kind: str
    id: str
    artifact: Artifact | None


class Removable(NamedTuple):
    """A file or folder that can go: what it is, and how many bytes it holds."""

    path: Path
    what: str
    size: int


def default_path(workspace: Path | str, kind: str, identity: str) -> Path:
    """Where an artifact goes when nobody says: `workspace/kind-hash`. `identity` is an id, with or without its kind."""
    return Path(workspace) / f"{kind}-{identity.removeprefix(kind + '-')}"


def survey(workspace: Path | str, *, outside: bool = False) -> Survey:
    """Look at every folder of a workspace; one that does not exist is empty. With `outside` also at what its commands
    wrote elsewhere (`remember_outside`), where it still is."""
    result, root = Survey(), Path(workspace)
    folders = sorted(root.iterdir()) if root.is_dir() else []
    for path in [*folders, *(_outside(root) if outside else ())]:
        try:
            if (path / MANIFEST).is_file():
                result.artifacts.append(Artifact.open(path))
            elif (path / DRAFT).is_file():
                result.drafts.append(path)
        except ArtifactError as error:
            result.broken.append((path, error.message))
        except OSError as error:  # a folder of another user
            result.broken.append((path, f"{path} cannot be read: {error.strerror}"))
    result.artifacts.sort(key=lambda artifact: artifact.manifest["made"].get("when", ""), reverse=True)
    return result


def remember_outside(workspace: Path | str, path: Path) -> None:
    """Note an artifact that was written outside its workspace, so that `survey` finds it; where it can be written. One
    whole line is appended, so that commands that end together lose none."""
    root, target = Path(os.path.realpath(workspace)), Path(os.path.realpath(path))
    if target.parent == root or target.is_relative_to(BUILTIN) or target in map(Path.resolve, _outside(root)):
        return
    with contextlib.suppress(BifrostError, OSError, ValueError):
        make_folder(root)
        append(root / OUTSIDE, json.dumps(Path(os.path.relpath(target, root)).as_posix()) + "\n")


def _outside(root: Path) -> list[Path]:
    """The noted folders that are still there, each once, as a person would type them from here."""
    try:
        lines = (root / OUTSIDE).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    found: dict[Path, None] = {}
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, OSError):  # half a line, after a power cut
            path = Path(os.path.realpath(root / json.loads(line)))
            if path.is_dir() and path.parent != Path(os.path.realpath(root)):
                found[path] = None
    here = Path(os.path.realpath("."))
    return [path.relative_to(here) if here in path.parents else path for path in found]


def find(workspace: Path | str, kind: str | None = None) -> list[Artifact]:
    """The complete artifacts of a workspace, newest first."""
    return [artifact for artifact in survey(workspace).artifacts if kind in (None, artifact.kind)]


def newest(workspace: Path | str, kind: str) -> Artifact:
    """The newest complete artifact of a kind; ArtifactError saying which command makes one."""
    there = survey(workspace)
    for artifact in there.artifacts:
        if artifact.kind == kind:
            return artifact
    drafts = [path.name for path in there.drafts if path.name.startswith(kind)]
    at = f"unfinished: {', '.join(drafts)}" if drafts else None
    raise ArtifactError(f"there is no {kind} artifact in {workspace}", at=at, fix=f"make one: {MAKERS[kind]}")


def resolve(workspace: Path | str, ref: Path | str, kind: str | None = None) -> Artifact:
    """The artifact that `ref` means, of this `kind` or of any.

    Args:
        workspace: where ids are looked up.
        ref: a folder, an id, the beginning of an id (with or without its kind), `hub:ORG/NAME[@REVISION]`, or what
            ships with the package: `builtin:branch`, `builtin:branch-linear`, `builtin:controlnet`, or `builtin` where
            `kind` says which.

    Raises:
        ArtifactError: there is none, several match, or it is of another kind.
    """
    if not str(ref).strip():
        raise UsageError("the reference to an artifact is empty", fix="see what there is: bifrost artifacts ls")
    artifact = _look_up(workspace, str(ref), kind)
    if kind not in (None, artifact.kind):
        what = f"{artifact.path} is a {artifact.kind} artifact, not {kind}"
        raise ArtifactError(what, fix=f"make one: {MAKERS[str(kind)]}")
    return artifact


def _look_up(workspace: Path | str, ref: str, kind: str | None) -> Artifact:
    if ref == "builtin" or ref.startswith("builtin:"):
        own = ref.partition(":")[2] or str(kind)
        if (BUILTIN / own / MANIFEST).is_file():
            return Artifact.open(BUILTIN / own)
        what = f"no {own} artifact ships with bifrost" if own in MAKERS else f"builtin {own} names no artifact"
        fix = "give builtin:branch or builtin:controlnet, or see what there is: bifrost artifacts ls"
        raise ArtifactError(what, fix=fix)
    if ref.startswith("hub:"):
        return Artifact.open(bifrost_cli.from_hub(ref))  # a room above fetches it
    if Path(ref).is_dir():
        return Artifact.open(Path(ref))
    found = survey(workspace, outside=True).artifacts
    matches = [a for a in found if a.id.startswith(ref) or a.id.split("-")[-1].startswith(ref)]
    if len(matches) > 1:
        raise ArtifactError(f"{ref} can mean {len(matches)} artifacts", at=", ".join(a.id for a in matches[:5]))
    if not matches:
        known = ", ".join(artifact.id for artifact in found[:5]) or "nothing"
        fix = f"see all: bifrost artifacts ls -w {quote(str(workspace))}"
        raise ArtifactError(f"there is no artifact {ref}", at=f"{workspace} holds {known}", fix=fix)
    return matches[0]


def lineage(artifact: Artifact, *workspaces: Path | str) -> list[Ancestor]:
    """The artifact and all it was made from, depth first; parents are known by id, their path is a hint.

    What was used twice is followed once. ArtifactError BF-ART-005: one is its own ancestor, as no hash of ours can be.
    """
    places = (artifact.path.parent, *workspaces)
    known = {found.id: found for place in places for found in survey(place, outside=True).artifacts}

    followed: set[str] = set()

    def ancestors(artifact: Artifact, above: tuple[str, ...]) -> Iterator[Ancestor]:
        yield Ancestor(len(above), artifact.kind, artifact.id, artifact)
        line = (*above, artifact.id)
        for parent in artifact.parents if artifact.id not in followed else ():
            if parent["id"] in line or len(line) > GENERATIONS:
                what = f"{artifact.path} was made from itself" if parent["id"] in line else "the lineage has no end"
                raise ArtifactError(what, at=parent["id"], fix="ask for it where it comes from", code="BF-ART-005")
            found = known.get(parent["id"])
            with contextlib.suppress(ArtifactError, OSError, ValueError):
                found = found or Artifact.open(artifact.path / parent["path"])
            if found and found.id == parent["id"]:
                yield from ancestors(found, line)
            else:
                yield Ancestor(len(line), parent["kind"], parent["id"], None)
        followed.add(artifact.id)

    return list(ancestors(artifact, ()))


def removable(workspace: Path, refs: Sequence[str]) -> list[Removable]:
    """The artifacts and unfinished folders that `refs` name, none of which another artifact needs. ArtifactError: one
    that stays was made from one of them, one is being written, or there is none. UsageError: one ships with the
    package, or its folder holds files that are not part of it."""
    chosen: dict[Path, Artifact | None] = {}
    items: dict[Path, Removable] = {}
    for ref in refs:
        artifact = None if (Path(ref) / DRAFT).is_file() else resolve(workspace, ref)
        path = artifact.path if artifact else Path(ref)
        if path.resolve().is_relative_to(BUILTIN.resolve()):
            raise UsageError(f"{path} ships with bifrost and is not removed", fix="leave it out")
        if is_locked(path):
            Lock(path).acquire().release()  # says by whom
        if artifact and (strays := artifact.strays()):
            what, fix = f"{path} holds files that are not part of the artifact", "move them elsewhere first"
            raise UsageError(what, at=", ".join(strays[:5]), fix=fix)
        chosen[path.resolve()] = artifact
        items[path.resolve()] = Removable(path, artifact.id if artifact else "unfinished", _size(path))
    everything = survey(workspace, outside=True).artifacts
    staying = [artifact for artifact in everything if artifact.path.resolve() not in chosen]
    going = {artifact.id for artifact in chosen.values() if artifact} - {artifact.id for artifact in staying}
    for child in staying:
        for needed in (parent["id"] for parent in child.parents if parent["id"] in going):
            what = f"{needed} is needed: {child.id} was made from it"
            fix = f"remove both, or neither: bifrost artifacts rm {needed} {child.id}"
            raise ArtifactError(what, at=str(child.path), fix=fix, code="BF-ART-011")
    return list(items.values())


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


def _temporary(workspace: Path) -> Iterator[Path]:
    """Temporary names in the workspace and in its artifacts; in folders that nobody writes, or not written for long."""
    for path in sorted(workspace.iterdir()) if workspace.is_dir() else ():
        if path.name.startswith(TEMP_PREFIX):
            written = max(inner.lstat().st_mtime for inner in (path, *path.rglob("*")))
            if time.time() - written > _IN_USE and not is_held(path):
                yield path
        elif os.path.isfile(path / MANIFEST) and not is_locked(path):  # a private folder is not ours to look into
            yield from sorted(path.glob(f"{TEMP_PREFIX}*"))


def _size(path: Path) -> int:
    return sum(inner.lstat().st_size for inner in (path, *path.rglob("*")) if not inner.is_dir())
