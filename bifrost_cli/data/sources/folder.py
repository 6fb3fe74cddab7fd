"""A folder of images: captions in .txt files beside them, or the class that a folder stands for.

With `latents.captions: folders` (ImageNet's layout) an image's caption is the name of
the folder it lies in, looked up in `latents.class_names` where that is given. Never opens a device, follows a linked
folder, or leaves the source folder unless the recipe allows it.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bifrost_cli.config.schema import Latents
from bifrost_cli.data.images import BadImage, read_regular
from bifrost_cli.data.sources.captions import MAX_BYTES, clean_text, decode_caption
from bifrost_cli.data.sources.item import (
    EXTENSIONS,
    LOOKED_FOR,
    OUTSIDE,
    Listing,
    Problem,
    SourceError,
    SourceItem,
    in_key_order,
    key_of,
)
from bifrost_cli.errors import DataError

TABLE_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_REFUSED = {".eps", ".ps", ".pdf", ".svg", ".ico", ".psd", ".heic", ".heif", ".avif"}  # seen, and refused by content
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")


def list_folder(root: Path, rules: Latents) -> Listing:
    """The images of a folder. DataError: none. SourceError: classes without a name, each listed."""
    counts: Counter[str] = Counter()
    classes = rules.captions == "folders"
    paths = list(walk(root, rules.recursive or classes, counts))
    if not paths:
        raise _no_images(root, counts)
    names = [path.relative_to(root).as_posix() for path in paths]
    problems: list[Problem] = []
    said: tuple[str, ...] = ()
    if classes:
        captions, said = _class_captions(root, paths, rules)
    else:
        captions = {path: _text_caption(path.with_suffix(".txt"), root, rules, problems) for path in paths}
        if not any(captions.values()):
            refuse_tables_below(root)
    unread = {problem.where for problem in problems}
    named = [
        (name, SourceItem(key_of(name), str(path), partial(read_regular, path), captions.get(path),
                          problem=None if inside(path, root, rules) else OUTSIDE))
        for name, path in zip(names, paths, strict=True) if str(path.with_suffix(".txt")) not in unread
    ]  # fmt: skip
    entries, everything = in_key_order(named, problems)
    return Listing(entries, dict(counts), said, everything)


def table_in(root: Path) -> Path | None:
    """The table that Hugging Face's imagefolder keeps beside the images."""
    return next((root / name for name in TABLE_NAMES if (root / name).exists()), None)


def refuse_tables_below(root: Path) -> None:
    """DataError: the captions are in tables of the folders below, each a source of its own."""
    if below := [table for folder in sorted(root.iterdir()) if folder.is_dir() and (table := table_in(folder))]:
        raise DataError(
            f"the captions of {root} are in tables of the folders below it",
            at="\n".join(map(str, below[:5])),
            fix=f"give the folder of one: {below[0].parent}",
            code="BF-DATA-002",
        )


def walk(folder: Path, recursive: bool, counts: Counter[str]) -> Iterator[Path]:
    """Every file that looks like an image; what is passed over is counted."""
    for file in sorted(os.scandir(folder), key=lambda file: file.name):
        path = Path(file.path)
        if file.name.startswith("."):
            counts["hidden files"] += 1
        elif file.is_dir(follow_symlinks=False) and recursive:
            yield from walk(path, recursive, counts)
        elif os.path.isdir(path):  # unlike DirEntry.is_dir, False for a loop of links
            counts["linked folders not entered" if file.is_symlink() else "folders not entered"] += 1
        elif _looks_like_image(path):
            yield path
        else:
            counts[f"{path.suffix.lower() or 'other'} files"] += 1


def inside(path: Path, root: Path, rules: Latents) -> bool:
    """Whether the file that `path` means lies below `root`, or need not."""
    return rules.allow_outside or Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def _looks_like_image(path: Path) -> bool:
    if path.suffix:
        return path.suffix.lower() in EXTENSIONS | _REFUSED
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with open(path, "rb") as stream:
            return stream.read(4).startswith(_MAGIC)
    except OSError:
        return False


def _no_images(root: Path, counts: Counter[str]) -> DataError:
    refuse_tables_below(root)
    seen = ", ".join(f"{number} {name}" for name, number in counts.items()) or "nothing"
    fix = "give a folder that holds images"
    if counts[".tar files"]:
        fix = f"name the archives: '{root}/NAME-{{000..099}}.tar'"
    elif counts["linked folders not entered"]:
        fix = "links to folders are not followed: give the folder that one leads to"
    elif counts["folders not entered"]:
        fix = "look into the folders too: --set latents.recursive=true"
    return DataError(f"no images in {root}, looked for {'/'.join(LOOKED_FOR)}", at=f"it holds {seen}", fix=fix)


# ---- captions beside the images ------------------------------------------------------------------------------------


def _text_caption(path: Path, root: Path, rules: Latents, problems: list[Problem]) -> str | None:
    if not path.exists():
        return None
    try:
        if not inside(path, root, rules):
            raise ValueError(OUTSIDE)
        if path.stat().st_size > 4 * MAX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes, more than {MAX_BYTES}")
        return decode_caption(read_regular(path)) or None
    except (ValueError, BadImage) as error:
        problems.append(Problem("caption", str(path), getattr(error, "message", str(error))))
        return None


# ---- captions from the folders' names --------------------------------------------------------------------------------


def _class_captions(root: Path, paths: list[Path], rules: Latents) -> tuple[dict[Path, str | None], tuple[str, ...]]:
    """The name of each image's folder; an image in `root` itself has none."""
    folders = sorted({path.parent for path in paths} - {root})
    names = class_names(rules.class_names) if rules.class_names else None
    if names is None:
        found: dict[Path, str | None] = {
            folder: clean_text(os.fsencode(folder.name).decode("utf-8", "replace")) for folder in folders
        }
    else:
        found = {folder: names.get(folder.name) for folder in folders}
    if unnamed := [folder for folder in folders if not found[folder]]:
        problems = [Problem("class", str(folder), "not in the list") for folder in unnamed]
        raise SourceError(
            f"{len(unnamed)} of {len(folders)} classes have no name in {rules.class_names}",
            problems,
            fix="add a line for each: the folder's name, a space, the caption",
            code="BF-DATA-002",
        )
    source = f"from {rules.class_names}" if rules.class_names else "the folders' names as they are"
    return {path: found.get(path.parent) for path in paths}, (f"captions: {len(folders)} classes, {source}",)


def class_names(path: str) -> dict[str, str]:
    """Lines `n01440764 tench, Tinca tinca` (ImageNet's LOC_synset_mapping.txt, words.txt): folder -> caption."""
    try:
        lines = decode_caption_lines(read_regular(Path(path)))
        pairs = [(*line.split(maxsplit=1), "")[:2] for line in lines if line.strip()]
    except (BadImage, ValueError) as error:
        raise DataError(
            f"the class names {path} cannot be read: {getattr(error, 'message', error)}", code="BF-DATA-002"
        ) from error
    return {name: clean_text(caption) for name, caption in pairs}


def decode_caption_lines(data: bytes) -> list[str]:
    """UTF-8 lines of any number; ValueError names the byte that is not text."""
    try:
        return data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
