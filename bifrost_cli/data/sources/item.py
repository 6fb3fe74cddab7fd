"""What every kind of source gives: images with captions, in key order, and the problems that were met. A million
entries stay in memory; their images never do."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from bifrost_cli.errors import DataError

OUTSIDE = "a link to a file outside the source folder (--set latents.allow_outside=true follows it)"
_SHOWN = 5


@dataclass(frozen=True)
class Problem:
    """What kind (caption, image, ...), where, and why."""

    event: str
    where: str
    reason: str


class SourceError(DataError):
    """Problems of one kind that stop the command; `problems` holds every one."""

    def __init__(self, message: str, problems: Sequence[Problem], *, code: str, fix: str | None = None) -> None:
        self.problems, self.all_shown = tuple(problems), len(problems) <= _SHOWN
        more = [] if self.all_shown else [f"and {len(problems) - _SHOWN} more"]
        shown = [f"{problem.where}: {problem.reason}" for problem in problems[:_SHOWN]]
        super().__init__(message, at="\n".join(shown + more), fix=fix or "mend or remove them", code=code)


@dataclass(frozen=True, slots=True)
class SourceItem:
    """One image that a source offers, not yet opened. `read()` gives the image file's bytes, the same ones each time,
    or BadImage. `where` names it for people. `caption` is None where it has none; `problem` says why not to open it."""

    key: str
    where: str
    read: Callable[[], bytes]
    caption: str | None = None
    plan: str | None = None
    problem: str | None = None


Found = tuple[str, SourceItem] | Problem  # an image with its name in the source, or what cannot be used


@dataclass(frozen=True)
class Listing:
    """Entries in key order, counts of what was left aside, lines that tell a person what was chosen, and problems that
    stop an extraction: captions, rows or keys that cannot be used, each of which costs its own entry and no other."""

    entries: tuple[SourceItem, ...]
    counts: dict[str, int] = field(default_factory=dict)
    said: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    @classmethod
    def of(cls, found: Iterable[Found], counts: Mapping[str, int] | None = None, said: tuple[str, ...] = ()) -> Listing:
        """Two images with one key (a.jpg, a.png), or two spellings of one name (composed and decomposed accents), are a
        problem and no entries. Rows of one image that differ in their caption are rows of their own, `#1`, `#2` and so
        on after the key. `counts` may be filled while `found` is read."""
        groups: dict[str, list[tuple[str, SourceItem]]] = defaultdict(list)
        problems, entries = [], []
        for one in found:
            if isinstance(one, Problem):
                problems.append(one)
            else:
                groups[unicodedata.normalize("NFC", Path(one[0]).with_suffix("").as_posix())].append(one)
        for group in groups.values():
            if len({(name, entry.where) for name, entry in group}) > 1:
                names = " and ".join(ascii(name) for name, _ in group)
                problems.append(Problem("key", names, "one key for several images"))
                continue
            different: dict[Any, SourceItem] = {}
            for _, entry in group:
                different.setdefault((entry.caption, entry.plan), entry)
            first, *others = different.values()
            entries += [first, *(replace(entry, key=f"{entry.key}#{n}") for n, entry in enumerate(others, 1))]
        entries.sort(key=lambda entry: entry.key)
        return cls(tuple(entries), {name: n for name, n in (counts or {}).items() if n}, said, tuple(problems))


def key_of(name: str) -> str:
    """The row key of an image: its name in the source without the extension, percent-escaped. It holds no `#`. Of
    an address it holds neither user nor password, and a hash in place of the query: they may be secrets."""
    stem = Path(name).with_suffix("").as_posix()
    if "://" in name:
        stem, mark, query = re.sub(r"(?<=:/)[^/?]*@", "", stem, count=1).partition("?")
        stem += mark and mark + hashlib.sha256(os.fsencode(query)).hexdigest()[:12]
    return quote(os.fsencode(stem), safe="/")


def leaves(name: str) -> bool:
    """Whether a name leads out of its source: absolute, home, drive, UNC and URL forms, and `..` anywhere."""
    foreign = "\\" in name or re.match(r"[A-Za-z]:|[A-Za-z0-9+.-]+://", name)
    return bool(foreign) or name.startswith(("/", "~")) or ".." in PurePosixPath(name).parts
