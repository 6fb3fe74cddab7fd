"""WebDataset archives: members of one name and several extensions are one sample.

An image is jpg, png or webp; its caption txt, or a field of json, or, with `latents.class_names`, the line whose number
cls holds. Any other member is counted and never opened. Members that are links, devices or leave the archive become
entries that say so. A name may hold dots (v1.2.png); `0.mask.png` beside `0.png` is a part of sample 0 and no image.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from bifrost_cli.config.schema import Latents
from bifrost_cli.data.images import FILE_BYTES, BadImage
from bifrost_cli.data.sources.captions import CAPTIONS, MAX_BYTES, PLAN, decode_caption, text_of
from bifrost_cli.data.sources.folder import class_names
from bifrost_cli.data.sources.item import Listing, Problem, SourceItem, in_key_order, key_of
from bifrost_cli.data.sources.remote import open_place, read_span, reading
from bifrost_cli.data.sources.tar_members import Member, members
from bifrost_cli.errors import DataError

_IMAGES = ("jpg", "jpeg", "png", "webp")
_TEXTS = {"txt": 4 * MAX_BYTES, "json": 1 << 20, "cls": 64}  # bytes read of each at most

Part = tuple[Member, str | dict | None]  # a member, and what was read of it if it is text


def list_tars(places: list[str], rules: Latents) -> Listing:
    """The images of archives.

    DataError: an archive that is not there, is damaged or cut short (naming member and byte), or has no images; two
    images or two texts of one sample.
    """
    counts: Counter[str] = Counter()
    problems: list[Problem] = []
    names = tuple(class_names(rules.class_names).values()) if rules.class_names else ()
    named: list[tuple[str, SourceItem]] = []
    for place in places:
        prefix = f"{Path(place).stem}/" if len(places) > 1 else ""
        named += _named_entries(place, prefix, names, rules, counts, problems)
    if not named and not problems:
        seen = ", ".join(f"{number} {name}" for name, number in counts.items()) or "nothing"
        raise DataError(f"no images in {places[0]}, looked for {'/'.join(_IMAGES)}", at=f"it holds {seen}",
                        fix="give archives with an image and a .txt or .json of the same name")  # fmt: skip
    entries, everything = in_key_order(named, problems)
    return Listing(entries, {name: n for name, n in counts.items() if n}, problems=everything)


def _named_entries(
    place: str, prefix: str, names: tuple[str, ...], rules: Latents, counts: Counter[str], problems: list[Problem]
) -> Iterator[tuple[str, SourceItem]]:
    """(name in the source, entry) of every image, and of every member that must not be read."""
    samples, refused = _samples(place, counts, problems)
    for member in refused:
        key = key_of(f"{prefix}{member.start}.bin")
        yield (
            f"{prefix}{member.start}.bin",
            SourceItem(key, f"{place}: {member.name}", lambda: b"", problem=member.problem),
        )
    for parts in samples.values():
        images = [member for extension, (member, _) in parts.items() if extension in _IMAGES]
        texts = {extension: text for extension, (_, text) in parts.items()}
        counts["samples without an image"] += not images
        for member in images:
            where, name = f"{place}: {member.name}", f"{prefix}{member.name}"
            try:
                caption, plan = _caption(texts, names, rules)
            except ValueError as error:
                problems.append(Problem("caption", where, str(error)))
                continue
            problem = f"{member.size} bytes, more than {FILE_BYTES}" if member.size > FILE_BYTES else None
            read = partial(_read, place, member.start, member.size)
            yield name, SourceItem(key_of(name), where, read, caption, plan, problem)


def _samples(
    place: str, counts: Counter[str], problems: list[Problem]
) -> tuple[dict[str, dict[str, Part]], list[Member]]:
    """Members by sample and extension, texts read; and members that must not be read."""
    samples: dict[str, dict[str, Part]] = defaultdict(dict)
    refused = []
    try:
        stream = open_place(place)
    except BadImage as error:
        fix = "to read the archives that are there, quote a pattern: 'shards-*.tar'"
        raise DataError(f"{place} does not exist or cannot be read", at=error.message, fix=fix) from error
    with reading(place), stream:
        for member in members(stream, place):
            folder, _, name = member.name.rpartition("/")
            base, _, extension = name.rpartition(".")
            base, extension = (base, extension.lower()) if base else (name, "")
            if member.problem:
                refused.append(member)
            elif name.startswith(".") or extension not in (*_IMAGES, *_TEXTS):
                rest = name.partition(".")[2].lower()
                counts["hidden members" if name.startswith(".") else f".{rest} members"] += 1
            elif extension in (sample := samples[f"{folder}/{base}"]):
                raise DataError(f"{place} has two members {member.name}", at=f"the second at byte {member.start - 512}",
                                fix="make the archive again with one of them", code="BF-DATA-006")  # fmt: skip
            else:
                sample[extension] = (member, _text(stream, member, extension, place, problems))
    for name in [name for name, parts in samples.items() if _is_part(name, parts, samples)]:
        for extension in samples.pop(name):
            counts[f".{name.rpartition('/')[2].partition('.')[2].lower()}.{extension} members"] += 1
    return samples, refused


def _is_part(name: str, parts: dict[str, Part], samples: dict[str, dict[str, Part]]) -> bool:
    """Whether `0.mask` belongs to a sample `0` that has an image: it has no text of its own."""
    folder, _, base = name.rpartition("/")
    short = f"{folder}/{base.partition('.')[0]}"
    return short != name and not set(parts) & set(_TEXTS) and bool(set(samples.get(short, ())) & set(_IMAGES))


def _text(stream: BinaryIO, member: Member, extension: str, place: str, problems: list[Problem]) -> str | dict | None:
    if extension not in _TEXTS:
        return None
    try:
        if member.size > _TEXTS[extension]:
            raise ValueError(f"{member.size} bytes, more than {_TEXTS[extension]}")
        stream.seek(member.start)
        data = stream.read(member.size)
        if extension != "json":
            return decode_caption(data)
        value = json.loads(data.decode("utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value
    except (ValueError, RecursionError) as error:
        problems.append(Problem("caption", f"{place}: {member.name}", str(error)))
        return None


def _caption(texts: dict, names: tuple[str, ...], rules: Latents) -> tuple[str | None, str | None]:
    """(caption, plan) of one sample. ValueError: not text, or a class without a name."""
    row = texts.get("json") or {}
    plan = text_of(row, PLAN)
    if names:
        number = texts.get("cls") or ""
        if number and not (number.isascii() and number.isdecimal() and int(number) < len(names)):
            raise ValueError(f"class {number} has no line among the {len(names)} class names")
        return names[int(number)] if number else None, plan
    if rules.caption_column:
        return text_of(row, rules.caption_column), plan
    if texts.get("txt"):
        return texts["txt"], plan
    return next((text for name in CAPTIONS if (text := text_of(row, name))), None), plan


def _read(place: str, start: int, size: int) -> bytes:
    data = read_span(place, start, size)
    if len(data) != size:
        raise BadImage("changed during the run")
    return data
