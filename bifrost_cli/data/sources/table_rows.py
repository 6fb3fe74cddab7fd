"""Rows of JSONL, CSV and TSV files from untrusted bytes, each with its line number, or what is wrong with it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from bifrost_cli.errors import DataError

LINE_BYTES = 1 << 20
csv.field_size_limit(1 << 24)  # a cell of a column that nobody reads must not stop the table; captions have their own
DELIMITERS = {".csv": ",", ".tsv": "\t"}

Row = dict[str, Any]


def jsonl_rows(data: bytes) -> Iterator[tuple[int, Row | ValueError]]:
    """(line, object), blank lines left out; for a line that is none (line, the reason)."""
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            try:
                yield number, _json_row(line)
            except (ValueError, RecursionError) as error:
                yield number, ValueError(str(error))


def _json_row(line: bytes) -> Row:
    if len(line) > LINE_BYTES:
        raise ValueError(f"a line of {len(line)} bytes")
    value = json.loads(line.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def csv_rows(data: bytes, where: str, suffix: str) -> Iterator[tuple[int, Row | ValueError]]:
    """(line, row by column name); the first line names the columns.

    In CSV a field in quotes may hold line ends. In TSV a line is a row, and a quotation mark is a character, unless it
    stands at both ends of a field: a caption that begins with one must not swallow the rows that follow.
    DataError: not UTF-8 (naming the byte), no columns, a column named twice.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 at byte {error.start}", fix="save it as UTF-8", code="BF-DATA-005"
        ) from None
    stream = io.StringIO(text, newline="")
    reader: Any = _TsvReader(stream) if suffix == ".tsv" else csv.reader(stream, strict=True)
    header = _header(reader, where)
    try:
        for fields in reader:
            if fields:
                yield reader.line_num, _row(header, fields)
    except csv.Error as error:  # the reader has lost its place: what follows cannot be told apart
        yield reader.line_num, ValueError(str(error))


class _TsvReader:
    """Lines of a TSV as lists of fields, with `line_num` as csv.reader has it."""

    def __init__(self, stream: io.StringIO) -> None:
        self._stream, self.line_num = stream, 0

    def __iter__(self) -> Iterator[list[str]]:
        return self

    def __next__(self) -> list[str]:
        line = next(self._stream).rstrip("\r\n")
        self.line_num += 1
        return [self._unquoted(field) for field in line.split("\t")] if line else []

    @staticmethod
    def _unquoted(field: str) -> str:
        inner = field[1:-1]
        quoted = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', "")
        return inner.replace('""', '"') if quoted else field


def _header(reader: Any, where: str) -> list[str]:
    try:
        header: list[str] = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{where}:1 cannot be read: {error}", code="BF-DATA-005") from error
    twice = {name for name in header if header.count(name) > 1}
    if not header or twice:
        what = f"names a column twice: {', '.join(sorted(twice))}" if twice else "is empty"
        raise DataError(f"{where} {what}", fix="its first line must name the columns", code="BF-DATA-005")
    return header


def _row(header: list[str], fields: list[str]) -> Row | ValueError:
    if len(fields) != len(header):
        return ValueError(f"{len(fields)} fields, where the first line names {len(header)}")
    return dict(zip(header, fields, strict=True))
