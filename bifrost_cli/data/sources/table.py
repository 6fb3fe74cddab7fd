"""Tables of images and captions: JSONL, CSV and TSV with the images' paths. A path is read as seen from its table, and
stays below the table's folder unless the recipe allows more."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bifrost_cli.config.schema import Latents
from bifrost_cli.data.sources.captions import Columns, first_text, json_object
from bifrost_cli.data.sources.folder import inside, walk
from bifrost_cli.data.sources.item import OUTSIDE, Found, Listing, Problem, SourceError, SourceItem, key_of, leaves
from bifrost_cli.data.sources.remote import is_remote, read_place, required, suffix_of
from bifrost_cli.errors import DataError
from bifrost_cli.runtime.ui import counted

TABLES = (".jsonl", ".csv", ".tsv")
_TABLE_BYTES, _LINE_BYTES = 1 << 32, 1 << 20  # at most; a table is read whole
csv.field_size_limit(1 << 24)  # a cell of a column that nobody reads must not stop the table; captions have their own
Row = dict[str, Any]


def list_tables(places: list[str], rules: Latents) -> Listing:
    """The images that a table names. DataError: it is not there, has no rows, or lacks a column."""
    rows: list[tuple[str, str, Row]] = []
    bad: list[Problem] = []
    for place in places:
        with required(place):
            data = read_place(place, _TABLE_BYTES)
        suffix = suffix_of(place)
        for line, row in csv_rows(data, place, suffix) if suffix in (".csv", ".tsv") else jsonl_rows(data):
            if isinstance(row, ValueError):
                bad.append(Problem("metadata", f"{place}:{line}", str(row)))
            else:
                rows.append((place, f"{place}:{line}", row))
    if not rows and not bad:
        fix = 'write lines {"file_name": "a.jpg", "caption": "..."}'
        raise DataError(f"no images in {places[0]}: it has no lines", fix=fix)
    present, mixed = tuple(dict.fromkeys(name for _, _, row in rows for name in row)), suffix_of(places[0]) == ".jsonl"
    try:
        columns = Columns.choose(present, places[0], rules, mixed) if rows else Columns("", ())
    except DataError as error:
        if not bad:
            raise
        bad.insert(0, Problem("metadata", places[0], f"{error.message}; {error.at}"))
        raise SourceError(f"{error.message}, and {counted(len(bad) - 1, 'line')} cannot be used", bad, fix=error.fix,
                          code=error.code) from error  # fmt: skip
    listing = Listing.of([*bad, *_entries(rows, columns, rules)], said=columns.said)
    if len(places) == 1 and not is_remote(places[0]):
        table, named = Path(places[0]), {entry.where for entry in listing.entries}
        if unnamed := sum(str(path) not in named for path in walk(table.parent, rules.recursive, Counter())):
            return replace(listing, counts={f"images not in {table.name}": unnamed})
    return listing


def _entries(rows: list[tuple[str, str, Row]], columns: Columns, rules: Latents) -> Iterator[Found]:
    for place, where, row in rows:
        try:
            if not (name := first_text(row, [columns.image])):
                raise ValueError(f"no {columns.image}; it has {', '.join(map(str, row)) or 'nothing'}")
            yield name, path_entry(place, name, *columns.texts(row), rules)
        except ValueError as error:
            yield Problem("metadata", where, str(error))


def path_entry(place: str, name: str, caption: str | None, plan: str | None, rules: Latents) -> SourceItem:
    """The entry of an image that a table at `place` names. ValueError when the name leaves the table's folder."""
    remote, folder = is_remote(place) or is_remote(name), Path(place).absolute().parent
    if "\\" in name and not remote and not (folder / name).exists():
        name = name.replace("\\", "/")
    path = Path(name)
    if not remote and path.is_absolute() and ".." not in path.parts and path.is_relative_to(folder):
        name = path.relative_to(folder).as_posix()  # an absolute path into the table's own folder is no way out
    if not rules.allow_outside and leaves(name):
        raise ValueError(f"the path {name!r} leaves the source folder (--set latents.allow_outside=true allows it)")
    if is_remote(place) and not is_remote(name):
        where = f"{place.partition('?')[0].rpartition('/')[0]}/{name}"
    else:
        where = name if is_remote(name) else str(Path(place).parent / name)
    problem = None if is_remote(where) or inside(Path(where), Path(place).parent, rules) else OUTSIDE
    return SourceItem(key_of(name.lstrip("/")), where, partial(read_place, where), caption, plan, problem)


def jsonl_rows(data: bytes) -> Iterator[tuple[int, Row | ValueError]]:
    """(line, object), blank lines left out; for a line that is none (line, the reason)."""
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            if len(line) > _LINE_BYTES:
                raise ValueError(f"a line of {len(line)} bytes")
            yield number, json_object(line)
        except (ValueError, RecursionError) as error:
            yield number, ValueError(str(error))


def csv_rows(data: bytes, where: str, suffix: str) -> Iterator[tuple[int, Row | ValueError]]:
    """(line, row by column name); the first line names the columns. In CSV a field in quotes may hold line ends. In TSV
    a line is a row, and a quotation mark is a character, unless it stands at both ends of a field: a caption that
    begins with one must not swallow the rows that follow. DataError: not UTF-8 (naming the byte), no columns, a column
    named twice."""
    try:
        stream = io.StringIO(data.decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        message = f"{where} is not UTF-8 at byte {error.start}"
        raise DataError(message, fix="save it as UTF-8", code="BF-DATA-005") from None
    lines = _lines(stream, tabs=suffix == ".tsv")
    _, header = next(lines, (1, []))
    if isinstance(header, ValueError):
        raise DataError(f"{where}:1 cannot be read: {header}", code="BF-DATA-005")
    twice = {name for name in header if header.count(name) > 1}
    if not header or twice:
        what = f"names a column twice: {', '.join(sorted(twice))}" if twice else "is empty"
        raise DataError(f"{where} {what}", fix="its first line must name the columns", code="BF-DATA-005")
    for number, fields in lines:
        if isinstance(fields, ValueError):
            yield number, fields
        elif fields and len(fields) != len(header):
            yield number, ValueError(f"{len(fields)} fields, where the first line names {len(header)}")
        elif fields:
            yield number, dict(zip(header, fields, strict=True))


def _lines(stream: io.StringIO, tabs: bool) -> Iterator[tuple[int, list[str] | ValueError]]:
    reader = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(stream, strict=True)
    try:
        for fields in reader:
            yield reader.line_num, [_unquoted(field) for field in fields] if tabs else fields
    except csv.Error as error:  # the reader has lost its place: what follows cannot be told apart
        yield reader.line_num, ValueError(str(error))


def _unquoted(field: str) -> str:
    inner = field[1:-1]
    quoted = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else field
