"""How a latents store lies on the disk: a Zarr v3 group with arrays cut into shards of whole rows, and an index.

`latents` (N, P, C) and, where wanted, `vae` (N, c, h, w) are float16; with storage int8 the latents are codes, and
`latents_scale` (N, S) holds their scales. A crc32c lies *inside* the shard, behind each chunk: without it most flipped
bits come back as other numbers. The fill value is NaN (a code of -128): what was never written cannot read as zeros.
`index/shard-NNNNN.jsonl` has a line for each row and a last one that commits the shard, with the digests of its files,
the checksums of their chunks and its sums for the channel statistics. It appears, whole, after they are on the disk; a
shard without it does not exist.

Formats 1 (float16) and 2 (int8) compressed each chunk with zstd, which saved 5 to 8 % of float16 latents at half a
gigabyte a second, and their index had no checksums of chunks."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from bifrost_cli.artifacts.files import canonical_json, write_bytes
from bifrost_cli.artifacts.identity import digest_of
from bifrost_cli.data.latents.int8 import MISSING, scales_of_row
from bifrost_cli.data.latents.shard_file import CRC_BYTES, ENTRY_BYTES
from bifrost_cli.errors import StoreError

ZARR, INDEX, OK = "store.zarr", "index", "ok"
FORMAT = 3
OLDER = {"float16": 1, "int8": 2}  # by how the latents are stored
LARGE_ROW = 65_536  # bytes; from here on a chunk holds one row, so that nothing is read that was not asked for
LATENTS, SCALE = "latents", "latents_scale"
MEND = "restore the file from a copy, or extract again in another place: bifrost extract-latents -o PLACE"


@dataclass(frozen=True)
class StoreLayout:
    """Sizes of a store: `rows` of `grid` (H, W) patches with `channels` each; `vae` is (c, h, w) or None; `storage` is
    how the latents are stored, float16 or int8. `chunk_rows` is the most that a chunk holds: see `rows_of_chunk`."""

    rows: int
    grid: tuple[int, int]
    channels: int
    vae: tuple[int, int, int] | None = None
    shard_rows: int = 1024
    chunk_rows: int = 16
    storage: str = "float16"
    format: int = FORMAT

    @classmethod
    def of(cls, attributes: Mapping[str, Any], path: Path) -> StoreLayout:
        """From the attributes of the store in `path`. StoreError: of another format."""
        storage, number = attributes.get("storage", "float16"), attributes.get("format")
        if type(number) is int and number > FORMAT:
            raise StoreError.newer(f"{path} is a store ({storage})", number, FORMAT)
        if storage not in OLDER or number not in (FORMAT, OLDER[storage]):
            raise StoreError(f"{path} has store format {number} ({storage}); this bifrost reads up to {FORMAT}")
        vae = attributes["vae_shape"]
        return cls(attributes["rows"], tuple(attributes["grid"]), attributes["channels"], tuple(vae) if vae else None,
                   attributes["shard_rows"], attributes["chunk_rows"], storage, number)  # fmt: skip

    @property
    def attributes(self) -> dict[str, Any]:
        """What `of` reads."""
        storage = {} if self.storage == "float16" else {"storage": self.storage}
        return {"format": self.format, **storage, "rows": self.rows, "grid": list(self.grid),
                "channels": self.channels, "vae_shape": list(self.vae) if self.vae else None,
                "shard_rows": self.shard_rows, "chunk_rows": self.rows_of_chunk}  # fmt: skip

    @property
    def older(self) -> StoreLayout:
        """The same store as a bifrost before format 3 laid it out."""
        return replace(self, format=OLDER[self.storage])

    @property
    def compressed(self) -> bool:
        return self.format < FORMAT

    @property
    def rows_of_chunk(self) -> int:
        """Rows of a chunk, the unit of reading."""
        return self.chunk_rows if self.compressed or self.row_bytes < LARGE_ROW else 1

    @property
    def row_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one row as stored, by array name."""
        patches = self.grid[0] * self.grid[1]
        shapes: dict[str, tuple[int, ...]] = {LATENTS: (patches, self.channels)}
        if self.storage == "int8":
            shapes[SCALE] = (scales_of_row(patches, self.channels),)
        return shapes if self.vae is None else {**shapes, "vae": tuple(self.vae)}

    def dtype(self, name: str) -> str:
        return self.storage if name == LATENTS else "float16"

    def fill(self, name: str) -> float:
        """What stands where nothing was written."""
        return MISSING if self.dtype(name) == "int8" else float("nan")

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on the disk, before compression."""
        return sum(math.prod(shape) * np.dtype(self.dtype(name)).itemsize for name, shape in self.row_shapes.items())

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

    @property
    def chunks_of_shard(self) -> int:
        """Chunks that the index of a shard has room for; a store smaller than one shard is not padded to a whole."""
        return min(self.shard_rows // self.rows_of_chunk, -(-self.rows // self.rows_of_chunk))

    def bytes_of_shard(self, name: str, shard: int) -> int:
        """Size of one shard's file, from format 3 on."""
        span, row = self.span(shard), math.prod(self.row_shapes[name]) * np.dtype(self.dtype(name)).itemsize
        chunks = -(-(span.stop - span.start) // self.rows_of_chunk)
        return chunks * (self.rows_of_chunk * row + CRC_BYTES) + self.chunks_of_shard * ENTRY_BYTES + CRC_BYTES

    def array_settings(self, name: str) -> dict[str, Any]:
        """How Zarr creates an array."""
        of_chunk = self.rows_of_chunk
        lengths = (self.rows, self.chunks_of_shard * of_chunk, of_chunk)
        shape, shards, chunks = ((n, *self.row_shapes[name]) for n in lengths)
        compressors = [ZstdCodec(level=3), Crc32cCodec()] if self.compressed else [Crc32cCodec()]
        return {"shape": shape, "dtype": self.dtype(name), "shards": shards, "chunks": chunks,
                "compressors": compressors, "fill_value": self.fill(name)}  # fmt: skip


def metadata_files(layout: StoreLayout, attributes: Mapping[str, Any]) -> dict[str, bytes]:
    """Zarr's own files of the group and its arrays, by their name in the artifact."""
    memory: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(memory), zarr_format=3, attributes=dict(attributes))
    for name in layout.row_shapes:
        group.create_array(name, **layout.array_settings(name))
    return {f"{ZARR}/{name}": data.to_bytes() for name, data in memory.items()}


