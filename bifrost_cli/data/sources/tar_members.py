"""The members of a tar archive from untrusted bytes, header by header.

Nothing is extracted or decompressed. Unlike Python's tarfile, an archive without its two closing blocks is an
error: a cut at a member's border would lose the rest in silence. Reads ustar, GNU long names and pax paths and sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from bifrost_cli.data.sources.item import leaves
from bifrost_cli.errors import DataError

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_LONGEST = 1 << 20  # bytes of a long name or a pax record
_REGULAR, _FOLDER, _LONG_NAME, _PAX, _PAX_ALL = (b"0", b"\0", b"7"), b"5", b"L", b"x", b"g"
_KINDS = {b"1": "a hard link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


@dataclass(frozen=True, slots=True)
class Member:
    """One member: its bytes are [start, start + size) of the archive; `problem` says why not to read it."""

    name: str
    start: int
    size: int
    problem: str | None = None


def members(stream: BinaryIO, where: str) -> Iterator[Member]:
    """Every member that is no folder. DataError BF-DATA-005: compressed, cut short, or a header that is none."""
    size, at = stream.seek(0, 2), 0
    named: dict[str, str] = {}
    while (header := _block(stream, at, where)) != _ZEROS:
        kind = header[156:157]
        member = _member(header, at, kind, named, where)
        at = member.start + -(-member.size // _BLOCK) * _BLOCK
        if at > size:
            raise damaged(where, f"member {member.name!r} at byte {member.start - _BLOCK} ends after the archive does")
        if kind in (_LONG_NAME, _PAX):
            named |= _extended(stream, member, kind, where)
        elif kind not in (_FOLDER, _PAX_ALL, b"K"):
            yield member
            named = {}
        else:
            named = named if kind == b"K" else {}
    if _block(stream, at + _BLOCK, where) != _ZEROS:
        raise damaged(where, f"a single closing block at byte {at}")
    _refuse_more(stream, at, where)


def damaged(where: str, why: str) -> DataError:
    return DataError(f"{where} is damaged: {why}", fix="copy or make the archive again", code="BF-DATA-005")


def _block(stream: BinaryIO, at: int, where: str) -> bytes:
    stream.seek(at)
    block = stream.read(_BLOCK)
    if at == 0 and block[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5"):
        raise DataError(f"{where} is compressed: its members cannot be read by place", fix="decompress it first",
                        code="BF-DATA-005")  # fmt: skip
    if len(block) < _BLOCK:
        raise damaged(where, f"it ends early at byte {at + len(block)}, without its closing blocks")
    return block


def _member(header: bytes, at: int, kind: bytes, named: dict[str, str], where: str) -> Member:
    try:
        if int(header[148:156].strip(b" \0"), 8) != sum(header[:148]) + 8 * 32 + sum(header[156:]):
            raise ValueError("its checksum is wrong")
        prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
        name = named.get("path") or (f"{prefix}/" if prefix else "") + _text(header[:100])
        size = int(named["size"]) if "size" in named else _number(header[124:136])
        if size < 0:
            raise ValueError("a negative size")
    except ValueError as error:
        raise damaged(where, f"no member begins at byte {at}: {error}") from None
    while name.startswith("./"):
        name = name[2:]
    problem = None if kind in _REGULAR else f"{_KINDS.get(kind, 'of an unknown kind')} in an archive"
    if leaves(name):
        problem = "a name that leaves the archive"
    return Member(name, at + _BLOCK, size if problem is None or kind not in _KINDS else 0, problem)


def _number(field: bytes) -> int:
    """Octal, or base 256 with the highest bit set."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _extended(stream: BinaryIO, member: Member, kind: bytes, where: str) -> dict[str, str]:
    """Name and size of the next member, out of a GNU long name or pax records `LENGTH KEY=VALUE\\n`."""
    if member.size > _LONGEST:
        raise damaged(where, f"a name of {member.size} bytes at byte {member.start}")
    stream.seek(member.start)
    data = stream.read(member.size)
    if kind == _LONG_NAME:
        return {"path": _text(data)}
    found = {}
    try:
        while data:
            length = int(data.partition(b" ")[0])
            key, _, value = data[:length].partition(b" ")[2].removesuffix(b"\n").partition(b"=")
            if length < 5:
                raise ValueError("a record without a length")
            found[key.decode()] = value.decode("utf-8", "surrogateescape")
            data = data[length:]
    except ValueError as error:
        raise damaged(where, f"a pax header at byte {member.start}: {error}") from None
    return {key: found[key] for key in ("path", "size") if key in found}


def _refuse_more(stream: BinaryIO, at: int, where: str) -> None:
    stream.seek(at)
    while block := stream.read(1 << 16):
        if block.strip(b"\0"):
            raise damaged(where, f"data after its closing blocks at byte {at}")
