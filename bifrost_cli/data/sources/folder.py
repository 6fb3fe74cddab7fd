"""A folder of images: captions in .txt files beside them, or the class that a folder stands for. With
`latents.captions: folders` (ImageNet's layout) an image's caption is the name of the folder it lies in, looked up in
`latents.class_names` where that is given. Never opens a device, follows a linked folder, or leaves the source folder
unless the recipe allows it."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from bifrost_cli.config.schema import Latents
from bifrost_cli.data.images import BadImage, read_regular
from bifrost_cli.data.sources.captions import MAX_BYTES, clean_text, decode_caption
from bifrost_cli.data.sources.item import OUTSIDE, Found, Listing, Problem, SourceError, SourceItem, key_of
from bifrost_cli.errors import DataError

_LOOKED_FOR = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")
_EXTENSIONS = {f".{name}" for name in (*_LOOKED_FOR, "jpe", "jfif", "apng")}
_REFUSED = {".eps", ".ps", ".pdf", ".svg", ".ico", ".psd", ".heic", ".heif", ".avif"}  # seen, and refused by content
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")


def list_folder(root: Path, rules: Latents) -> Listing:
    """The images of a folder. DataError: none. SourceError: classes without a name, each listed."""
    counts: Counter[str] = Counter()
    classes = rules.captions == "folders"
    paths = list(walk(root, rules.recursive or classes, counts))
    captions: list[str | None | Problem] = []
    said: tuple[str, ...] = ()
    if classes and paths:
        names, said = _class_captions(root, paths, rules)
        captions = [names.get(path.parent) for path in paths]
    elif not classes:
        captions = [_text_caption(path, root, rules) for path in paths]
    if not paths or not (classes or any(isinstance(caption, str) for caption in captions)):
        if below := [table for folder in sorted(root.iterdir()) if folder.is_dir() and (table := table_in(folder))]:
            raise DataError(f"the captions of {root} are in tables of the folders below it",
                            at="\n".join(map(str, below[:5])), fix=f"give the folder of one: {below[0].parent}",
                            code="BF-DATA-002")  # fmt: skip
    if paths and not classes and rules.missing_caption == "stop" and not any(captions):
        _refuse_other_captions(root, paths, rules)
    if not paths:
        seen = ", ".join(f"{number} {name}" for name, number in counts.items()) or "nothing"
        fix = "give a folder that holds images"
        if counts[".tar files"]:
            fix = f"name the archives: '{root}/NAME-{{000..099}}.tar'"
        elif tables := next((at for at in (root, root / "data") if any(at.glob("*.parquet")) and not _holds(at)), None):
            fix = f"name the tables: '{tables}/*.parquet'"
        elif counts[".zip files"]:
            fix = "unpack the archives first: unzip NAME.zip -d NAME"
        elif counts[".arrow files"]:
            fix = f"write it as Parquet: datasets.load_from_disk({str(root)!r}).to_parquet('data.parquet')"
        elif counts["linked folders not entered"]:
            fix = "links to folders are not followed: give the folder that one leads to"
        elif counts["folders not entered"]:
            fix = "look into the folders too: --set latents.recursive=true"
        raise DataError(f"no images in {root}, looked for {'/'.join(_LOOKED_FOR)}", at=f"it holds {seen}", fix=fix)
    found: list[Found] = []
    for path, caption in zip(paths, captions, strict=True):
        if isinstance(caption, Problem):
            found.append(caption)
            continue
        name, problem = path.relative_to(root).as_posix(), None if inside(path, root, rules) else OUTSIDE
        item = SourceItem(key_of(name), str(path), partial(read_regular, path), caption, problem=problem)
        found.append((name, item))
    return Listing.of(found, counts, said)


def table_in(root: Path) -> Path | None:
    """The table that Hugging Face's imagefolder keeps beside the images."""
    tables = (root / f"metadata.{kind}" for kind in ("jsonl", "csv", "parquet"))
    return next((table for table in tables if table.exists()), None)


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
        return path.suffix.lower() in _EXTENSIONS | _REFUSED
    with suppress(OSError):
        if stat.S_ISREG(path.stat().st_mode):
            with open(path, "rb") as stream:
                return stream.read(4).startswith(_MAGIC)
    return False


def _holds(folder: Path) -> bool:
    """Whether a folder holds folders: tables of an img2dataset download lie beside those of its images."""
    return any(inner.is_dir() for inner in folder.iterdir() if not inner.name.startswith("."))


def _refuse_other_captions(root: Path, paths: list[Path], rules: Latents) -> None:
    """DataError where no image has the text file that is looked for, and images have another."""
    for other in (end for end in ("caption", "txt", "tags", "json") if end != rules.caption_extension):
        if there := sum(path.with_suffix(f".{other}").exists() for path in paths):
            fix = f"--caption-extension {other}"
            if other == "json":
                fix = 'write them into one metadata.jsonl: lines {"file_name": "a.jpg", "caption": "..."}'
            raise DataError(f"no image in {root} has a .{rules.caption_extension} beside it",
                            at=f"{there} of {len(paths)} have a .{other}", fix=fix, code="BF-DATA-002")  # fmt: skip


def _text_caption(image: Path, root: Path, rules: Latents) -> str | None | Problem:
    path = image.with_suffix(f".{rules.caption_extension}")
    if not path.exists():
        path = path.with_suffix(path.suffix.upper())
    if not path.exists():
        return None
    try:
        if not inside(path, root, rules):
            raise ValueError(OUTSIDE)
        if path.stat().st_size > 4 * MAX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes, more than {MAX_BYTES}")
        return decode_caption(read_regular(path)) or None
    except (ValueError, BadImage) as error:
        return Problem("caption", str(path), getattr(error, "message", str(error)))


def _class_captions(root: Path, paths: list[Path], rules: Latents) -> tuple[dict[Path, str], tuple[str, ...]]:
    """The caption of each folder but `root`, and a line that says where they are from."""
    folders = sorted({path.parent for path in paths} - {root})
    if rules.class_names:
        names, source = class_names(rules.class_names), f"from {rules.class_names}"
        found = {folder: names.get(folder.name, "") for folder in folders}
    else:
        source = "the folders' names as they are"
        found = {folder: clean_text(os.fsencode(folder.name).decode("utf-8", "replace")) for folder in folders}
    if unnamed := [folder for folder in folders if not found[folder]]:
        raise SourceError(f"{len(unnamed)} of {len(folders)} classes have no name in {rules.class_names}",
                          [Problem("class", str(folder), "not in the list") for folder in unnamed],
                          fix="add a line for each: the folder's name, a space, the caption",
                          code="BF-DATA-002")  # fmt: skip
    return found, (f"captions: {len(folders)} classes, {source}",)


def class_names(path: str) -> dict[str, str]:
    """Lines `n01440764 tench, Tinca tinca` (ImageNet's LOC_synset_mapping.txt, words.txt): folder -> caption."""
    try:
        lines = read_regular(Path(path)).decode("utf-8-sig").splitlines()
    except (BadImage, ValueError) as error:
        why = f"not UTF-8 at byte {error.start}" if isinstance(error, UnicodeDecodeError) else error
        why = getattr(error, "message", why)
        raise DataError(f"the class names {path} cannot be read: {why}", code="BF-DATA-002") from error
    pairs = [(*line.split(maxsplit=1), "")[:2] for line in lines if line.strip()]
    return {name: clean_text(caption) for name, caption in pairs}
