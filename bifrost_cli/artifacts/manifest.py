"""An artifact: a folder whose manifest was written last, by rename. Until then it is a draft.

In: a kind, an identity (what was computed and on what), parents, payload files in the folder. Out: `manifest.json` with the digests of
everything. The identity and the payload hold no time, no path and no host, so two runs are compared by `Artifact.files`. Does not know
what a payload means. `info["recipe"]`, where a stage sets it, is the resolved recipe that `load_recipe` reads back.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from bifrost_cli.artifacts.files import (
    TEMP_PREFIX,
    canonical_json,
    read_json,
    sha256_file,
    sweep,
    sync_file,
    sync_folder,
    write_json,
)
from bifrost_cli.artifacts.identity import FORMATS, KINDS, differences, digest_of, identity_id, provenance
from bifrost_cli.artifacts.lock import LOCK_NAME, Lock
from bifrost_cli.errors import ArtifactError, BifrostError, StoreError, UsageError

MANIFEST, DRAFT, WORK = "manifest.json", "draft.json", "work"
_FIELDS = {"format", "kind", "id", "identity", "parents", "files", "made", "cost", "info", "digest"}

__all__ = ["DRAFT", "FORMATS", "KINDS", "MANIFEST", "WORK", "Artifact", "Draft", "identity_id", "payload_files"]


@dataclass(frozen=True)
class Artifact:
    """A complete artifact. Opening checks the manifest; `check` reads the payload too."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> Artifact:
        """Read and check `path/manifest.json`. ArtifactError: absent, a draft, made by a newer bifrost, or changed since."""
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
                    fix=f"see all of it: bifrost artifacts verify {self.path}; then make it again elsewhere",
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


