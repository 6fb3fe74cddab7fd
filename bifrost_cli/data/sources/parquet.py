"""Parquet files of captions and either the images themselves or their paths.

Images are read a row group at a time, when they are needed: two row groups of a file are in memory at most, never a
column of images. A row group that would unpack to far more than it takes in the file is not read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

from bifrost_cli.config.schema import Latents
from bifrost_cli.data.images import BadImage
from bifrost_cli.data.sources.captions import PLAN, Columns, caption_of, choose_columns, text_of
from bifrost_cli.data.sources.item import Listing, Problem, SourceItem, in_key_order, key_of
from bifrost_cli.data.sources.remote import is_remote, open_place, reading
from bifrost_cli.data.sources.table import path_entry
from bifrost_cli.errors import DataError, EnvironmentProblem

NULL = "the image cell is null"
_BATCH = 4096
_UNPACKED, _RATIO = 1 << 29, 100  # bytes of a column in a row group, and times what it takes in the file


def list_parquet(places: list[str], rules: Latents) -> Listing:
    """The images of a table's parts.

    DataError: a file that is not there, is no Parquet file, has no rows, or lacks a column (naming those it has).
    """
    problems: list[Problem] = []
    said: tuple[str, ...] = ()
    named: list[tuple[str, SourceItem]] = []
    for place in places:
        file = _File(place)
        columns = choose_columns(file.columns, place, rules)
        file.require_types(columns)
        said = said or columns.said
        prefix = f"{Path(place).stem}/" if len(places) > 1 else ""
        named += _named_entries(file, columns, prefix, rules, problems)
    if not named and not problems:
        raise DataError(f"no images in {places[0]}: it has no rows")
    entries, everything = in_key_order(named, problems)
    return Listing(entries, said=said, problems=everything)


def bytes_of_cell(cell: Any) -> bytes:
    """The bytes of an image's cell: bytes, or Hugging Face's {"bytes", "path"}. BadImage: null, or a path alone, which
    could lead anywhere."""
    if isinstance(cell, dict):
        path, cell = cell.get("path"), cell.get("bytes")
        if cell is None and path:
            raise BadImage("the image cell holds a path and no bytes")
    if cell is None:
        raise BadImage(NULL)
    if not isinstance(cell, bytes):
        raise BadImage("the image cell holds no bytes")
    return cell


def _named_entries(
    file: _File, columns: Columns, prefix: str, rules: Latents, problems: list[Problem]
) -> Iterator[tuple[str, SourceItem]]:
    embedded = file.embeds(columns.image)
    for number, row in enumerate(file.rows(columns, embedded)):
        where, name = f"{file.place}: row {number}", f"{prefix}{number:09d}.row"
        try:
            caption, plan = caption_of(row, columns), text_of(row, PLAN)
            path = None if embedded else text_of(row, columns.image)
            if path:
                yield path, path_entry(file.place, path, caption, plan, rules)
            else:
                read = partial(file.image, columns.image, number)
                yield name, SourceItem(key_of(name), where, read, caption, plan, None if embedded else NULL)
        except ValueError as error:
            problems.append(Problem("row", where, str(error)))


class _File:
    """One Parquet file, open for as long as its images may be asked for."""

    def __init__(self, place: str) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise EnvironmentProblem(
                "reading Parquet needs the package pyarrow", fix="pip install 'bifrost-cli[hf]'", code="BF-ENV-002"
            ) from error
        self.place, self._types, self._lock = place, pyarrow.types, Lock()
        self._errors = (pyarrow.ArrowException,) if is_remote(place) else (pyarrow.ArrowException, OSError)
        try:
            with reading(place):
                self._file = pyarrow.parquet.ParquetFile(open_place(place), page_checksum_verification=True)
        except BadImage as error:
            raise DataError(f"{place} does not exist or cannot be read", at=error.message) from error
        except self._errors as error:
            raise self._damaged(error) from error
        self.columns = self._file.schema_arrow.names
        groups = (self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups))
        self._starts = list(accumulate(groups, initial=0))
        self._group = lru_cache(maxsize=2)(self._read_group)

    def embeds(self, column: str) -> bool:
        """Whether a column holds images rather than their paths."""
        return not self._is_text(self._type(column))

    def require_types(self, columns: Columns) -> None:
        """DataError when a column does not hold what it is used for."""
        kind = self._type(columns.image)
        image = self._types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        binary = self._types.is_binary(kind) or self._types.is_large_binary(kind)
        wrong = [] if image or binary or self._is_text(kind) else [(columns.image, "images or their paths")]
        wrong += [(name, "text") for name in columns.captions if not self._is_text(self._type(name))]
        for name, wanted in wrong:
            raise DataError(
                f"column {name} of {self.place} holds {self._type(name)}, not {wanted}",
                at=f"it has {', '.join(self.columns)}",
                fix="--image-column NAME, --caption-column NAME",
                code="BF-DATA-005",
            )

    def rows(self, columns: Columns, embedded: bool) -> Iterator[dict[str, Any]]:
        """Every row without its image."""
        wanted = [*columns.captions, PLAN, *([] if embedded else [columns.image])]
        present = [name for name in self.columns if name in wanted]
        try:
            for group in range(len(self._starts) - 1):
                self._refuse_bomb(group, present)
            if not present:
                yield from ({} for _ in range(self._starts[-1]))
            for batch in self._file.iter_batches(_BATCH, columns=present) if present else ():
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

    def _refuse_bomb(self, group: int, columns: Sequence[str]) -> None:
        """DataError for a column that would unpack to more memory than any honest one, before it is unpacked."""
        chunks = self._file.metadata.row_group(group)
        for chunk in map(chunks.column, range(chunks.num_columns)):
            size, packed = chunk.total_uncompressed_size, max(1, chunk.total_compressed_size)
            if chunk.path_in_schema.split(".")[0] in columns and size > _UNPACKED and size > _RATIO * packed:
                raise DataError(
                    f"{self.place}: column {chunk.path_in_schema} unpacks from {packed:,} to {size:,} bytes",
                    fix="write it again in smaller row groups, or leave it out",
                    code="BF-DATA-005",
                )

    def _read_group(self, group: int, column: str) -> Any:
        try:
            self._refuse_bomb(group, [column])
        except DataError as error:
            raise BadImage(error.message) from error
        return self._file.read_row_group(group, columns=[column]).column(0)

    def _type(self, column: str) -> Any:
        return self._file.schema_arrow.field(column).type

    def _is_text(self, kind: Any) -> bool:
        kind = kind.value_type if self._types.is_dictionary(kind) else kind
        return self._types.is_string(kind) or self._types.is_large_string(kind) or self._types.is_null(kind)

    def _damaged(self, error: Exception) -> DataError:
        return DataError(f"{self.place} is no Parquet file, or is damaged", at=str(error), code="BF-DATA-005")
