"""WebDataset archives: members of one name and several extensions are one sample. An image is jpg, png or webp; its
caption txt, or a field of json, or, with `latents.class_names`, the line whose number cls holds. Any other member is
counted and never opened; links, devices and names that leave the archive become entries that say so. A name may hold
dots (v1.2.png); `0.mask.png` beside `0.png` is a part of sample 0. Unlike for Python's tarfile, an archive without its
two closing blocks is an error: a cut at a member's border would lose the rest in silence."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

from bifrost_cli.config.schema import Latents
from bifrost_cli.data.images import FILE_BYTES, LFS_POINTER
from bifrost_cli.data.sources.captions import CAPTIONS, MAX_BYTES, PLAN, decode_caption, first_text, json_object
from bifrost_cli.data.sources.folder import class_names
from bifrost_cli.data.sources.item import Found, Listing, Problem, SourceItem, key_of, leaves
from bifrost_cli.data.sources.remote import open_place, path_of, read_span, reading, required
from bifrost_cli.errors import DataError

_IMAGES = ("jpg", "jpeg", "png", "webp")
_TEXTS = {"txt": 4 * MAX_BYTES, "json": 1 << 20, "cls": 64}  # bytes read of each at most
_BLOCK, _ZEROS, _LONGEST = 512, bytes(512), 1 << 20  # bytes; of a long name or a pax record at most
_REGULAR, _FOLDER, _LONG_NAME, _PAX, _PAX_ALL = (b"0", b"\0", b"7"), b"5", b"L", b"x", b"g"
_KINDS = {b"1": "a hard link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


@dataclass(frozen=True, slots=True)
class Member:
    """One member: its bytes are [start, start + size) of the archive; `problem` says why not to read it."""

    name: str
    start: int
    size: int
    problem: str | None = None


Sample = dict[str, tuple[Member, Any]]  # by extension: a member, and what was read of it if it is text


def list_tars(places: list[str], rules: Latents) -> Listing:
    """DataError: an archive that is not there, is damaged or cut short (naming member and byte), or has no images; two
    images or two texts of one sample."""
    counts: Counter[str] = Counter()
    classes = tuple(class_names(rules.class_names).values()) if rules.class_names else ()
    found: list[Found] = []
    for place in places:
        prefix = f"{path_of(place).stem}/" if len(places) > 1 else ""
        samples, unread = _samples(place, prefix, counts)
        found += unread
        for sample in samples:
            texts = {extension: text for extension, (_, text) in sample.items()}
            images = [member for extension, (member, _) in sample.items() if extension in _IMAGES]
            counts["samples without an image"] += not images
            for member in images:
                where, name = f"{place}: {member.name}", f"{prefix}{member.name}"
                problem = f"{member.size} bytes, more than {FILE_BYTES}" if member.size > FILE_BYTES else None
                read = partial(read_span, place, member.start, member.size)
                try:
                    item = SourceItem(key_of(name), where, read, *_caption_and_plan(texts, classes, rules), problem)
                    found.append((name, item))
                except ValueError as error:
                    found.append(Problem("caption", where, str(error)))
    if not found:
        seen = ", ".join(f"{number} {name}" for name, number in counts.items() if number) or "nothing"
        raise DataError(f"no images in {places[0]}, looked for {'/'.join(_IMAGES)}", at=f"it holds {seen}",
                        fix="give archives with an image and a .txt or .json of the same name")  # fmt: skip
    return Listing.of(found, counts)


def _samples(place: str, prefix: str, counts: Counter[str]) -> tuple[list[Sample], list[Found]]:
    """Samples, their texts read; and members that must not be read, or that are no text."""
    samples: dict[str, Sample] = defaultdict(dict)
    unread: list[Found] = []
    with required(place, "to read the archives that are there, quote a pattern: 'shards-*.tar'"):
        stream = open_place(place)
    with reading(place), stream:
        for member in members(stream, place):
            where = f"{place}: {member.name}"
            folder, _, name = member.name.rpartition("/")
            base, _, extension = name.rpartition(".")
            base, extension = (base, extension.lower()) if base else (name, "")
            if member.problem:
                key = f"{prefix}{member.start}.bin"
                unread.append((key, SourceItem(key_of(key), where, bytes, problem=member.problem)))
            elif name.startswith(".") or extension not in (*_IMAGES, *_TEXTS):
                rest = name.partition(".")[2].lower()
                counts["hidden members" if name.startswith(".") else f".{rest} members"] += 1
            elif extension in (sample := samples[f"{folder}/{base}"]):
                raise DataError(f"{place} has two members {member.name}", at=f"the second at byte {member.start - 512}",
                                fix="make the archive again with one of them", code="BF-DATA-006")  # fmt: skip
            else:
                sample[extension] = (member, None)
                try:
                    if extension in _TEXTS:
                        if member.size > _TEXTS[extension]:
                            raise ValueError(f"{member.size} bytes, more than {_TEXTS[extension]}")
                        stream.seek(member.start)
                        read_text = json_object if extension == "json" else decode_caption
                        sample[extension] = (member, read_text(stream.read(member.size)))
                except (ValueError, RecursionError) as error:
                    unread.append(Problem("caption", where, str(error)))
    for name in list(samples):
        folder, _, base = name.rpartition("/")
        whole, dot, part = base.partition(".")
        # Whether `0.mask` belongs to a sample `0` that has an image: it has no text of its own.
        if dot and not set(samples[name]) & set(_TEXTS) and set(samples.get(f"{folder}/{whole}", ())) & set(_IMAGES):
            for extension in samples.pop(name):
                counts[f".{part.lower()}.{extension} members"] += 1
    return list(samples.values()), unread


def _caption_and_plan(texts: dict[str, Any], classes: tuple[str, ...], rules: Latents) -> tuple[str | None, str | None]:
    """ValueError: not text, or a class without a name."""
    row = texts.get("json") or {}
    plan = first_text(row, [PLAN])
    if classes:
        number = texts.get("cls") or ""
        if number and not (number.isascii() and number.isdecimal() and int(number) < len(classes)):
            raise ValueError(f"class {number} has no line among the {len(classes)} class names")
        return classes[int(number)] if number else None, plan
    if rules.caption_column:
        return first_text(row, [rules.caption_column]), plan
    return texts.get("txt") or first_text(row, CAPTIONS), plan


def members(stream: BinaryIO, where: str) -> Iterator[Member]:
    """Every member that is no folder. DataError BF-DATA-005: compressed, cut short, or a header that is none."""

    def damaged(why: str) -> DataError:
        return DataError(f"{where} is damaged: {why}", fix="copy or make the archive again", code="BF-DATA-005")

    def block_at(at: int) -> bytes:
        stream.seek(at)
        block = stream.read(_BLOCK)
        if at == 0 and block[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5"):
            raise DataError(f"{where} is compressed: its members cannot be read by place", fix="decompress it first",
                            code="BF-DATA-005")  # fmt: skip
        if at == 0 and block.startswith(LFS_POINTER):
            raise DataError(f"{where} is a git-lfs pointer, not the archive", fix="git lfs pull", code="BF-DATA-005")
        if len(block) < _BLOCK:
            raise damaged(f"it ends early at byte {at + len(block)}, without its closing blocks")
        return block

    size, at = stream.seek(0, 2), 0
    named: dict[str, str] = {}
    while (header := block_at(at)) != _ZEROS:
        kind = header[156:157]
        try:
            member = _member(header, at, kind, named)
        except ValueError as error:
            raise damaged(f"no member begins at byte {at}: {error}") from None
        at = member.start + -(-member.size // _BLOCK) * _BLOCK
        if at > size:
            raise damaged(f"member {member.name!r} at byte {member.start - _BLOCK} ends after the archive does")
        if kind in (_LONG_NAME, _PAX):
            if member.size > _LONGEST:
                raise damaged(f"a name of {member.size} bytes at byte {member.start}")
            stream.seek(member.start)
            data = stream.read(member.size)
            try:
                named |= {"path": _text(data)} if kind == _LONG_NAME else _pax(data)
            except ValueError as error:
                raise damaged(f"a pax header at byte {member.start}: {error}") from None
        elif kind != b"K":
            if kind not in (_FOLDER, _PAX_ALL):
                yield member
            named = {}
    if block_at(at + _BLOCK) != _ZEROS:
        raise damaged(f"a single closing block at byte {at}")
    while block := stream.read(1 << 16):
        if block.strip(b"\0"):
            raise damaged(f"data after its closing blocks at byte {at}")


def _member(header: bytes, at: int, kind: bytes, named: dict[str, str]) -> Member:
    if int(header[148:156].strip(b" \0"), 8) != sum(header[:148]) + 8 * 32 + sum(header[156:]):
        raise ValueError("its checksum is wrong")
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    name = named.get("path") or (f"{prefix}/" if prefix else "") + _text(header[:100])
    if "size" in named:
        size = int(named["size"])
    elif header[124] & 0x80:  # base 256, where octal is too short
        size = int.from_bytes(header[125:136], "big")
    else:
        size = int(header[124:136].strip(b" \0") or b"0", 8)
    if size < 0:
        raise ValueError("a negative size")
    while name.startswith("./"):
        name = name[2:]
    problem = None if kind in _REGULAR else f"{_KINDS.get(kind, 'of an unknown kind')} in an archive"
    if leaves(name):
        problem = "a name that leaves the archive"
    return Member(name, at + _BLOCK, size if problem is None or kind not in _KINDS else 0, problem)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax(data: bytes) -> dict[str, str]:
    """Path and size of the next member, out of records `LENGTH KEY=VALUE\\n`."""
    found = {}
    while data:
        length = int(data.partition(b" ")[0])
        key, _, value = data[:length].partition(b" ")[2].removesuffix(b"\n").partition(b"=")
        if length < 5:
            raise ValueError("a record without a length")
        found[key.decode()] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return {key: found[key] for key in ("path", "size") if key in found}
