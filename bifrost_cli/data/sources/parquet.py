"""Parquet files of captions and either the images themselves or their paths. Two row groups of a file are in memory at
most, never a column of images; one that would unpack to far more than it takes in the file is not read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate, repeat
from threading import Lock
from typing import Any

from bifrost_cli.config.schema import Latents
from bifrost_cli.data.images import BadImage
from bifrost_cli.data.sources.captions import PLAN, Columns, first_text
from bifrost_cli.data.sources.item import Found, Listing, Problem, SourceItem, key_of
from bifrost_cli.data.sources.remote import is_remote, open_place, path_of, reading, required
from bifrost_cli.data.sources.table import path_entry
from bifrost_cli.errors import DataError, EnvironmentProblem

NULL = "the image cell is null"
_UNPACKED, _RATIO = 1 << 29, 100  # bytes of a column in a row group, and times what it takes in the file


def list_parquet(places: list[str], rules: Latents) -> Listing:
    """DataError: a file that is not there, is no Parquet file, has no rows, or lacks a column (naming those it has)."""
    said: tuple[str, ...] = ()
    found: list[Found] = []
    for place in places:
        file = _File(place)
        columns = file.choose_columns(rules)
        said = said or columns.said
        found += _entries(file, columns, f"{path_of(place).stem}/" if len(places) > 1 else "", rules)
    if not found:
        raise DataError(f"no images in {places[0]}: it has no rows")
    return Listing.of(found, said=said)


def bytes_of_cell(cell: Any) -> bytes:
    """The bytes of an image's cell: bytes, or Hugging Face's {"bytes", "path"}. BadImage: null, or a path alone, which
    could lead anywhere."""
    if isinstance(cell, dict):
        path, cell = cell.get("path"), cell.get("bytes")
        if cell is None and path:
            raise BadImage("the image cell holds a path and no bytes")
    if not isinstance(cell, bytes):
        raise BadImage(NULL if cell is None else "the image cell holds no bytes")
    return cell


def _entries(file: _File, columns: Columns, prefix: str, rules: Latents) -> Iterator[Found]:
    embedded = file.holds(columns.image) == "images"
    for number, row in enumerate(file.rows([*columns.captions, PLAN, *([] if embedded else [columns.image])])):
        where, name = f"{file.place}: row {number}", f"{prefix}{number:09d}.row"
        try:
            caption, plan = columns.texts(row)
            path = None if embedded else first_text(row, [columns.image])
            if path:
                yield path, path_entry(file.place, path, caption, plan, rules)
            else:
                read = partial(file.image, columns.image, number)
                yield name, SourceItem(key_of(name), where, read, caption, plan, None if embedded else NULL)
        except ValueError as error:
            yield Problem("row", where, str(error))


class _File:
    """One Parquet file, open for as long as its images may be asked for."""

    def __init__(self, place: str) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise EnvironmentProblem("reading Parquet needs the package pyarrow", code="BF-ENV-002",
                                     fix="pip install 'bifrost-cli[hf]'") from error  # fmt: skip
        self.place, self._types, self._lock = place, pyarrow.types, Lock()
        self._errors = (pyarrow.ArrowException,) if is_remote(place) else (pyarrow.ArrowException, OSError)
        try:
            with required(place), reading(place):
                self._file = pyarrow.parquet.ParquetFile(open_place(place), page_checksum_verification=True)
        except self._errors as error:
            raise self._damaged(error) from error
        self.columns = self._file.schema_arrow.names
        groups = (self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups))
        self._starts = list(accumulate(groups, initial=0))
        self._group = lru_cache(maxsize=2)(self._read_group)

    def holds(self, column: str) -> str | None:
        """`images`, `text` (which may be paths), or None."""
        types, kind = self._types, self._file.schema_arrow.field(column).type
        if types.is_binary(kind) or types.is_large_binary(kind):
            return "images"
        if types.is_struct(kind):
            return "images" if kind.get_field_index("bytes") >= 0 else None
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return "text" if types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind) else None

    def choose_columns(self, rules: Latents) -> Columns:
        """DataError when a column is not there, or does not hold what it is used for."""
        columns = Columns.choose(self.columns, self.place, rules)
        wrong = [] if self.holds(columns.image) else [(columns.image, "images or their paths")]
        wrong += [(name, "text") for name in columns.captions if self.holds(name) != "text"]
        for name, wanted in wrong:
            kind = self._file.schema_arrow.field(name).type
            raise DataError(f"column {name} of {self.place} holds {kind}, not {wanted}", code="BF-DATA-005",
                            at=f"it has {', '.join(self.columns)}", fix="--image-column NAME, --caption-column NAME"
                            )  # fmt: skip
        return columns

    def rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Those cells of every row that are there."""
        present = [name for name in self.columns if name in columns]
        try:
            for group in range(len(self._starts) - 1):
                self._refuse_bomb(group, present)
            if not present:
                yield from repeat({}, self._starts[-1])
                return
            for batch in self._file.iter_batches(4096, columns=present):
                yield from batch.to_pylist()
        except self._errors as error:
            raise self._damaged(error) from error

    def image(self, column: str, row: int) -> bytes:
        group = bisect_right(self._starts, row) - 1
        try:
            with reading(self.place), self._lock:
                return bytes_of_cell(self._group(group, column)[row - self._starts[group]].as_py())
        except self._errors as error:
            raise BadImage(f"damaged, or changed during the run: {error}") from error

    def _read_group(self, group: int, column: str) -> Any:
        try:
            self._refuse_bomb(group, [column])
        except DataError as error:
            raise BadImage(error.message) from error
        return self._file.read_row_group(group, columns=[column]).column(0)

    def _refuse_bomb(self, group: int, columns: Sequence[str]) -> None:
        """DataError for a column that would unpack to more memory than any honest one, before it is unpacked."""
        chunks = self._file.metadata.row_group(group)
        for chunk in map(chunks.column, range(chunks.num_columns)):
            size, packed = chunk.total_uncompressed_size, max(1, chunk.total_compressed_size)
            if chunk.path_in_schema.split(".")[0] in columns and size > _UNPACKED and size > _RATIO * packed:
                message = f"{self.place}: column {chunk.path_in_schema} unpacks from {packed:,} to {size:,} bytes"
                fix = "write it again in smaller row groups, or leave it out"
                raise DataError(message, fix=fix, code="BF-DATA-005")

    def _damaged(self, error: Exception) -> DataError:
        fix = "copy or make it again; a file of a few hundred bytes from a git clone is a pointer: git lfs pull"
        return DataError(f"{self.place} is no Parquet file, or is damaged", at=str(error), fix=fix, code="BF-DATA-005")
