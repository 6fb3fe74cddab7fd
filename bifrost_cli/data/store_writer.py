"""Writing a latents store, one whole shard at a time, so that a killed extraction continues and ends in the same bytes.

In: a draft (whose lock makes this the only writer), a layout, and for each shard its rows and index lines. Out: fsynced
shard files, then the index that makes them count. Does not know images or encoders.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bifrost_cli.artifacts import Draft
from bifrost_cli.artifacts.files import disk_errors, make_folder, sha256_file, sync_file, sync_folder
from bifrost_cli.data import store_layout
from bifrost_cli.data.channel_statistics import statistics_of, sums_of
from bifrost_cli.data.store_index import INDEX, OK, index_file, read_index, write_index
from bifrost_cli.data.store_layout import ZARR, Layout
from bifrost_cli.errors import DataError, StoreError


class StoreWriter:
    """Fills the store of `draft`; shards that an earlier attempt committed are kept.

    `attributes` are JSON values that readers need (encoder identity and so on). Call `write_shard` for each of
    `missing_shards`, then `finish`, then `draft.commit`.
    """

    def __init__(self, draft: Draft, layout: Layout, attributes: Mapping[str, Any]) -> None:
        self.layout, self.path, self.attributes = layout, Path(draft.path), dict(attributes)
        self._sums: dict[int, dict[str, Any]] = {}
        with disk_errors(self.path):
            self._sweep()
            self._keep_whole_shards()
            self._arrays = self._continue() if self._sums else self._begin()

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
        assert rows.keys() == self._arrays.keys() and len(lines) == span.stop - span.start, "a shard is written whole"
        halves = {name: _as_half(name, values, ok_N, lines) for name, values in rows.items()}
        with disk_errors(self.path, sum(half.nbytes for half in halves.values())):
            files = {}
            for name, half in halves.items():
                assert half.shape == (len(lines), *self.layout.row_shapes[name]), f"{name} has shape {half.shape}"
                files[self.layout.shard_file(name, shard)] = self._write_array(name, shard, half)
        sums = sums_of(halves["latents"][ok_N])
        write_index(self.path, shard, lines, files, sums)
        self._sums[shard] = sums

    def finish(self) -> dict[str, Any]:
        """Write the attributes and return the channel statistics. StoreError while shards are missing."""
        if missing := self.missing_shards():
            raise StoreError(f"{self.path}: {len(missing)} shards are not written yet", code="BF-STORE-006")
        parts = [self._sums[shard] for shard in range(self.layout.shards)]
        statistics = statistics_of(parts, self.layout.channels)
        with disk_errors(self.path):
            group = store_layout.open_group(self.path, "r+")
            group.attrs.put({**self._described(), **self.attributes, **statistics})
        return statistics

    def _described(self) -> dict[str, Any]:
        layout = self.layout
        return {
            "format": store_layout.FORMAT,
            "rows": layout.rows,
            "grid": list(layout.grid),
            "channels": layout.channels,
            "vae_shape": list(layout.vae) if layout.vae else None,
            "shard_rows": layout.shard_rows,
            "chunk_rows": layout.chunk_rows,
        }

    def _sweep(self) -> None:
        """Zarr's own leftovers of a killed write; ours are swept when the draft is opened."""
        for leftover in self.path.glob(f"{ZARR}/**/*.partial"):
            leftover.unlink(missing_ok=True)

    def _keep_whole_shards(self) -> None:
        for shard in range(self.layout.shards):
            try:
                index = read_index(self.path, shard)
            except StoreError:
                continue
            if all(_is_whole(self.path / name, index.files.get(name)) for name in self.layout.shard_files(shard)):
                self._sums[shard] = index.sums
        for shard in self.missing_shards():
            for name in (index_file(shard), *self.layout.shard_files(shard)):
                (self.path / name).unlink(missing_ok=True)

    def _begin(self) -> dict[str, Any]:
        for name in (ZARR, INDEX):
            shutil.rmtree(self.path / name, ignore_errors=True)
        arrays = store_layout.create(self.path, self.layout)
        make_folder(self.path / INDEX)
        for metadata in (self.path / ZARR).rglob("zarr.json"):
            sync_file(metadata)
            sync_folder(metadata.parent)
        sync_folder(self.path)
        return arrays

    def _continue(self) -> dict[str, Any]:
        return store_layout.open_arrays(store_layout.open_group(self.path, "r+"), self.layout, self.path)

    def _write_array(self, name: str, shard: int, half: np.ndarray) -> dict[str, Any]:
        path = self.path / self.layout.shard_file(name, shard)
        path.unlink(missing_ok=True)  # else Zarr would merge the last, shorter shard into what is there
        self._arrays[name][self.layout.span(shard)] = half
        sync_file(path)
        for folder in [*path.parents][: len(half.shape) + 1]:
            sync_folder(folder)
        return {"sha256": sha256_file(path), "size": path.stat().st_size}


def _is_whole(path: Path, entry: Mapping[str, Any] | None) -> bool:
    return (
        bool(entry) and path.is_file() and path.stat().st_size == entry["size"] and sha256_file(path) == entry["sha256"]
    )


def _as_half(name: str, values: np.ndarray, ok_N: np.ndarray, lines: Sequence[Mapping[str, Any]]) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = np.asarray(values, np.float16)
    if not ok_N.all():
        half = half.copy()
        half[~ok_N] = np.nan
    for row in np.flatnonzero(ok_N):
        if not np.isfinite(half[row]).all():
            raise DataError(
                f"the {name} of {lines[row]['key']} are not finite in float16",
                at=f"largest value {np.abs(np.asarray(values[row], np.float64)).max()}",
                fix="check the encoder's weights and precision (--set models.dtype=float32)",
                code="BF-DATA-003",
            )
    return half