class Draft:
    """An artifact in the making; holds its folder's lock until `commit` or `close`. Use as a context manager.

    `path` is the folder. `complete` is the finished Artifact when this very thing was made before (then nothing is locked), else None.
    `continued` is True when an earlier attempt at the same thing is being continued.
    """

    def __init__(self, path: Path, kind: str, identity: dict[str, Any], parents: Sequence[Artifact]) -> None:
        self.path, self.kind, self.identity, self.parents = path, kind, identity, tuple(parents)
        self.id = identity_id(kind, identity, parents)
        self.complete: Artifact | None = None
        self.continued = False
        self._lock = Lock(path)
        self._started = time.monotonic()

    @classmethod
    def open(
        cls, path: Path | str, kind: str, identity: Mapping[str, Any], parents: Sequence[Artifact] = ()
    ) -> Draft:
        """Create the folder, or continue the draft that is there.

        ArtifactError BF-ART-003 (a latents store: StoreError BF-STORE-003) when the folder holds something else, naming each
        difference; UsageError when it holds files that are not ours; ArtifactError BF-ART-006 when another process writes it.
        """
        if kind not in KINDS:
            raise ValueError(f"no such kind: {kind}")
        draft = cls(Path(path), kind, json.loads(canonical_json(dict(identity))), parents)
        if draft.path.is_symlink() or (draft.path.exists() and not draft.path.is_dir()):
            raise UsageError(f"{path} exists and is not a folder", fix="choose another place with -o", code="BF-USE-002")
        if (draft.path / MANIFEST).exists() and not (draft.path / DRAFT).exists():
            draft._adopt()
        else:
            draft._lock.acquire()
            try:
                draft._prepare()
            except BaseException:
                draft.close()
                raise
        return draft

    def commit(
        self,
        info: Mapping[str, Any] | None = None,
        *,
        made: Mapping[str, Any] | None = None,
        cost: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Make the draft an artifact: hash and fsync the payload, write the manifest last, release the lock.

        `made` adds to who and when (device, seed), `cost` replaces the wall time of this process and adds device and samples.
        """
        manifest = {
            "format": FORMATS[self.kind],
            "kind": self.kind,
            "id": self.id,
            "identity": self.identity,
            "parents": [{"kind": p.kind, "id": p.id, "path": self._hint(p.path)} for p in self.parents],
            "files": self._payload(),
            "made": {"when": datetime.now(timezone.utc).isoformat(), **provenance(), **(made or {})},
            "cost": {"seconds": round(time.monotonic() - self._started, 3), **(cost or {})},
            "info": dict(info or {}),
        }
        manifest = json.loads(canonical_json(manifest))
        write_json(self.path / MANIFEST, {**manifest, "digest": digest_of(manifest)})
        (self.path / DRAFT).unlink(missing_ok=True)
        self.close()
        return Artifact.open(self.path)

    def close(self) -> None:
        self._lock.release()

    def __enter__(self) -> Draft:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self) -> None:
        """Under the lock: finish a commit that was cut short, continue a draft, or begin one."""
        sweep(self.path)
        if (self.path / MANIFEST).exists():
            self._adopt()
            (self.path / DRAFT).unlink(missing_ok=True)
            self.close()
        elif (self.path / DRAFT).exists():
            self._require_same(read_json(self.path / DRAFT), "an unfinished")
            self.continued = True
        elif foreign := sorted(p.name for p in self.path.iterdir() if p.name != LOCK_NAME):
            raise UsageError(
                f"{self.path} exists and was not made by bifrost",
                at="it holds " + ", ".join(foreign[:5]),
                fix="choose another place with -o",
                code="BF-USE-002",
            )
        else:
            write_json(self.path / DRAFT, self._header())

    def _adopt(self) -> None:
        found = Artifact.open(self.path)
        self._require_same(found.manifest, "a finished")
        self.complete = found

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMATS[self.kind],
            "kind": self.kind,
            "id": self.id,
            "identity": self.identity,
            "parents": [{"kind": parent.kind, "id": parent.id} for parent in self.parents],
        }

    def _require_same(self, found: Any, what: str) -> None:
        if not isinstance(found, dict) or not {"kind", "identity", "parents", "id"} <= set(found):
            raise ArtifactError(f"{self.path / DRAFT} is damaged", fix=f"remove {self.path} or use -o", code="BF-ART-005")
        if found["id"] == self.id:
            return
        error, code = (StoreError, "BF-STORE-003") if self.kind == "latents" else (ArtifactError, "BF-ART-003")
        raise error(
            f"{self.path} already holds {what} {found['kind']} of a different setup",
            at=differences(found, self._header()),
            fix=f"write to a new place (-o {self.path}-b), or see the old settings: bifrost artifacts show {self.path}",
            code=code,
        )

    def _payload(self) -> dict[str, dict[str, Any]]:
        files = {}
        for name in payload_files(self.path):
            path = self.path / name
            sync_file(path)
            files[name] = {"sha256": sha256_file(path), "size": path.stat().st_size}
        for folder in {(self.path / name).parent for name in files} | {self.path}:
            sync_folder(folder)
        return files

    def _hint(self, parent: Path) -> str:
        """Where the parent was: beside this artifact (which survives a move of the workspace), else the full path."""
        parent = parent.resolve()
        return f"../{parent.name}" if parent.parent == self.path.resolve().parent else str(parent)


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


def _not_complete(path: Path) -> BifrostError:
    if (path / DRAFT).is_file():
        return ArtifactError(f"{path} is unfinished", fix="give the command that made it again; it continues")
    if not path.exists():
        return ArtifactError(f"{path} does not exist", fix="see what there is: bifrost artifacts ls")
    return ArtifactError(f"{path} is not an artifact: it has no {MANIFEST}", fix="see what there is: bifrost artifacts ls")


def _check_manifest(path: Path, manifest: Any) -> None:
    kind = manifest.get("kind") if isinstance(manifest, dict) else None
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if kind in KINDS and isinstance(version, int) and version > FORMATS[kind]:
        raise ArtifactError(
            f"{path} is a {kind} artifact of format {version}; this bifrost reads up to {FORMATS[kind]}",
            fix="update bifrost",
            code="BF-ART-002",
        )
    if kind not in KINDS or not _FIELDS <= set(manifest) or not _intact(path, manifest):
        raise ArtifactError(
            f"{path / MANIFEST} was damaged or edited after it was written",
            fix="make the artifact again, or restore the file from a copy",
            code="BF-ART-005",
        )


def _intact(path: Path, manifest: dict[str, Any]) -> bool:
    """The digest fits and the file's bytes are the ones we write for these values (so no flipped bit can hide)."""
    body = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(manifest, sort_keys=True, indent=1, ensure_ascii=False).encode("utf-8") + b"\n"
    names = all(not PurePosixPath(n).is_absolute() and ".." not in PurePosixPath(n).parts for n in manifest["files"])
    return names and manifest["digest"] == digest_of(body) and (path / MANIFEST).read_bytes() == text
