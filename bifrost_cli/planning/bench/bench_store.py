"""`bifrost bench store`: a latents store of rows of the paper's size against numpy's memory map of the same rows.

What is read lies in the system's page cache, as far as there is memory for it; of the row that says "from the disk" the
cache is emptied before each run. A memory map is opened for each run: of data larger than the memory, its pages are not
mapped yet. A run reads no row twice."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bifrost_cli.artifacts import Artifact, Draft
from bifrost_cli.data.latents.background import BackgroundWriter
from bifrost_cli.data.latents.reader import LatentsStore, cores
from bifrost_cli.data.latents.writer import RowBatch, StoreWriter
from bifrost_cli.data.latents.zarr_layout import OK, StoreLayout
from bifrost_cli.planning.bench.paired import BenchRow, BenchSetup, compare

GRID, CHANNELS = (16, 16), 3584  # of the paper
READS = 8  # of a run
REPEATS = 5


def bench_store(setup: BenchSetup) -> Iterator[BenchRow]:
    """Writing, and reading by processor time, by wall time and from the disk; and the same with latents in 8 bits."""
    rows, batch = setup.sizes.get("rows", 256), setup.sizes.get("batch", 16)
    values = _values()
    with tempfile.TemporaryDirectory(prefix="bifrost-bench-") as place:
        array = Path(place) / "rows.npy"
        for storage in ("float16", "int8"):
            path = Path(place) / storage
            yield compare(f"writing {rows} rows of {GRID[0] * GRID[1]} x {CHANNELS}, {storage}",
                          lambda: _write(path, storage, rows, values), lambda: _write_array(array, rows, values),  # noqa: B023
                          baseline="numpy's memory map", setup=setup, clock="cpu", repeats=1, warm_up=False,
                          work=(rows * values[0].nbytes / 1e6, "MB"))  # fmt: skip
            yield from _reading(setup, LatentsStore.open(path, keep=0), array, batch, storage)


def _reading(setup: BenchSetup, store: LatentsStore, array: Path, batch: int, storage: str) -> Iterator[BenchRow]:
    reads = min(READS, store.rows // batch)
    draws = {side: itertools.count() for side in ("ours", "theirs")}

    def drawn(side: str) -> Iterator[np.ndarray]:
        """The rows of each read of a side's next run; both sides get the same ones in their turns."""
        order = np.random.default_rng(next(draws[side])).permutation(store.rows)
        return iter(np.split(order[: reads * batch], reads))

    def ours() -> np.ndarray:
        return [store.latents(rows) for rows in drawn("ours")][-1]

    def theirs() -> np.ndarray:
        mapped = np.load(array, mmap_mode="r")
        return [mapped[rows] for rows in drawn("theirs")][-1]

    options: dict[str, Any] = {"baseline": "numpy's memory map", "setup": setup, "difference": _largest_difference,
                               "work": (reads * batch, "rows")}  # fmt: skip
    what = f"reading {batch} random rows, {storage}, {cores()} threads"
    store.latents(range(store.rows))  # into the page cache; the map's rows are there
    warm = compare(what, ours, theirs, clock="cpu", repeats=REPEATS, **options)
    yield from (warm, replace(warm, clock="wall"))
    if hasattr(os, "posix_fadvise"):
        files = [*(store.artifact.path / name for name in store.artifact.files), array]
        yield compare(f"{what}, from the disk", ours, theirs, clock="wall", before=lambda: _forget(files), **options)


def _values() -> np.ndarray:
    """A batch of rows of noise (32, P, C): nothing to compress, as in latents."""
    noise = np.random.default_rng(0).standard_normal((32, GRID[0] * GRID[1], CHANNELS), np.float32)
    return noise.astype(np.float16)


def _write(path: Path, storage: str, rows: int, values: np.ndarray) -> Artifact:
    layout = StoreLayout(rows, GRID, CHANNELS, storage=storage)
    line = {"caption": "noise", "plan": None, "image": "0" * 64, "size": [448, 448], "status": OK, "notes": []}
    with Draft.open(path, "latents", {"encoder": {}, "rows": rows}) as draft:
        writer = StoreWriter(draft, layout, {"encoder": {}})
        with BackgroundWriter(writer) as background:
            for shard in range(layout.shards):
                span = layout.span(shard)
                starts = range(span.start, span.stop, len(values))
                parts = (range(start, min(start + len(values), span.stop)) for start in starts)
                background.write_shard(shard, (
                    RowBatch(values[: len(part)], None, [{**line, "key": f"{i:08d}"} for i in part]) for part in parts
                ))  # fmt: skip
        writer.finish()
        return draft.commit(hashed=writer.files)


def _write_array(path: Path, rows: int, values: np.ndarray) -> None:
    array = np.lib.format.open_memmap(path, "w+", np.float16, (rows, *values.shape[1:]))
    for start in range(0, rows, len(values)):
        array[start : start + len(values)] = values[: rows - start]
    array.flush()


def _largest_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours.astype(np.float32) - theirs.astype(np.float32)).max())


def _forget(files: list[Path]) -> None:
    """Empty the page cache of files that are on the disk."""
    for file in files:
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
