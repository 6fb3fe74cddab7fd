"""Writing a latents store, one whole shard at a time, so that a killed extraction continues and ends in the same bytes.
Rows go to the disk as they come: what is held in memory is a block of them, and never a shard. Shard files are on the
disk before the index that makes them count. n rows, P patches, C channels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bifrost_cli.artifacts import Draft
from bifrost_cli.artifacts.files import make_folder, new_file, sha256_file, write_bytes
from bifrost_cli.data.latents import zarr_layout
from bifrost_cli.data.latents.channel_sums import ChannelSums, statistics_of
from bifrost_cli.data.latents.int8 import decode_int8, encode_int8
from bifrost_cli.data.latents.reader import StoredShards
from bifrost_cli.data.latents.shard_file import ShardEncoder, is_finite
from bifrost_cli.data.latents.zarr_layout import LATENTS, OK, SCALE, ShardIndex, StoreLayout, read_index, write_index
from bifrost_cli.errors import DataError, StoreError

_BLOCK_ROWS = 16  # written at once: 29 MB of the paper's latents

Stored = dict[str, np.ndarray]  # rows of each array, as they are stored


class RowBatch(NamedTuple):
    """Rows that follow each other: latents (n, P, C), VAE latents (n, c, h, w) or None, and the index line of each."""

    latents_NPC: np.ndarray
    vae_NCHW: np.ndarray | None
    lines: Sequence[Mapping[str, Any]]


class StoreWriter:
    """Fills the store of a draft. Shards that an earlier attempt committed are kept, and written again where a bifrost
    of an older format made them. For another process than the one that holds the draft, `place` is its path: it writes
    the shards that it is given, and nothing else. `attributes` are JSON values that readers need (encoder identity and
    so on). Call `write_shard` for each of `missing_shards`, then `finish`, then `draft.commit` with `files`.

    Attributes:
        layout: sizes of the store.
        files: {"sha256", "size"} of the files of the shards that are written.
    """

    def __init__(self, place: Draft | Path, layout: StoreLayout, attributes: Mapping[str, Any]) -> None:
        self.layout, self.attributes = layout, dict(attributes)
        self.path = place.path if isinstance(place, Draft) else place
        self.files: dict[str, dict[str, Any]] = {}
        self._sums: dict[int, dict[str, Any]] = {}
        if isinstance(place, Draft):
            make_folder(self.path / zarr_layout.INDEX)
            for shard in range(layout.shards):
                with suppress(StoreError):
                    self._continue(shard, read_index(self.path, shard))

    def missing_shards(self) -> list[int]:
        return [shard for shard in range(self.layout.shards) if shard not in self._sums]

    def write_shard(self, shard: int, batches: Iterable[RowBatch]) -> None:
        """Write the rows of one shard, all of them. Rows whose line's status is not "ok" are stored as NaN.

        Raises:
            DataError: a value is not finite in float16; names the row's key.
            DiskFull: there is no room; the shard then does not count, and the next attempt writes it again.
        """
        lines: list[Mapping[str, Any]] = []
        sums = ChannelSums(self.layout.channels)
        self.write_stored(shard, self._stored(batches, lines, sums), lines, sums)

    def write_stored(self, shard: int, batches: Iterable[Stored], lines: Sequence[Mapping[str, Any]],
                     sums: ChannelSums | Mapping[str, Any]) -> None:  # fmt: skip
        """Write rows as they are to be stored. `lines` and `sums` are looked at when all rows are written."""
        layout, span = self.layout, self.layout.span(shard)
        files: dict[str, dict[str, Any]] = {}
        with ExitStack() as opened:
            encoders = {name: self._encoder(opened, name, shard) for name in layout.row_shapes}
            written = 0
            for block in _blocks(batches, -(-_BLOCK_ROWS // layout.rows_of_chunk) * layout.rows_of_chunk):
                assert block.keys() == encoders.keys(), f"a shard has {' and '.join(encoders)}"
                for name, rows in block.items():
                    encoders[name].add(rows)
                written += len(block[LATENTS])
            assert written == len(lines) == span.stop - span.start, "a shard is written whole"
            for name, encoder in encoders.items():
                encoder.finish(layout.chunks_of_shard)
                files[layout.shard_file(name, shard)] = encoder.entry
        values = sums.json() if isinstance(sums, ChannelSums) else dict(sums)
        write_index(self.path, shard, lines, files, values)
        self._count(shard, files, values)

    def finish(self) -> dict[str, Any]:
        """Write the attributes and return the channel statistics. StoreError while shards are missing, of this process
        and of others."""
        for shard in self.missing_shards():
            with suppress(StoreError):
                index = read_index(self.path, shard)
                self._count(shard, index.files, index.sums)
        if missing := self.missing_shards():
            raise StoreError(f"{self.path}: {len(missing)} shards are not written yet", code="BF-STORE-006")
        statistics = statistics_of((self._sums[shard] for shard in range(self.layout.shards)), self.layout.channels)
        attributes = {**self.layout.attributes, **self.attributes, **statistics}
        for file, data in zarr_layout.metadata_files(self.layout, attributes).items():
            make_folder((self.path / file).parent)
            write_bytes(self.path / file, data)
        return statistics

    def _continue(self, shard: int, index: ShardIndex) -> None:
        """Keep what an earlier attempt wrote, where it is whole."""
        if not all(_is_whole(self.path / name, index.files.get(name)) for name in self.layout.shard_files(shard)):
            return
        if index.format is None:  # before format 3
            old = StoredShards(self.path, self.layout.older)
            self.write_stored(shard, old.of_shard(shard), index.lines, index.sums)
        else:
            self._count(shard, index.files, index.sums)

    def _encoder(self, opened: ExitStack, name: str, shard: int) -> ShardEncoder:
        """Of one array's file, which is whole when `opened` is closed, or absent."""
        layout, path = self.layout, self.path / self.layout.shard_file(name, shard)
        make_folder(path.parent)
        write = opened.enter_context(new_file(path, layout.bytes_of_shard(name, shard), write_out=True))
        chunk_shape = (layout.rows_of_chunk, *layout.row_shapes[name])
        return ShardEncoder(write, chunk_shape, layout.dtype(name), layout.fill(name))

    def _stored(self, batches: Iterable[RowBatch], lines: list[Mapping[str, Any]], sums: ChannelSums
                ) -> Iterator[Stored]:  # fmt: skip
        """The batches as they are to be stored; their lines are added to `lines`, what a reader will see to `sums`."""
        for batch in batches:
            ok_n = np.array([line["status"] == OK for line in batch.lines], bool)
            lines += batch.lines
            half_NPC = _as_half(LATENTS, batch.latents_NPC, ok_n, batch.lines)
            stored = {LATENTS: half_NPC}
            if self.layout.storage == "int8":
                stored[LATENTS], stored[SCALE] = encode_int8(half_NPC)
                half_NPC = decode_int8(stored[LATENTS], stored[SCALE])
            if batch.vae_NCHW is not None:
                stored["vae"] = _as_half("vae", batch.vae_NCHW, ok_n, batch.lines)
            sums.add(half_NPC if ok_n.all() else half_NPC[ok_n])
            yield stored

    def _count(self, shard: int, files: Mapping[str, Mapping[str, Any]], sums: dict[str, Any]) -> None:
        self._sums[shard] = sums
        self.files |= {name: {"sha256": entry["sha256"], "size": entry["size"]} for name, entry in files.items()}


