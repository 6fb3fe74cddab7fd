"""A data set of Hugging Face's library: an id on the hub, or a folder, as `NAME_OR_PATH[:SPLIT]`.

The library downloads and indexes; images come as the bytes they were
stored as, and are decoded by our reader. Data sets that bring code of their own are refused by the library.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bifrost_cli.config.schema import Latents
from bifrost_cli.data.sources.captions import PLAN, Columns, caption_of, choose_columns, text_of
from bifrost_cli.data.sources.item import Listing, Problem, SourceItem, key_of
from bifrost_cli.data.sources.parquet import bytes_of_cell
from bifrost_cli.data.sources.remote import read_place
from bifrost_cli.errors import DataError, EnvironmentProblem

HUB = "hf:"
_BATCH = 4096


def list_hub(name: str, rules: Latents) -> Listing:
    """EnvironmentProblem: the `hf` extra is missing, or the data set cannot be reached. DataError: no such split, no
    such column (naming those it has), a column of another kind."""
    path, _, split = name.partition(":")
    rows = _load(path, split)
    columns = choose_columns(rows.column_names, name, rules)
    images = _images(rows, columns.image, name)
    problems: list[Problem] = []
    entries = tuple(_entries(rows, images, columns, name, problems))
    if not entries and not problems:
        raise DataError(f"no images in {name}: it has no rows")
    said = (f"data set: {name}, split {split or 'train'}, {len(entries)} rows", *columns.said)
    return Listing(entries, said=said, problems=tuple(problems))


def _load(path: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise EnvironmentProblem(
            "reading a data set of the hub needs the package datasets", fix="pip install 'bifrost-cli[hf]'",
            code="BF-ENV-002",
        ) from error  # fmt: skip
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
        raise EnvironmentProblem(
            f"the data set {path} cannot be reached", at=str(error), code="BF-ENV-020",
            fix="see that the name, the network and the token (hf auth login) are right, or give its folder",
        ) from error  # fmt: skip
    except (ValueError, KeyError, RuntimeError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"the data set {path} cannot be read with split {split or 'train'}", at=str(error), fix="hf:NAME:SPLIT",
            code="BF-DATA-005",
        ) from error  # fmt: skip


def _images(rows: Any, column: str, name: str) -> Any:
    """The column of images, undecoded."""
    import datasets

    feature = rows.features[column]
    if isinstance(feature, datasets.Image):
        return rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    if getattr(feature, "dtype", None) in ("binary", "large_binary"):
        return rows.select_columns([column])
    raise DataError(
        f"column {column} of {name} holds {getattr(feature, 'dtype', feature)}, not images",
        at=f"it has {', '.join(rows.column_names)}",
        fix="--image-column NAME",
        code="BF-DATA-005",
    )


def _entries(rows: Any, images: Any, columns: Columns, name: str, problems: list[Problem]) -> Iterator[SourceItem]:
    texts = rows.select_columns([column for column in (*columns.captions, PLAN) if column in rows.column_names])
    classes = {column: feature for column, feature in texts.features.items() if hasattr(feature, "int2str")}
    for number, row in enumerate(_rows(texts, len(rows))):
        for column, feature in classes.items():
            row[column] = None if row[column] is None or row[column] < 0 else feature.int2str(row[column])
        try:
            caption, plan = caption_of(row, columns), text_of(row, PLAN)
        except ValueError as error:
            problems.append(Problem("row", f"{name}: row {number}", str(error)))
            continue
        read = partial(_image, images, columns.image, number)
        yield SourceItem(key_of(f"{number:09d}.row"), f"{name}: row {number}", read, caption, plan)


def _rows(texts: Any, count: int) -> Iterator[dict[str, Any]]:
    if not texts.column_names:
        yield from ({} for _ in range(count))
        return
    for batch in texts.iter(_BATCH):
        for cells in zip(*batch.values(), strict=True):
            yield dict(zip(batch, cells, strict=True))


def _image(images: Any, column: str, number: int) -> bytes:
    cell = images[number][column]
    if isinstance(cell, dict) and cell.get("bytes") is None and cell.get("path"):
        return read_place(cell["path"])  # the library's own: where it keeps what it downloaded
    return bytes_of_cell(cell)
