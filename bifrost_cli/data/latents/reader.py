"""Reading a latents store: a wrong, missing or changed byte is an error, and never returned as a number. Small files
are checked against the manifest when the store is opened; each chunk that is read by the crc32c that lies behind it
and, from format 3 on, by the one that the shard's index noted when it was written. Nothing is read that was not asked
for: the sha256 of whole shards is for `bifrost artifacts verify`."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from shlex import quote
from threading import Lock
from typing import Any

import numpy as np

from bifrost_cli.artifacts import Artifact
from bifrost_cli.artifacts.files import sha256_file
from bifrost_cli.data.images import BadImage
from bifrost_cli.data.latents import zarr_layout
from bifrost_cli.data.latents.int8 import decode_int8
from bifrost_cli.data.latents.remote_store import CONNECTIONS, copy_of
from bifrost_cli.data.latents.shard_file import ShardReader, is_finite, read_index
from bifrost_cli.data.latents.zarr_layout import LATENTS, MEND, OK, SCALE, StoreLayout
from bifrost_cli.data.sources.remote import is_remote
from bifrost_cli.errors import StoreError

_KEPT_IN_MEMORY = 2_000_000_000  # bytes of one array
_WORTH_A_THREAD = 65_536  # bytes of a chunk


class StoredShards:
    """What lies in the shards of a store, as it is stored; several threads may read at once.

    Attributes:
        layout: sizes and format of the store.
    """

    def __init__(self, folder: Path | str, layout: StoreLayout, crcs: Mapping[str, np.ndarray] | None = None,
                 hashes: Mapping[str, str] | None = None) -> None:  # fmt: skip
        """`crcs` of the chunks of each file, as its index noted them; `hashes` are the sha256 of files that are to be
        checked as a whole before anything of them is given."""
        self.layout, self._folder, self._crcs, self._hashes = layout, folder, crcs or {}, hashes or {}
        self._open: dict[tuple[str, int], ShardReader] = {}

    def read(self, name: str, chunk: int, out: np.ndarray | None = None) -> np.ndarray:
        """One chunk of an array, by its number in the store, (rows, ...); into `out` where it is given. StoreError
        naming shard and rows when it is damaged."""
        shard, inner = divmod(chunk, self.layout.shard_rows // self.layout.rows_of_chunk)
        try:
            return self._shard(name, shard).read(inner, out)
        except (ValueError, OSError, RuntimeError, MemoryError, BadImage) as error:  # RuntimeError: zstd's
            raise self.damaged(name, chunk, str(error)) from error

    def of_shard(self, shard: int) -> Iterator[dict[str, np.ndarray]]:
        """The rows of a shard, chunk by chunk, of each array."""
        span, size = self.layout.span(shard), self.layout.rows_of_chunk
        for start in range(span.start, span.stop, size):
            rows = min(size, span.stop - start)
            yield {name: self.read(name, start // size)[:rows] for name in self.layout.row_shapes}

    def damaged(self, name: str, chunk: int, reason: str) -> StoreError:
        size = self.layout.rows_of_chunk
        shard, (first, last) = chunk * size // self.layout.shard_rows, (chunk * size, (chunk + 1) * size - 1)
        span = self.layout.span(shard)
        rows = f"row {first}" if first == last else f"rows {first} to {min(last, span.stop - 1)}"
        message = f"{self._folder}: shard {shard} of {name} (rows {span.start} to {span.stop - 1}) is damaged"
        at = f"{self.layout.shard_file(name, shard)}, {rows}: {reason}"
        return StoreError(message, at=at, fix=MEND, code="BF-STORE-005")

    def _shard(self, name: str, shard: int) -> ShardReader:
        """Its index is read once; two threads that come first both read it."""
        if (name, shard) not in self._open:
            layout, file = self.layout, self.layout.shard_file(name, shard)
            path = f"{self._folder}/{file}" if isinstance(self._folder, str) else self._folder / file
            if isinstance(path, Path) and file in self._hashes and sha256_file(path) != self._hashes[file]:
                raise ValueError("its sha256 is not the one in the manifest")
            shape = (layout.rows_of_chunk, *layout.row_shapes[name])
            index = read_index(path, layout.chunks_of_shard)
            self._open[name, shard] = ShardReader(path, shape, np.dtype(layout.dtype(name)), index, layout.compressed,
                                                  self._crcs.get(file))  # fmt: skip
        return self._open[name, shard]


class LatentsStore:
    """The rows of a latents artifact, in sorted key order; rows that failed in the extraction are left out. Several
    threads may read at once.

    Attributes:
        rows: N.
        grid: (H, W) of the patches; P = H * W.
        channels: C.
        keys, captions: a text each row.
        plans: the plan of each row, or None.
        mean_C, std_C: of each channel over all tokens, float32.
        norm: mean length of a token.
        encoder: identity of what encoded the images.
        vae_shape: (c, h, w) of the VAE latents, or None without them.
        attributes: everything that the store says of itself.
        layout, stored: how it lies on the disk, and what lies there.
        artifact: the artifact on disk.
    """

    def __init__(self, artifact: Artifact, verify: bool, keep: int, address: str | None = None) -> None:
        self.artifact, self._path, self._keep = artifact, artifact.path, keep
        self._threads = cores() if address is None else max(CONNECTIONS, cores())
        self._kept: dict[str, np.ndarray] = {}
        self._keeping = Lock()
        group = zarr_layout.open_group(self._path)
        self.attributes: dict[str, Any] = dict(group.attrs)
        self.layout = StoreLayout.of(self.attributes, self._path)
        zarr_layout.require_arrays(group, self.layout, self._path)
        # Of each row its text and its place, nothing else: a store may have millions.
        self.keys: list[str] = []
        self.captions: list[str] = []
        self.plans: list[str | None] = []
        places = array("q")
        crcs: dict[str, np.ndarray] = {}
        for place, line in self._ok_lines(crcs):
            places.append(place)
            self.keys.append(line["key"])
            self.captions.append(line["caption"])
            self.plans.append(line.get("plan"))
        hashes = {name: entry["sha256"] for name, entry in artifact.files.items()} if verify else {}
        self.stored = StoredShards(address or self._path, self.layout, crcs, hashes)
        self._physical_N = np.array(places, np.int64)
        self.rows, self.grid, self.channels = len(self.keys), self.layout.grid, self.layout.channels
        self.vae_shape = self.layout.vae
        self.encoder: dict[str, Any] = self.attributes["encoder"]
        self.mean_C, self.std_C = (np.asarray(self.attributes[name], np.float32) for name in ("mean", "std"))
        self.norm = float(self.attributes["norm"])

    @classmethod
    def open(cls, source: Artifact | Path | str, verify: bool = False, keep: int | None = None) -> LatentsStore:
        """Open a complete store.

        Args:
            source: a latents artifact, its folder, or the address of one that lies elsewhere (s3://, https://, ...).
            verify: compare the sha256 of each shard too, when it is first touched: the whole shard is read. The
                checksums of the chunks are compared always. Not of a store elsewhere.
            keep: bytes; an array that is not larger is read whole when it is first asked for, and stays in memory.
                None is 2 GB.

        Raises:
            ArtifactError, StoreError: it is no latents store, or is damaged.
            EnvironmentProblem: the way to a store elsewhere fails, or takes longer than its time limit.
        """
        address = source.rstrip("/") if isinstance(source, str) and is_remote(source) else None
        if address is not None:
            source = copy_of(address)
        artifact = source if isinstance(source, Artifact) else Artifact.open(source)
        if artifact.kind != "latents":
            raise StoreError(f"{artifact.path} is a {artifact.kind} artifact, not latents", fix="give a latents store")
        for name, entry in artifact.files.items():  # all but the shards are hashed too
            path = artifact.path / name
            if address is not None and "/c/" in name:
                continue
            if not path.is_file() or path.stat().st_size != entry["size"]:
                trouble = "has another size than it was written with" if path.exists() else "is missing"
            elif "/c/" not in name and sha256_file(path) != entry["sha256"]:
                trouble = "was changed after it was written"
            else:
                continue
            see = f"see all of it: bifrost artifacts verify {quote(str(artifact.path))}"
            raise StoreError(f"{artifact.path}: {name} {trouble}", at=see, fix=MEND, code="BF-STORE-005")
        try:
            return cls(artifact, verify, _KEPT_IN_MEMORY if keep is None else keep, address)
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{artifact.path} is not a latents store of ours: {error}", fix=MEND) from error

    def latents(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Latents (n, P, C) float16 of `rows`, in the order given. StoreError naming the shard that is damaged."""
        return self._read(LATENTS, rows)

    def vae(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The diffusion model's VAE latents (n, c, h, w) float16 of `rows`. StoreError when the store has none."""
        if self.vae_shape is None:
            fix = "extract again with them, in another place: bifrost extract-latents --set latents.vae=true"
            raise StoreError(f"{self._path} holds no VAE latents", fix=fix, code="BF-STORE-006")
        return self._read("vae", rows)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The index line of each row, read again from the disk."""
        return [line for _, line in self._ok_lines({})]

    def _ok_lines(self, crcs: dict[str, np.ndarray]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Row number in the arrays and index line of every row that did not fail. `crcs` gets the checksums."""
        for shard in range(self.layout.shards):
            index, span = zarr_layout.read_index(self._path, shard), self.layout.span(shard)
            if not self.layout.compressed:
                crcs |= {file: index.crcs(file) for file in self.layout.shard_files(shard)}
            if len(index.lines) != span.stop - span.start:
                message = f"{self._path}: the index of shard {shard} has {len(index.lines)} rows"
                raise StoreError(message, fix=MEND, code="BF-STORE-006")
            yield from ((i, line) for i, line in enumerate(index.lines, span.start) if line["status"] == OK)

    def _read(self, name: str, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        wanted = np.asarray(rows, np.int64)
        if 2 * self.layout.rows * math.prod(self.layout.row_shapes[name]) > self._keep:
            return self._read_rows(name, self._physical_N[wanted])
        with self._keeping:
            if name not in self._kept:
                self._kept[name] = self._read_rows(name, self._physical_N)
        return self._kept[name][wanted]

    def _read_rows(self, name: str, physical_n: np.ndarray) -> np.ndarray:
        """Rows in the order given as float16, each chunk of them read once. StoreError: one is damaged or missing."""
        out = np.empty((len(physical_n), *self.layout.row_shapes[name]), np.float16)
        order = np.argsort(physical_n, kind="stable")
        chunks = physical_n[order] // self.layout.rows_of_chunk
        groups = np.split(order, np.flatnonzero(np.diff(chunks)) + 1) if len(order) else []
        fill = partial(self._read_chunk, name, physical_n, out)
        if self.layout.rows_of_chunk * out[:1].nbytes < _WORTH_A_THREAD or len(groups) < 2:
            for group in groups:
                fill(group)
        else:
            list(_readers(os.getpid(), self._threads).map(fill, groups))
        return out

    def _read_chunk(self, name: str, physical_n: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        """Read the rows that belong at `places` of `out`; they are all of one chunk."""
        chunk, inner = np.divmod(physical_n[places], self.layout.rows_of_chunk)
        number, first = int(chunk[0]), int(places[0])
        if self.layout.rows_of_chunk == 1 and self.layout.dtype(name) == "float16":
            self.stored.read(name, number, out[first : first + 1])
            for place in places[1:]:
                out[place] = out[first]
        else:
            values = self.stored.read(name, number)[inner]
            if self.layout.dtype(name) == "int8":
                values = decode_int8(values, self.stored.read(SCALE, number)[inner])
            out[places] = values
        # From format 3 on the index says what was written, and the writer refuses what is not finite.
        if self.layout.compressed and not all(is_finite(out[place]) for place in places):
            raise self.stored.damaged(name, number, "rows that were written are missing")


@cache
def _readers(process: int, threads: int) -> ThreadPoolExecutor:
    """The threads of a process; a fork has none of its parent's."""
    return ThreadPoolExecutor(threads, "bifrost-read")


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
