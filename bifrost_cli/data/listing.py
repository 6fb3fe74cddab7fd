"""What a folder or a metadata.jsonl offers: image paths and their captions, not yet opened.

In: a folder of images with .txt captions beside them, or a metadata.jsonl of {"file_name", "caption" or "text",
"plan"}. Out: `Entry`s in key order, and counts of what was left aside. Never opens a device, follows a linked folder,
or leaves the source folder unless the recipe allows it. Does not decode images.
"""

from __future__ import annotations

import json
import os
import re
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from bifrost_cli.config import Latents
from bifrost_cli.data.caption_text import MAX_BYTES, clean_text, decode_caption
from bifrost_cli.data.images import BadImage, read_regular
from bifrost_cli.data.problems import Problem, SourceError
from bifrost_cli.errors import DataError

METADATA = "metadata.jsonl"
LOOKED_FOR = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")
_EXTENSIONS = {f".{name}" for name in (*LOOKED_FOR, "jpe", "jfif", "apng")}
_REFUSED = {".eps", ".ps", ".pdf", ".svg", ".ico", ".psd", ".heic", ".heif", ".avif"}  # seen, and refused by content
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Entry:
    """One image the source offers. `caption` is None where it has none; `problem` says why not to open the image."""

    key: str
    path: Path
    caption: str | None = None
    plan: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Listing:
    entries: tuple[Entry, ...]
    counts: dict[str, int]


def list_source(source: Path, rules: Latents) -> Listing:
    """Entries of a folder or a .jsonl file, sorted by key.

    DataError: nothing there, no images, two images with one key. SourceError: caption files that cannot be read, broken
    lines, paths that leave the folder (each problem listed).
    """
    try:
        if source.is_file() and source.suffix == ".jsonl":
            return _from_metadata(source, rules)
        if not source.is_dir():
            raise DataError(
                f"{source} is not a folder of images" if source.exists() else f"{source} does not exist",
                fix="give a folder of images with .txt captions, a metadata.jsonl, or shapes:2048",
            )
        metadata = source / METADATA
        return _from_metadata(metadata, rules) if metadata.exists() else _from_folder(source, rules)
    except PermissionError as error:
        raise DataError(f"{error.filename} is not readable by this user") from error


def _from_folder(root: Path, rules: Latents) -> Listing:
    counts: Counter[str] = Counter()
    paths = list(_walk(root, rules, counts))
    if not paths:
        seen = ", ".join(f"{number} {name}" for name, number in counts.items()) or "nothing"
        nested = counts["folders not entered"] > 0
        raise DataError(
            f"no images in {root}, looked for {'/'.join(LOOKED_FOR)}",
            at=f"it holds {seen}",
            fix="look into the folders too: --set latents.recursive=true"
            if nested
            else "give a folder that holds images",
        )
    _refuse_twins([path.relative_to(root) for path in paths])
    problems: list[Problem] = []
    entries = [_folder_entry(path, root, rules, problems) for path in paths]
    if problems:
        raise SourceError(f"{len(problems)} captions in {root} cannot be read", problems, code="BF-DATA-002")
    return Listing(tuple(sorted(entries, key=lambda entry: entry.key)), dict(counts))


def _walk(folder: Path, rules: Latents, counts: Counter[str]) -> Iterator[Path]:
    for found in sorted(os.scandir(folder), key=lambda found: found.name):
        path = Path(found.path)
        if found.name.startswith("."):
            counts["hidden files"] += 1
        elif found.is_dir(follow_symlinks=False) and rules.recursive:
            yield from _walk(path, rules, counts)
        elif os.path.isdir(path):  # unlike DirEntry.is_dir, False for a loop of links
            counts["folders not entered"] += 1
        elif _looks_like_image(path):
            yield path
        else:
            counts[f"{path.suffix.lower() or 'other'} files"] += 1


def _looks_like_image(path: Path) -> bool:
    if path.suffix:
        return path.suffix.lower() in _EXTENSIONS | _REFUSED
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with open(path, "rb") as stream:
            return stream.read(4).startswith(_MAGIC)
    except OSError:
        return False


