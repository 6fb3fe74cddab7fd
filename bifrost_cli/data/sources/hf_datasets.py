"""A data set of Hugging Face's library: an id on the hub, or a folder, as `NAME_OR_PATH[:SPLIT]`. The library downloads
and indexes; images come as the bytes they were stored as, and are decoded by our reader. Data sets that bring code of
their own are refused by the library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

from bifrost_cli.config.schema import Latents
from bifrost_cli.data.sources.captions import PLAN, Columns
from bifrost_cli.data.sources.item import Found, Listing, Problem, SourceItem, key_of
from bifrost_cli.data.sources.parquet import bytes_of_cell
from bifrost_cli.data.sources.remote import read_place
from bifrost_cli.errors import DataError, EnvironmentProblem

HUB = "hf:"


def list_hub(name: str, rules: Latents) -> Listing:
    """EnvironmentProblem: the `hf` extra is missing, or the data set cannot be reached. DataError: no such split, no
    such column (naming those it has), a column of another kind."""
    path, _, split = name.partition(":")
    rows = _load(path, split)
    columns = Columns.choose(rows.column_names, name, rules)
    listing = Listing.of(_entries(rows, _images(rows, columns.image, name), columns, name))
    if not listing.entries and not listing.problems:
        raise DataError(f"no images in {name}: it has no rows")
    said = f"data set: {name}, split {split or 'train'}, {len(listing.entries)} rows"
    return replace(listing, said=(said, *columns.said))


def _load(path: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise EnvironmentProblem("reading a data set of the hub needs the package datasets", code="BF-ENV-002",
                                 fix="pip install 'bifrost-cli[hf]'") from error  # fmt: skip
    saved = Path(path)
    try:
        if (saved / "dataset_dict.json").exists():
            return datasets.load_from_disk(path)[split or "train"]
        if (saved / "state.json").exists():
            if split:
                raise ValueError("it has no splits")
            return datasets.load_from_disk(path)
        return datasets.load_dataset(path, split=split or "train", streaming=False)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        fix = "see that the name, the network and the token (hf auth login) are right, or give its folder"
        message = f"the data set {path} cannot be reached"
        raise EnvironmentProblem(message, at=str(error), fix=fix, code="BF-ENV-020") from error
    except (ValueError, KeyError, RuntimeError, OSError, datasets.exceptions.DatasetsError) as error:
        message = f"the data set {path} cannot be read with split {split or 'train'}"
        raise DataError(message, at=str(error), fix="hf:NAME:SPLIT", code="BF-DATA-005") from error


def _images(rows: Any, column: str, name: str) -> Any:
    """The column of images, undecoded."""
    import datasets

    feature, images = rows.features[column], rows.select_columns([column])
    if isinstance(feature, datasets.Image):
        return images.cast_column(column, datasets.Image(decode=False))
    if getattr(feature, "dtype", None) in ("binary", "large_binary"):
        return images
    raise DataError(f"column {column} of {name} holds {getattr(feature, 'dtype', feature)}, not images",
                    at=f"it has {', '.join(rows.column_names)}", fix="--image-column NAME",
                    code="BF-DATA-005")  # fmt: skip


def _entries(rows: Any, images: Any, columns: Columns, name: str) -> Iterator[Found]:
    texts = rows.select_columns([column for column in (*columns.captions, PLAN) if column in rows.column_names])
    classes = {column: feature for column, feature in texts.features.items() if hasattr(feature, "int2str")}
    found: Iterable[dict[str, Any]] = repeat({}, len(rows))
    if texts.column_names:
        found = (dict(zip(b, cells, strict=True)) for b in texts.iter(4096) for cells in zip(*b.values(), strict=True))
    for number, row in enumerate(found):
        where, key = f"{name}: row {number}", f"{number:09d}.row"
        for column, feature in classes.items():
            row[column] = None if row[column] is None or row[column] < 0 else feature.int2str(row[column])
        try:
            read = partial(_image, images, columns.image, number)
            yield key, SourceItem(key_of(key), where, read, *columns.texts(row))
        except ValueError as error:
            yield Problem("row", where, str(error))


def _image(images: Any, column: str, number: int) -> bytes:
    cell = images[number][column]
    if isinstance(cell, dict) and cell.get("bytes") is None and cell.get("path"):
        return read_place(cell["path"])  # the library's own: where it keeps what it downloaded
    return bytes_of_cell(cell)
