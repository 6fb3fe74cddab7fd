"""How a latents store lies on the disk: one Zarr v3 group with arrays cut into shards of whole rows.

In: sizes and rows, or a folder. Out: the bytes of shards and of Zarr's own files, the names they go by, and arrays
opened for reading. Writes nothing. Does not know what the rows mean, which are complete, or who checks them.

`latents` (N, P, C) and, where wanted, `vae` (N, c, h, w) are float16; with storage int8 the latents are codes, and
`latents_scale` (N, S) holds their scales. The inner chunks carry a crc32c *inside* the shard, after zstd: without it
most flipped bits come back as other numbers. The fill value is NaN (a code of -128), so that what was never written
cannot read as zeros.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from bifrost_cli.data.latents.index import MEND
from bifrost_cli.data.latents.int8 import MISSING, scales_of_row
from bifrost_cli.errors import StoreError

ZARR = "store.zarr"
FORMATS = {"float16": 1, "int8": 2}  # by how the latents are stored; a reader of 1 must refuse codes
LATENTS, SCALE = "latents", "latents_scale"
_LEVEL = 3


@dataclass(frozen=True)
class StoreLayout:
    """Sizes of a store: `rows` of `grid` (H, W) patches with `channels` each; `vae` is (c, h, w) or None; `storage` is
    how the latents are stored, float16 or int8."""

    rows: int
    grid: tuple[int, int]
    channels: int
    vae: tuple[int, int, int] | None = None
    shard_rows: int = 1024
    chunk_rows: int = 16
    storage: str = "float16"

    def __post_init__(self) -> None:
        if self.shard_rows % self.chunk_rows:
            raise ValueError(f"shard_rows {self.shard_rows} is not a multiple of chunk_rows {self.chunk_rows}")

    @property
    def row_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one row as stored, by array name."""
        patches = self.grid[0] * self.grid[1]
        shapes: dict[str, tuple[int, ...]] = {LATENTS: (patches, self.channels)}
        if self.storage == "int8":
            shapes[SCALE] = (scales_of_row(patches, self.channels),)
        return shapes if self.vae is None else {**shapes, "vae": tuple(self.vae)}

    def dtype(self, name: str) -> str:
        """The number format of an array."""
        return self.storage if name == LATENTS else "float16"

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on the disk, before compression."""
        shapes = self.row_shapes.items()
        return sum(math.prod(shape) * (1 if self.dtype(name) == "int8" else 2) for name, shape in shapes)

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    def span(self, shard: int) -> slice:
        """The rows of one shard."""
        return slice(shard * self.shard_rows, min(self.rows, (shard + 1) * self.shard_rows))

    def shard_file(self, name: str, shard: int) -> str:
        """The file of one shard of one array, relative to the artifact, with forward slashes."""
        return "/".join([ZARR, name, "c", str(shard), *("0" for _ in self.row_shapes[name])])

    def shard_files(self, shard: int) -> list[str]:
        return [self.shard_file(name, shard) for name in self.row_shapes]

    def stored_shard_rows(self) -> int:
        """Rows of a shard as Zarr sees it: a store smaller than one shard is not padded to a whole one."""
        return min(self.shard_rows, -(-self.rows // self.chunk_rows) * self.chunk_rows)


def shard_bytes(layout: StoreLayout, name: str, shard: int, rows: np.ndarray) -> bytes:
    """The bytes of one shard of one array: Zarr writes it into memory, and no file."""
    memory: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(memory), zarr_format=3)
    _create_array(group, name, layout)[layout.span(shard)] = rows
    return memory[layout.shard_file(name, shard).removeprefix(f"{ZARR}/")].to_bytes()


def metadata_files(layout: StoreLayout, attributes: Mapping[str, Any]) -> dict[str, bytes]:
    """Zarr's own files of the group and its arrays, by their name in the artifact."""
    memory: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(memory), zarr_format=3, attributes=dict(attributes))
    for name in layout.row_shapes:
        _create_array(group, name, layout)
    return {f"{ZARR}/{name}": data.to_bytes() for name, data in memory.items()}


def _create_array(group: zarr.Group, name: str, layout: StoreLayout) -> zarr.Array:
    row = layout.row_shapes[name]
    return group.create_array(
        name,
        shape=(layout.rows, *row),
        dtype=layout.dtype(name),
        chunks=(layout.chunk_rows, *row),
        shards=(layout.stored_shard_rows(), *row),
        compressors=[ZstdCodec(level=_LEVEL), Crc32cCodec()],
        fill_value=MISSING if layout.dtype(name) == "int8" else float("nan"),
        config={"write_empty_chunks": True},
    )


def open_group(folder: Path) -> zarr.Group:
    """The Zarr group below `folder`. StoreError when Zarr cannot read its metadata."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # foreign files beside the arrays: `artifacts verify` lists them
            return zarr.open_group(str(folder / ZARR), mode="r", zarr_format=3, use_consolidated=False)
    except Exception as error:
        raise StoreError(f"{folder / ZARR} cannot be opened: {error}", fix=MEND, code="BF-STORE-005") from error


def open_arrays(group: zarr.Group, layout: StoreLayout, folder: Path) -> dict[str, zarr.Array]:
    """The group's arrays, checked against `layout`: shape, dtype, shards, and crc32c as the last inner codec."""
    arrays = {}
    for name, row in layout.row_shapes.items():
        try:
            array: Any = group[name]
            found = (array.shape, str(array.dtype), array.shards, array.chunks, array.compressors[-1:])
        except Exception as error:
            raise StoreError(
                f"{folder / ZARR} has no readable array {name}: {error}", fix=MEND, code="BF-STORE-005"
            ) from error
        chunk, shard = (layout.chunk_rows, *row), (layout.stored_shard_rows(), *row)
        wanted = ((layout.rows, *row), layout.dtype(name), shard, chunk, (Crc32cCodec(),))
        if found != wanted:
            raise StoreError(
                f"{folder / ZARR}/{name} is not laid out as its index says",
                at=f"{found}, not {wanted}",
                fix=MEND,
                code="BF-STORE-005",
            )
        arrays[name] = array
    return arrays
