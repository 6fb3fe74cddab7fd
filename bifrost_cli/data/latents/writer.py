"""Writing a latents store, one whole shard at a time, so that a killed extraction continues and ends in the same bytes.

In: a draft (whose lock makes this the only writer), a layout, and for each shard its rows and index lines. Out: fsynced
shard files, then the index that makes them count. Does not know images or encoders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bifrost_cli.artifacts import Draft
from bifrost_cli.artifacts.files import make_folder, sha256_file, write_bytes
from bifrost_cli.data.latents import zarr_layout
from bifrost_cli.data.latents.channel_statistics import statistics_of, sums_of
from bifrost_cli.data.latents.index import INDEX, OK, read_index, write_index
from bifrost_cli.data.latents.int8 import decode_int8, encode_int8
from bifrost_cli.data.latents.zarr_layout import FORMATS, LATENTS, SCALE, StoreLayout
from bifrost_cli.errors import DataError, StoreError


class StoreWriter:
    """Fills the store of `draft`; shards that an earlier attempt committed are kept.

    `attributes` are JSON values that readers need (encoder identity and so on). Call `write_shard` for each of
    `missing_shards`, then `finish`, then `draft.commit`.
    """

    def __init__(self, draft: Draft, layout: StoreLayout, attributes: Mapping[str, Any]) -> None:
        self._set(Path(draft.path), layout, attributes)
        make_folder(self.path / INDEX)
        self._keep_whole_shards()

    def _set(self, path: Path, layout: StoreLayout, attributes: Mapping[str, Any]) -> None:
        self.layout, self.path, self.attributes = layout, path, dict(attributes)
        self._sums: dict[int, dict[str, Any]] = {}

    @classmethod
    def beside(cls, path: Path, layout: StoreLayout) -> StoreWriter:
        """For another process, which writes the shards that the holder of the draft gives it and nothing else."""
        writer = cls.__new__(cls)
        writer._set(Path(path), layout, {})
        return writer

    def take_in(self) -> None:
        """Count the shards that other processes have written. StoreError when one of them is not there."""
        for shard in self.missing_shards():
            self._sums[shard] = read_index(self.path, shard).sums

    def missing_shards(self) -> list[int]:
        return [shard for shard in range(self.layout.shards) if shard not in self._sums]

    def write_shard(
        self,
        shard: int,
        latents_NPC: np.ndarray,
        lines: Sequence[Mapping[str, Any]],
        vae_NCHW: np.ndarray | None = None,
    ) -> None:
        """Write the rows of one shard, all of them. Rows whose line's status is not "ok" are stored as NaN.

        DataError when a value is not finite in float16, naming the row's key. DiskFull when there is no room; the shard
        then does not count and the next attempt writes it again.
        """
        rows = {"latents": latents_NPC} if vae_NCHW is None else {"latents": latents_NPC, "vae": vae_NCHW}
        span = self.layout.span(shard)
        ok_N = np.array([line["status"] == OK for line in lines], bool)
        assert ("vae" in rows) == (self.layout.vae is not None), f"a shard has {' and '.join(self.layout.row_shapes)}"
        assert len(lines) == span.stop - span.start, "a shard is written whole"
        halves = {name: _as_half(name, values, ok_N, lines) for name, values in rows.items()}
        stored, halves["latents"] = self._stored(halves)
        files = {}
        for name, values in stored.items():
            assert values.shape == (len(lines), *self.layout.row_shapes[name]), f"{name} has shape {values.shape}"
            file, data = self.layout.shard_file(name, shard), zarr_layout.shard_bytes(self.layout, name, shard, values)
            self._write(file, data)
            files[file] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        sums = sums_of(halves["latents"][ok_N])
        write_index(self.path, shard, lines, files, sums)
        self._sums[shard] = sums

    def finish(self) -> dict[str, Any]:
        """Write the attributes and return the channel statistics. StoreError while shards are missing."""
        if missing := self.missing_shards():
            raise StoreError(f"{self.path}: {len(missing)} shards are not written yet", code="BF-STORE-006")
        parts = [self._sums[shard] for shard in range(self.layout.shards)]
        statistics = statistics_of(parts, self.layout.channels)
        described = {**self._described(), **self.attributes, **statistics}
        for file, data in zarr_layout.metadata_files(self.layout, described).items():
            self._write(file, data)
        return statistics

    def _stored(self, halves: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The arrays as the layout stores them, and the latents that a reader will see."""
        if self.layout.storage == "float16":
            return dict(halves), halves[LATENTS]
        codes_NPC, scales_NS = encode_int8(halves[LATENTS])
        return {**halves, LATENTS: codes_NPC, SCALE: scales_NS}, decode_int8(codes_NPC, scales_NS)

    def _described(self) -> dict[str, Any]:
        layout = self.layout
        return {
            "format": FORMATS[layout.storage],
            **({} if layout.storage == "float16" else {"storage": layout.storage}),
            "rows": layout.rows,
            "grid": list(layout.grid),
            "channels": layout.channels,
            "vae_shape": list(layout.vae) if layout.vae else None,
            "shard_rows": layout.shard_rows,
            "chunk_rows": layout.chunk_rows,
        }

    def _keep_whole_shards(self) -> None:
        for shard in range(self.layout.shards):
            try:
                index = read_index(self.path, shard)
            except StoreError:
                continue
            if all(_is_whole(self.path / name, index.files.get(name)) for name in self.layout.shard_files(shard)):
                self._sums[shard] = index.sums

    def _write(self, file: str, data: bytes) -> None:
        make_folder((self.path / file).parent)
        write_bytes(self.path / file, data)


def _is_whole(path: Path, entry: Mapping[str, Any] | None) -> bool:
    return (
        entry is not None
        and path.is_file()
        and path.stat().st_size == entry["size"]
        and sha256_file(path) == entry["sha256"]
    )


def _as_half(name: str, values: np.ndarray, ok_N: np.ndarray, lines: Sequence[Mapping[str, Any]]) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = np.asarray(values, np.float16)
    if not ok_N.all():
        half = half.copy()
        half[~ok_N] = np.nan
    for row in map(int, np.flatnonzero(ok_N)):
        if not np.isfinite(half[row]).all():
            raise DataError(
                f"the {name} of {lines[row]['key']} are not finite in float16",
                at=f"largest value {np.abs(np.asarray(values[row], np.float64)).max()}",
                fix="check the encoder's weights and precision (--set models.dtype=float32)",
                code="BF-DATA-003",
            )
    return half
