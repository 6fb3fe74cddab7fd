"""A draft: an artifact in the making, and the one way to make one.

An `Artifact` comes of it by writing the manifest last. A draft that was cut short is continued by asking for the same
thing again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from bifrost_cli.artifacts.files import (
    TEMP_PREFIX,
    canonical_json,
    read_json,
    remove,
    sha256_file,
    sweep,
    sync,
    write_json,
)
from bifrost_cli.artifacts.identity import FORMATS, KINDS, differences, digest_of, identity_id, provenance
from bifrost_cli.artifacts.lock import LOCK_NAME, Lock
from bifrost_cli.artifacts.manifest import DRAFT, MANIFEST, Artifact, payload_files, require_outside
from bifrost_cli.errors import ArtifactError, StoreError, UsageError


def require_place(path: Path) -> None:
    """Refuse what can become no artifact: a link, a file, or a folder with files that are not ours.

    Raises:
        UsageError: BF-USE-002, naming what is there.
    """
    require_outside(path)
    fix, code = "choose another place with -o", "BF-USE-002"
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError(f"{path} exists and is not a folder", fix=fix, code=code)
    names = {entry.name for entry in path.iterdir()} if path.exists() else set()
    foreign = sorted(name for name in names if name != LOCK_NAME and not name.startswith(TEMP_PREFIX))
    if foreign and not names & {MANIFEST, DRAFT}:
        held = "it holds " + ", ".join(foreign[:5])
        raise UsageError(f"{path} exists and was not made by bifrost", at=held, fix=fix, code=code)


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

        ArtifactError BF-ART-003 (a latents store: StoreError BF-STORE-003) when the folder holds something else,
        naming each difference; UsageError when it holds files that are not ours; ArtifactError BF-ART-006 when
        another process writes it.
        """
        if kind not in KINDS:
            raise ValueError(f"no such kind: {kind}")
        draft = cls(Path(path), kind, json.loads(canonical_json(dict(identity))), parents)
        require_place(draft.path)  # before the lock: nothing is written into a folder that is not ours
        if (draft.path / MANIFEST).exists() and not (draft.path / DRAFT).exists():
            draft._adopt()
            return draft
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

        `made` adds to who and when (device, seed), `cost` replaces the wall time of this process and adds device and
        samples.
        """
        manifest = {
            **self._header(),
            "parents": [{"kind": p.kind, "id": p.id, "path": self._hint(p.path)} for p in self.parents],
            "files": self._payload(),
            "made": provenance(**(made or {})),
            "cost": {"seconds": round(time.monotonic() - self._started, 3), **(cost or {})},
            "info": dict(info or {}),
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

    def _prepare(self) -> None:
        """Under the lock: finish a commit that was cut short, continue a draft, or begin one."""
        sweep(self.path)
        if (self.path / MANIFEST).exists():
            self._adopt()
            remove(self.path / DRAFT)
            self.close()
        elif (self.path / DRAFT).exists():
            self._require_same(read_json(self.path / DRAFT), "an unfinished")
            self.continued = True
        else:
            write_json(self.path / DRAFT, self._header())

    def _adopt(self) -> None:
        found = Artifact.open(self.path)
        self._require_same(found.manifest, "a finished")
        self.complete = found

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
        raise error(
            f"{self.path} already holds {what} {found['kind']} of a different setup",
            at=differences(found, self._header()),
            fix=f"write to a new place (-o {quote(f'{self.path}-b')}), or see the old settings: "
            f"bifrost artifacts show {quote(str(self.path))}",
            code=code,
        )

    def _payload(self) -> dict[str, dict[str, Any]]:
        files = {}
        for name in payload_files(self.path):
            path = self.path / name
            if path.name.startswith("."):
                continue  # a file browser's or NFS's own
            sync(path)
            files[name] = {"sha256": sha256_file(path), "size": path.stat().st_size}
        for folder in {(self.path / name).parent for name in files} | {self.path}:
            sync(folder)
        return files

    def _hint(self, parent: Path) -> str:
        """Where the parent was, from here: it survives a move of both, and tells nothing of the machine."""
        try:
            return Path(os.path.relpath(parent.resolve(), self.path.resolve())).as_posix()
        except ValueError:  # Windows: another drive
            return parent.resolve().as_posix()
