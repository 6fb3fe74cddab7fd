"""A draft: an artifact in the making, and the one way to make one, by writing the manifest last.

One that was cut short is continued by asking for the same thing again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from bifrost_cli.artifacts.files import canonical_json, read_json, remove, sha256_file, sweep, sync, write_json
from bifrost_cli.artifacts.identity import FORMATS, KINDS, differences, digest_of, identity_id, provenance
from bifrost_cli.artifacts.lock import Lock
from bifrost_cli.artifacts.manifest import DRAFT, MANIFEST, Artifact, payload_files, require_place
from bifrost_cli.errors import ArtifactError, StoreError, public

_Values = Mapping[str, Any] | None


class Draft:
    """An artifact in the making; holds its folder's lock until `commit` or `close`. Use as a context manager.

    `path` is the folder. `complete` is the finished Artifact when this very thing was made before (then nothing is
    locked), else None. `continued` is True when an earlier attempt at the same thing is being continued.
    """

    def __init__(self, path: Path, kind: str, identity: dict[str, Any], parents: Sequence[Artifact]) -> None:
        self.path, self.kind, self.identity, self.parents = path, kind, identity, tuple(parents)
        self.id = identity_id(kind, identity, parents)
        self.complete: Artifact | None = None
        self.continued = False
        self._lock = Lock(path)
        self._started = time.monotonic()

    @classmethod
    def open(cls, path: Path | str, kind: str, identity: Mapping[str, Any], parents: Sequence[Artifact] = ()) -> Draft:
        """Create the folder, or continue the draft that is there.

        ArtifactError BF-ART-003 (a latents store: StoreError BF-STORE-003) when the folder holds something else, and
        BF-ART-006 when another process writes it; UsageError when it holds files that are not ours.
        """
        if kind not in KINDS:
            raise ValueError(f"no such kind: {kind}")
        draft = cls(Path(path), kind, json.loads(canonical_json(dict(identity))), parents)
        require_place(draft.path)  # before the lock: nothing is written into a folder that is not ours
        finished = (draft.path / MANIFEST).exists() and not (draft.path / DRAFT).exists()
        try:
            if not finished:
                draft._lock.acquire()
                sweep(draft.path)
            if finished or (draft.path / MANIFEST).exists():
                draft.complete = Artifact.open(draft.path)
                draft._require_same(draft.complete.manifest, "a finished")
                remove(draft.path / DRAFT)  # of a commit that was cut short
                draft.close()
            elif (draft.path / DRAFT).exists():
                draft._require_same(read_json(draft.path / DRAFT), "an unfinished")
                draft.continued = True
            else:
                write_json(draft.path / DRAFT, draft._header())
        except BaseException:
            draft.close()
            raise
        return draft

    def commit(
        self,
        info: _Values = None,
        *,
        made: _Values = None,
        cost: _Values = None,
        hashed: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Artifact:
        """Make the draft an artifact: hash and fsync the payload, write the manifest last, release the lock.

        `made` adds to who and when (device, seed), `cost` to the wall time of this process, or replaces it. `hashed`
        has {"sha256", "size"} of files that were hashed as they were written, and are not read again.
        """
        files = {}
        for name in payload_files(self.path):
            path = self.path / name
            if not path.name.startswith("."):  # a file browser's or NFS's own
                sync(path)
                size, known = path.stat().st_size, (hashed or {}).get(name, {})
                sha256 = known["sha256"] if known.get("size") == size else sha256_file(path)
                files[name] = {"sha256": sha256, "size": size}
        for folder in {(self.path / name).parent for name in files} | {self.path}:
            sync(folder)
        manifest = {
            **self._header(),
            "parents": [{"kind": p.kind, "id": p.id, "path": seen_from(self.path, p.path)} for p in self.parents],
            "files": files,
            "made": provenance(**(made or {})),
            "cost": {"seconds": round(time.monotonic() - self._started, 3), **(cost or {})},
            "info": public(dict(info or {})),
        }
        manifest = json.loads(canonical_json(manifest))
        self._lock.require_held()
        write_json(self.path / MANIFEST, {**manifest, "digest": digest_of(manifest)})
        remove(self.path / DRAFT)
        self.close()
        return Artifact.open(self.path)

    def close(self) -> None:
        self._lock.release()

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _header(self) -> dict[str, Any]:
        parents = [{"kind": parent.kind, "id": parent.id} for parent in self.parents]
        known = {"format": FORMATS[self.kind], "kind": self.kind, "id": self.id}
        return {**known, "identity": self.identity, "parents": parents}

    def _require_same(self, found: Any, what: str) -> None:
        if not isinstance(found, dict) or not {"kind", "identity", "parents", "id"} <= set(found):
            fix = f"remove {self.path} or use -o"
            raise ArtifactError(f"{self.path / DRAFT} is damaged", fix=fix, code="BF-ART-005")
        if found["id"] == self.id:
            return
        error, code = (StoreError, "BF-STORE-003") if self.kind == "latents" else (ArtifactError, "BF-ART-003")
        old, new = quote(str(self.path)), quote(f"{self.path}-b")
        fix = f"write to a new place (-o {new}), or see the old settings: bifrost artifacts show {old}"
        if what == "a finished" and self.kind in ("branch", "controlnet"):
            fix = f"for more steps --resume {old}; else {fix}"
        message = f"{self.path} already holds {what} {found['kind']} of a different setup"
        raise error(message, at=differences(found, self._header()), fix=fix, code=code)


def seen_from(folder: Path, place: Path) -> str:
    """The way from a folder to a place: it survives a move of both, and tells nothing of the machine."""
    try:
        return Path(os.path.relpath(place.resolve(), folder.resolve())).as_posix()
    except ValueError:  # Windows: another drive
        return place.resolve().as_posix()
