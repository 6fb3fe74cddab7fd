"""What every kind of source gives: entries in key order, each with a way to read its bytes when asked for.

In: nothing. Out: `Entry` and `Listing`, and the rules all sources share: how a name becomes a key, that no two images
have one key, what a name may not do. A million entries stay in memory; their images never do. Knows no format.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from bifrost_cli.errors import DataError

LOOKED_FOR = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")
EXTENSIONS = {f".{name}" for name in (*LOOKED_FOR, "jpe", "jfif", "apng")}
OUTSIDE = "a link to a file outside the source folder"


@dataclass(frozen=True, slots=True)
class SourceItem:
    """One image that a source offers, not yet opened.

    `read()` gives the image file's bytes, the same ones each time, or BadImage. `where` names it for people. `caption`
    is None where it has none; `problem` says why not to open it.
    """

    key: str
    where: str
    read: Callable[[], bytes]
    caption: str | None = None
    plan: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Listing:
    """Entries in key order, counts of what was left aside, and lines that tell a person what was chosen."""

    entries: tuple[SourceItem, ...]
    counts: dict[str, int] = field(default_factory=dict)
    said: tuple[str, ...] = ()


def in_key_order(entries: Iterable[SourceItem]) -> tuple[SourceItem, ...]:
    return tuple(sorted(entries, key=lambda entry: entry.key))


def key_of(name: str) -> str:
    """The row key of an image: its name in the source without the extension, percent-escaped. It holds no `#`."""
    return quote(os.fsencode(_stem(name)), safe="/")


def _stem(name: str) -> str:
    return Path(name).with_suffix("").as_posix()


def refuse_twins(names: Iterable[str]) -> None:
    """DataError: two images with one key (a.jpg, a.png), or two spellings of one name (composed and decomposed
    accents)."""
    groups = defaultdict(list)
    for name in names:
        groups[unicodedata.normalize("NFC", _stem(name))].append(name)
    twins = [group for group in groups.values() if len(group) > 1]
    if twins:
        raise DataError(
            f"{len(twins)} keys belong to more than one image",
            at="\n".join(" and ".join(ascii(name) for name in group) for group in twins[:5]),
            fix="rename or remove one of each",
            code="BF-DATA-006",
        )


def leaves(name: str) -> bool:
    """Whether a name leads out of its source: absolute, home, drive, UNC and URL forms, and `..` anywhere."""
    foreign = "\\" in name or re.match(r"[A-Za-z]:|[A-Za-z0-9+.-]+://", name)
    return bool(foreign) or name.startswith(("/", "~")) or ".." in PurePosixPath(name).parts
