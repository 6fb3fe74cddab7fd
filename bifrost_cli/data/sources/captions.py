"""Captions from untrusted bytes, and which columns of a table hold the image, the caption and the plan.

Text stays as it is but for a byte order mark, surrounding space and line ends (\\n); Unicode is not normalised.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bifrost_cli.config.schema import Latents
from bifrost_cli.errors import DataError

MAX_BYTES = 64 * 1024
IMAGES = ("file_name", "image", "image_path", "filename", "path", "file", "jpg", "png", "webp", "img")
CAPTIONS = ("caption", "text", "prompt", "description", "txt")
PLAN = "plan"


def decode_caption(data: bytes) -> str:
    """UTF-8, or UTF-16 with a byte order mark. ValueError says what is wrong, and at which byte."""
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        name = "UTF-16" if encoding == "utf-16" else "UTF-8"
        raise ValueError(f"not {name} at byte {error.start}") from None
    return clean_text(text)


def clean_text(text: str) -> str:
    """Line ends and surrounding space put right. ValueError: NUL, half a surrogate pair, more than 64 KB."""
    if "\0" in text:
        raise ValueError(f"a NUL character at {text.index(chr(0))}")
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair at character {error.start}") from None
    if size > MAX_BYTES:
        raise ValueError(f"{size} bytes, more than {MAX_BYTES}")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").strip()


@dataclass(frozen=True)
class Columns:
    """`image` and the `captions`, of which a row's first that is filled counts; `said` tells a person of a guess."""

    image: str
    captions: tuple[str, ...]
    said: tuple[str, ...] = ()


def choose_columns(present: Sequence[str], where: str, rules: Latents, mixed: bool = False) -> Columns:
    """The recipe's columns, else the first known names; with `mixed` (JSONL) rows may differ in their caption's name.

    DataError BF-DATA-005 when one is not there.
    """
    image = _choose(rules.image_column, IMAGES, present, where, "image")
    if rules.caption_column is None and rules.missing_caption != "stop" and not set(CAPTIONS) & set(present):
        captions: tuple[str, ...] = ()
    else:
        first = _choose(rules.caption_column, CAPTIONS, present, where, "caption")
        others = [name for name in CAPTIONS if name in present] if mixed and rules.caption_column is None else []
        captions = tuple(dict.fromkeys([first, *others]))
    if rules.image_column and rules.caption_column:
        return Columns(image, captions)
    said = f"columns: images from {image}, captions from {' or '.join(captions) or 'none'}"
    return Columns(image, captions, (f"{said} (--image-column, --caption-column choose others)",))


def _choose(given: str | None, guesses: Sequence[str], present: Sequence[str], where: str, what: str) -> str:
    found = [name for name in ([given] if given else guesses) if name in present]
    if found:
        return found[0]
    raise DataError(
        f"{where} has no column {given}" if given else f"{where} has no column known as {what}",
        at=f"it has {', '.join(present) or 'none'}" + ("" if given else f"; known are {', '.join(guesses)}"),
        fix=f"--{what}-column NAME",
        code="BF-DATA-005",
    )


def caption_of(row: Mapping[str, Any], columns: Columns) -> str | None:
    """The row's caption, None where it has none. ValueError: not text."""
    return next((text for name in columns.captions if (text := text_of(row, name))), None)


def text_of(row: Mapping[str, Any], name: str) -> str | None:
    """One cell as text, None where it is null or empty. ValueError: not text, NUL, half a surrogate pair, too long."""
    value = row.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{name} is not text")
    try:
        return clean_text(value) or None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
