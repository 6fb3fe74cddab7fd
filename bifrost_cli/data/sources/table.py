"""Tables of images and captions: JSONL, CSV and TSV with the images' paths.

A path is read as seen from its table, and stays below the table's folder unless the recipe allows more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bifrost_cli.config.schema import Latents
from bifrost_cli.data.images import BadImage
from bifrost_cli.data.sources.captions import PLAN, Columns, caption_of, choose_columns, text_of
from bifrost_cli.data.sources.folder import inside, walk
from bifrost_cli.data.sources.item import OUTSIDE, Listing, Problem, SourceItem, in_key_order, key_of, leaves
from bifrost_cli.data.sources.remote import beside, is_remote, read_place, suffix_of
from bifrost_cli.data.sources.table_rows import DELIMITERS, Row, csv_rows, jsonl_rows
from bifrost_cli.errors import DataError

TABLES = (".jsonl", ".csv", ".tsv")
_TABLE_BYTES = 1 << 32  # of one table, which is read whole


def list_tables(places: list[str], rules: Latents) -> Listing:
    """The images that a table names. DataError: it is not there, has no rows, or lacks a column."""
    problems: list[Problem] = []
    found = ((place, line, row) for place in places for line, row in _rows(place))
    rows: list[tuple[str, int, Any]] = [line for line in found if _is_row(line, problems)]
    if not rows and not problems:
        raise DataError(
            f"no images in {places[0]}: it has no lines", fix='write lines {"file_name": "a.jpg", "caption": "..."}'
        )
    present = tuple(dict.fromkeys(name for _, _, row in rows for name in row))
    jsonl = suffix_of(places[0]) == ".jsonl"
    named: list[tuple[str, SourceItem]] = []
    said: tuple[str, ...] = ()
    if rows:
        columns = choose_columns(present, places[0], rules, mixed=jsonl)
        said = columns.said
        named = list(_named_entries(rows, columns, rules, problems))
    entries, everything = in_key_order(named, problems)
    return Listing(entries, _not_listed(places, entries, rules), said, everything)


def _rows(place: str) -> Iterator[tuple[int, Row | ValueError]]:
    try:
        data = read_place(place, _TABLE_BYTES)
    except BadImage as error:
        raise DataError(f"{place} does not exist or cannot be read", at=error.message) from error
    suffix = suffix_of(place)
    return csv_rows(data, place, suffix) if suffix in DELIMITERS else jsonl_rows(data)


def _is_row(found: tuple[str, int, Row | ValueError], problems: list[Problem]) -> bool:
    place, line, row = found
    if isinstance(row, ValueError):
        problems.append(Problem("metadata", f"{place}:{line}", str(row)))
    return not isinstance(row, ValueError)


def _named_entries(
    rows: list[tuple[str, int, Any]], columns: Columns, rules: Latents, problems: list[Problem]
) -> Iterator[tuple[str, SourceItem]]:
    for place, line, row in rows:
        try:
            name = text_of(row, columns.image)
            if not name:
                raise ValueError(f"no {columns.image}; it has {', '.join(map(str, row)) or 'nothing'}")
            yield name, path_entry(place, name, caption_of(row, columns), text_of(row, PLAN), rules)
        except ValueError as error:
            problems.append(Problem("metadata", f"{place}:{line}", str(error)))


def path_entry(place: str, name: str, caption: str | None, plan: str | None, rules: Latents) -> SourceItem:
    """The entry of an image that a table at `place` names. ValueError when the name leaves the table's folder."""
    name = _below(name, place)
    if not rules.allow_outside and leaves(name):
        raise ValueError(f"the path {name!r} leaves the source folder (--set latents.allow_outside=true allows it)")
    where = beside(place, name)
    linked = not is_remote(where) and not inside(Path(where), Path(place).parent, rules)
    return SourceItem(
        key_of(name.lstrip("/")), where, partial(read_place, where), caption, plan, OUTSIDE if linked else None
    )


def _below(name: str, place: str) -> str:
    """`name` as seen from the table: an absolute path into its own folder, or one with backslashes, is no way out."""
    if is_remote(place) or is_remote(name):
        return name
    if "\\" in name and not (Path(place).parent / name).exists():
        name = name.replace("\\", "/")
    folder = Path(place).absolute().parent
    if Path(name).is_absolute() and ".." not in Path(name).parts and Path(name).is_relative_to(folder):
        return Path(name).relative_to(folder).as_posix()
    return name


def _not_listed(places: list[str], entries: tuple[SourceItem, ...], rules: Latents) -> dict[str, int]:
    """Images beside a local table that it does not name."""
    if len(places) > 1 or is_remote(places[0]):
        return {}
    listed, table = {entry.where for entry in entries}, Path(places[0])
    unlisted = sum(str(path) not in listed for path in walk(table.parent, rules.recursive, Counter()))
    return {f"images not in {table.name}": unlisted} if unlisted else {}
