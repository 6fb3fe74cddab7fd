"""Captions from untrusted bytes, and which columns of a table hold the image, the caption and the plan. Text stays as
it is but for a byte order mark, surrounding space and line ends (\\n); Unicode is not normalised."""

from __future__ import annotations

import codecs
import json
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
    utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return clean_text(data.decode("utf-16" if utf_16 else "utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not {'UTF-16' if utf_16 else 'UTF-8'} at byte {error.start}") from None


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


def json_object(data: bytes) -> dict[str, Any]:
    """ValueError or RecursionError: not one."""
    value = json.loads(data.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def first_text(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of these cells that is filled, as text. ValueError: not text, NUL, half a surrogate pair, too long."""
    for name in names:
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} is not text")
        try:
            if text := clean_text(value or ""):
                return text
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return None


@dataclass(frozen=True)
class Columns:
    """`image` and the `captions`, of which a row's first that is filled counts; `said` tells a person of a guess."""

    image: str
    captions: tuple[str, ...]
    said: tuple[str, ...] = ()

    @classmethod
    def choose(cls, present: Sequence[str], where: str, rules: Latents, mixed: bool = False) -> Columns:
        """The recipe's, else the first known names; with `mixed` (JSONL) rows may differ in their caption's name.
        DataError BF-DATA-005 when one is not there."""
        image, given = _choose(rules.image_column, IMAGES, present, where, "image"), rules.caption_column
        captions = tuple(name for name in CAPTIONS if name in present)
        if given is not None or (not captions and rules.missing_caption == "stop"):
            captions = (_choose(given, CAPTIONS, present, where, "caption"),)
        captions = captions if mixed else captions[:1]
        if rules.image_column and given:
            return cls(image, captions)
        said = f"columns: images from {image}, captions from {' or '.join(captions) or 'none'}"
        return cls(image, captions, (f"{said} (--image-column, --caption-column choose others)",))

    def texts(self, row: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """The row's caption and plan. ValueError: not text."""
        return first_text(row, self.captions), first_text(row, [PLAN])


def _choose(given: str | None, guesses: Sequence[str], present: Sequence[str], where: str, what: str) -> str:
    for name in [given] if given else guesses:
        if name in present:
            return name
    message = f"{where} has no column {given}" if given else f"{where} has no column known as {what}"
    at = f"it has {', '.join(present) or 'none'}" + ("" if given else f"; known are {', '.join(guesses)}")
    raise DataError(message, at=at, fix=f"--{what}-column NAME", code="BF-DATA-005")
