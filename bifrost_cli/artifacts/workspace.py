"""A workspace: a folder of artifacts, and the list of those that its commands wrote elsewhere (`-o pictures`).

Drafts and damaged folders are reported, never used.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from bifrost_cli.artifacts.files import append, make_folder
from bifrost_cli.artifacts.manifest import DRAFT, MANIFEST, Artifact
from bifrost_cli.errors import ArtifactError, BifrostError, UsageError

SHIPPED = ("builtin:branch", "builtin:controlnet")
MAKERS = {
    "latents": "bifrost extract-latents",
    "branch": "bifrost train branch",
    "controlnet": "bifrost train controlnet",
    "samples": 'bifrost generate "a red circle above a blue square" -o out.png',
    "report": "bifrost eval --fid",
}


OUTSIDE = ".outside"  # in a workspace: a line of JSON for the path of each artifact that was written elsewhere
BUILTIN = Path(__file__).parents[1] / "builtin"  # what ships with the package: models, and a trained artifact a kind


@dataclass(frozen=True)
class Survey:
    """What a workspace holds: artifacts newest first, unfinished folders, and broken ones with the reason."""

    artifacts: list[Artifact] = field(default_factory=list)
    drafts: list[Path] = field(default_factory=list)
    broken: list[tuple[Path, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Ancestor:
    """One line of a lineage; `artifact` is None when it is not here any more."""

    depth: int
    kind: str
    id: str
    artifact: Artifact | None


def default_path(workspace: Path | str, kind: str, identity: str) -> Path:
    """Where an artifact goes when nobody says: `workspace/kind-hash`. `identity` is an id, with or without its kind."""
    return Path(workspace) / f"{kind}-{identity.removeprefix(kind + '-')}"


def survey(workspace: Path | str, *, outside: bool = False) -> Survey:
    """Look at every folder of a workspace; one that does not exist is empty.

    Args:
        workspace: the folder.
        outside: also look at what its commands wrote elsewhere (`remember_outside`), where it still is.
    """
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
    result.artifacts.sort(key=lambda artifact: str(artifact.manifest["made"].get("when", "")), reverse=True)
    return result


def remember_outside(workspace: Path | str, path: Path) -> None:
    """Note an artifact that was written outside its workspace, so that `survey` finds it.

    One whole line is appended, so that commands that end together lose none. The artifact is there whatever happens:
    a workspace that cannot be written only does not know of it.
    """
    root, target = Path(os.path.realpath(workspace)), Path(os.path.realpath(path))
    if target.parent == root or target.is_relative_to(BUILTIN) or target in map(Path.resolve, _outside(root)):
        return
    with contextlib.suppress(BifrostError, OSError, ValueError):
        make_folder(root)
        append(root / OUTSIDE, json.dumps(Path(os.path.relpath(target, root)).as_posix()) + "\n")


def _outside(root: Path) -> list[Path]:
    """The noted folders that are still there, each once."""
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
    return [_shown(path) for path in found]


def _shown(path: Path) -> Path:
    """As a person would type it: from the current folder when it is below."""
    here = Path(os.path.realpath("."))
    return path.relative_to(here) if path.is_relative_to(here) and path != here else path


def find(workspace: Path | str, kind: str | None = None) -> list[Artifact]:
    """The complete artifacts of a workspace, newest first."""
    return [artifact for artifact in survey(workspace).artifacts if kind in (None, artifact.kind)]


def newest(workspace: Path | str, kind: str) -> Artifact:
    """The newest complete artifact of a kind; ArtifactError saying which command makes one."""
    found = find(workspace, kind)
    if not found:
        drafts = [path.name for path in survey(workspace).drafts if path.name.startswith(kind)]
        raise ArtifactError(
            f"there is no {kind} artifact in {workspace}",
            at=f"unfinished: {', '.join(drafts)}" if drafts else None,
            fix=f"make one: {MAKERS[kind]}",
        )
    return found[0]


def resolve(workspace: Path | str, ref: Path | str, kind: str | None = None) -> Artifact:
    """The artifact that `ref` means.

    Args:
        workspace: where ids are looked up.
        ref: a folder, an id, the beginning of an id (with or without its kind), or what ships with the package:
            `builtin:branch`, `builtin:controlnet`, or `builtin` where `kind` says which.
        kind: what it has to be; None takes any.

    Raises:
        UsageError: an empty `ref`.
        ArtifactError: there is none, several match, or it is of another kind.
    """
    if not str(ref).strip():
        raise UsageError("the reference to an artifact is empty", fix="see what there is: bifrost artifacts ls")
    if str(ref) == "builtin" or str(ref).startswith("builtin:"):
        return _of_kind(_builtin(str(ref).partition(":")[2] or str(kind)), kind)
    folder = Path(ref)
    if folder.is_dir():
        return _of_kind(Artifact.open(folder), kind)
    found = survey(workspace, outside=True).artifacts
    matches = [a for a in found if a.id.startswith(str(ref)) or a.id.split("-")[-1].startswith(str(ref))]
    if len(matches) == 1:
        return _of_kind(matches[0], kind)
    known = ", ".join(artifact.id for artifact in found[:5]) or "nothing"
    if matches:
        raise ArtifactError(f"{ref} can mean {len(matches)} artifacts", at=", ".join(a.id for a in matches[:5]))
    raise ArtifactError(
        f"there is no artifact {ref}",
        at=f"{workspace} holds {known}",
        fix=f"see all: bifrost artifacts ls -w {quote(str(workspace))}",
    )


def _builtin(kind: str) -> Artifact:
    if not (BUILTIN / kind / MANIFEST).is_file():
        raise ArtifactError(
            f"no {kind} artifact ships with bifrost" if kind in MAKERS else f"builtin {kind} names no artifact",
            fix="give builtin:branch or builtin:controlnet, or see what there is: bifrost artifacts ls",
        )
    return Artifact.open(BUILTIN / kind)


def _of_kind(artifact: Artifact, kind: str | None) -> Artifact:
    if kind not in (None, artifact.kind):
        raise ArtifactError(
            f"{artifact.path} is a {artifact.kind} artifact, not {kind}", fix=f"make one: {MAKERS[str(kind)]}"
        )
    return artifact


def lineage(artifact: Artifact, *workspaces: Path | str) -> list[Ancestor]:
    """The artifact and all it was made from, depth first; parents are known by id, their path is a hint."""
    places = (artifact.path.parent, *workspaces)
    known = {found.id: found for place in places for found in survey(place, outside=True).artifacts}
    return _ancestors(artifact, known, 0)


def _ancestors(artifact: Artifact, known: dict[str, Artifact], depth: int) -> list[Ancestor]:
    lines = [Ancestor(depth, artifact.kind, artifact.id, artifact)]
    for parent in artifact.parents:
        found = known.get(parent["id"]) or _at_hint(artifact, parent)
        if found is None:
            lines.append(Ancestor(depth + 1, parent["kind"], parent["id"], None))
        else:
            lines.extend(_ancestors(found, known, depth + 1))
    return lines


def _at_hint(artifact: Artifact, parent: dict) -> Artifact | None:
    try:
        found = Artifact.open(artifact.path / parent["path"])
    except ArtifactError:
        return None
    return found if found.id == parent["id"] else None