def open_group(folder: Path) -> zarr.Group:
    """The Zarr group below `folder`. StoreError when Zarr cannot read its metadata."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # foreign files beside the arrays: `artifacts verify` lists them
            return zarr.open_group(str(folder / ZARR), mode="r", zarr_format=3, use_consolidated=False)
    except Exception as error:
        raise StoreError(f"{folder / ZARR} cannot be opened: {error}", fix=MEND, code="BF-STORE-005") from error


def require_arrays(group: zarr.Group, layout: StoreLayout, folder: Path) -> None:
    """StoreError unless the group's arrays have the shape, dtype, shards and inner codecs of `layout`."""
    for name in layout.row_shapes:
        try:
            array: Any = group[name]
            codecs = [type(codec).__name__ for codec in array.compressors]
            found = (array.shape, str(array.dtype), array.shards, array.chunks, codecs)
        except Exception as error:
            message = f"{folder / ZARR} has no readable array {name}: {error}"
            raise StoreError(message, fix=MEND, code="BF-STORE-005") from error
        settings = layout.array_settings(name)
        codecs = [type(codec).__name__ for codec in settings["compressors"]]
        wanted = (*(settings[key] for key in ("shape", "dtype", "shards", "chunks")), codecs)
        if found != wanted:
            message = f"{folder / ZARR}/{name} is not laid out as its index says"
            raise StoreError(message, at=f"{found}, not {wanted}", fix=MEND, code="BF-STORE-005")


@dataclass(frozen=True)
class ShardIndex:
    """One committed shard: its row lines, of each file by name {"sha256", "size", "crc32c": of its chunks, as hex}, its
    sums, and the format of its files."""

    lines: list[dict[str, Any]]
    files: dict[str, dict[str, Any]]
    sums: dict[str, Any]
    format: int | None = None  # before 3 none was noted

    def crcs(self, file: str) -> np.ndarray:
        """The checksums of a file's chunks as they were written, uint32; from format 3 on."""
        return np.frombuffer(bytes.fromhex(self.files[file]["crc32c"]), "<u4")


def index_file(shard: int) -> str:
    return f"{INDEX}/shard-{shard:05d}.jsonl"


def write_index(folder: Path, shard: int, lines: Sequence[Mapping[str, Any]], files: Mapping[str, Any],
                sums: Mapping[str, Any]) -> None:  # fmt: skip
    """Commit a shard. Its files must have been fsynced before."""
    rows = b"".join(canonical_json(line) + b"\n" for line in lines)
    commit = {"shard": shard, "lines": hashlib.sha256(rows).hexdigest(), "files": files, "sums": sums, "format": FORMAT}
    last = canonical_json({"commit": commit, "digest": digest_of(commit)})
    write_bytes(folder / index_file(shard), rows + last + b"\n")


def read_index(folder: Path, shard: int) -> ShardIndex:
    """One shard's index. StoreError when it is missing, cut short or changed."""
    path = folder / index_file(shard)
    try:
        *rows, last = path.read_bytes().splitlines(keepends=True)
        end = json.loads(last)
        commit = end["commit"]
        lines = hashlib.sha256(b"".join(rows)).hexdigest()
        whole = (end["digest"], commit["lines"], commit["shard"]) == (digest_of(commit), lines, shard)
        index = ShardIndex([json.loads(row) for row in rows], commit["files"], commit["sums"], commit.get("format"))
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing", fix=MEND, code="BF-STORE-006") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged: {error}", fix=MEND, code="BF-STORE-005") from error
    if not whole:
        raise StoreError(f"{path} was changed after it was written", fix=MEND, code="BF-STORE-005")
    return index
