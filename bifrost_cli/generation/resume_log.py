"""Which images of an unfinished samples folder are done, so that the next attempt makes only the others.

In: the draft's folder and finished files. Out: `work/pictures.jsonl`, a line an image, written after its files; a
image counts only when every file still has the sha256 of its line (predicted latents likewise): the next attempt looks only
whether they are there, and what is there is read once, when all are. Does not know prompts or models.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bifrost_cli.artifacts.files import append, make_folder, remove, sha256_file, sweep, sync, write_bytes
from bifrost_cli.artifacts.identity import digest_of
from bifrost_cli.errors import Stopped


class ResumeLog:
    """The log of one draft. `facts[index]` is what was noted with a finished image."""

    def __init__(self, folder: Path, name: str = "pictures") -> None:
        self.folder, self._path = folder, folder / "work" / f"{name}.jsonl"
        make_folder(self._path.parent)
        lines = self._lines()
        self.facts = {line["index"]: line["facts"] for line in lines}
        self._files = {line["index"]: line["files"] for line in lines}

    def there(self, index: int) -> bool:
        """True when the image was finished and its files are there; nothing of them is read."""
        files = self._files.get(index)
        return files is not None and all((self.folder / name).is_file() for name in files)

    def done(self, index: int) -> bool:
        """True when the image's files are there and unchanged."""
        files = self._files.get(index)
        return files is not None and all(self._same(name, digest) for name, digest in files.items())

    def add(self, index: int, files: Mapping[str, bytes], facts: Mapping[str, Any]) -> None:
        """Write an image's files, then its line. DiskFull when there is no room; earlier images are kept."""
        for name, data in files.items():
            make_folder((self.folder / name).parent)
            write_bytes(self.folder / name, data)
        digests = {name: sha256_file(self.folder / name) for name in files}
        value = {"index": index, "files": digests, "facts": dict(facts)}
        line = json.dumps({**value, "digest": digest_of(value)}, ensure_ascii=False)
        append(self._path, line + "\n")
        sync(self._path)
        sync(self._path.parent)
        self._files[index], self.facts[index] = digests, dict(facts)

    def _same(self, name: str, digest: str) -> bool:
        path = self.folder / name
        return path.is_file() and sha256_file(path) == digest

    def _lines(self) -> list[dict[str, Any]]:
        """Every whole line; what a kill or a power cut left after them is cut off."""
        if not self._path.exists():
            return []
        data = self._path.read_bytes()
        lines = list(itertools.takewhile(bool, map(_line, data.splitlines(keepends=True))))
        whole = data[: sum(length for _, length in lines)]
        if whole != data:
            write_bytes(self._path, whole)
        return [line for line, _ in lines]


def tidy(folder: Path) -> None:
    """The images are an artifact: the log of which are done goes, also if the last run was killed before it could."""
    remove(folder / "work")
    sweep(folder)


def stopped(done: int, total: int, folder: Path) -> Stopped:
    """What is raised between two images when a stop was asked for."""
    return Stopped(f"stopped after {done} of {total} images; they are kept", at=str(folder),
                   fix="give the same command again; it goes on")  # fmt: skip


def _line(text: bytes) -> tuple[dict[str, Any], int] | None:
    """The value of one line and its length; None unless it is the line that was written."""
    try:
        value = json.loads(text)
        digest = value.pop("digest")
    except (ValueError, AttributeError, KeyError, TypeError):
        return None
    return (value, len(text)) if text.endswith(b"\n") and digest == digest_of(value) else None