def _blocks(batches: Iterable[Stored], rows: int) -> Iterator[Stored]:
    """The rows of all batches in blocks of `rows`, the last one smaller; views where a block is part of one batch."""
    rest: Stored = {}
    for batch in batches:
        if rest:
            batch = {name: np.concatenate([rest[name], values]) for name, values in batch.items()}
        whole = len(batch[LATENTS]) // rows * rows
        for start in range(0, whole, rows):
            yield {name: values[start : start + rows] for name, values in batch.items()}
        rest = {name: values[whole:] for name, values in batch.items()} if whole < len(batch[LATENTS]) else {}
    if rest:
        yield rest


def _is_whole(path: Path, entry: Mapping[str, Any] | None) -> bool:
    if entry is None or not path.is_file() or path.stat().st_size != entry["size"]:
        return False
    return sha256_file(path) == entry["sha256"]


def _as_half(name: str, values: np.ndarray, ok_n: np.ndarray, lines: Sequence[Mapping[str, Any]]) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = np.asarray(values, np.float16)
    if not ok_n.all():
        half = half.copy()
        half[~ok_n] = np.nan
    for row in map(int, np.flatnonzero(ok_n)):
        if not is_finite(half[row]):
            raise DataError(f"the {name} of {lines[row]['key']} are not finite in float16",
                            at=f"largest value {np.abs(np.asarray(values[row], np.float64)).max()}",
                            fix="check the encoder's weights and precision (--set models.dtype=float32)",
                            code="BF-DATA-003")  # fmt: skip
    return half