def key_of(relative: Path) -> str:
    """The row key of an image: its path in the source without the extension, percent-escaped."""
    return quote(os.fsencode(relative.with_suffix("").as_posix()), safe="/")


def _refuse_twins(relatives: list[Path]) -> None:
    """Two images with one key (a.jpg, a.png), or two spellings of one name (composed and decomposed accents)."""
    groups = defaultdict(list)
    for relative in relatives:
        groups[unicodedata.normalize("NFC", relative.with_suffix("").as_posix())].append(relative)
    twins = [group for group in groups.values() if len(group) > 1]
    if twins:
        raise DataError(
            f"{len(twins)} keys belong to more than one image",
            at="\n".join(" and ".join(ascii(path.as_posix()) for path in group) for group in twins[:5]),
            fix="rename or remove one of each",
            code="BF-DATA-006",
        )


def _folder_entry(path: Path, root: Path, rules: Latents, problems: list[Problem]) -> Entry:
    key = key_of(path.relative_to(root))
    problem = None if _inside(path, root, rules) else "a link to a file outside the source folder"
    text_path = path.with_suffix(".txt")
    if not text_path.exists():
        return Entry(key, path, problem=problem)
    try:
        if not _inside(text_path, root, rules):
            raise ValueError("a link to a file outside the source folder")
        if text_path.stat().st_size > 4 * MAX_BYTES:
            raise ValueError(f"{text_path.stat().st_size} bytes, more than {MAX_BYTES}")
        return Entry(key, path, decode_caption(read_regular(text_path)) or None, problem=problem)
    except (ValueError, BadImage) as error:
        problems.append(Problem("caption", str(text_path), getattr(error, "message", str(error))))
        return Entry(key, path)


def _inside(path: Path, root: Path, rules: Latents) -> bool:
    if rules.allow_outside:
        return True
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def _from_metadata(metadata: Path, rules: Latents) -> Listing:
    root, problems, entries = metadata.parent, [], []
    for number, line in enumerate(read_regular(metadata).removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            entries.append(_metadata_entry(line, root, rules))
        except (ValueError, RecursionError) as error:
            problems.append(Problem("metadata", f"{metadata}:{number}", str(error)))
    if problems:
        raise SourceError(f"{len(problems)} lines of {metadata} cannot be used", problems, code="BF-DATA-005")
    if not entries:
        raise DataError(
            f"no images in {metadata}: it has no lines", fix='write lines {"file_name": "a.jpg", "caption": "..."}'
        )
    _refuse_twins([entry.path.relative_to(root) for entry in entries])
    listed = {entry.path for entry in entries}
    unlisted = sum(path not in listed for path in _walk(root, rules, Counter()))
    return Listing(
        tuple(sorted(entries, key=lambda entry: entry.key)), {f"images not in {METADATA}": unlisted} if unlisted else {}
    )


def _metadata_entry(line: bytes, root: Path, rules: Latents) -> Entry:
    if len(line) > _LINE_BYTES:
        raise ValueError(f"a line of {len(line)} bytes")
    value = json.loads(line.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    name = _text(value, "file_name")
    if not name:
        raise ValueError(f"no file_name; it has {', '.join(map(str, value)) or 'nothing'}")
    if not rules.allow_outside and _leaves(name):
        raise ValueError(f"file_name {name!r} leaves the source folder (latents.allow_outside is false)")
    path = root / name
    problem = None if _inside(path, root, rules) else "a link to a file outside the source folder"
    caption = _text(value, "caption") or _text(value, "text")
    relative = path.relative_to(root) if path.is_relative_to(root) else Path(*path.parts[1:])
    return Entry(key_of(relative), path, caption or None, _text(value, "plan") or None, problem)


def _text(value: dict[str, Any], field: str) -> str:
    text = value.get(field)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{field} is not text")
    return clean_text(text)


def _leaves(name: str) -> bool:
    """Absolute, home, drive and UNC paths, and `..` anywhere."""
    windows = "\\" in name or re.match(r"[A-Za-z]:", name)
    return bool(windows) or name.startswith(("/", "~")) or ".." in PurePosixPath(name).parts
