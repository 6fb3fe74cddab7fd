"""Writing behind the encoder: it does not wait, its memory is bounded, and every error of the writing arrives."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from faults import FailsAt, Watched, disk
from fixtures_store import ENCODER, line, make_store, row

from bifrost_cli.artifacts import Draft
from bifrost_cli.artifacts.files import TEMP_PREFIX
from bifrost_cli.data.latents.background import AHEAD, BackgroundWriter
from bifrost_cli.data.latents.writer import RowBatch, StoreWriter
from bifrost_cli.data.latents.zarr_layout import StoreLayout
from bifrost_cli.errors import DiskFull, EnvironmentProblem

LAYOUT = StoreLayout(40, (2, 2), 8, None, shard_rows=16, chunk_rows=4)


def batches(shard: int, size: int = 4) -> Iterator[RowBatch]:
    span = LAYOUT.span(shard)
    for start in range(span.start, span.stop, size):
        rows = range(start, min(start + size, span.stop))
        latents = np.stack([row("latents", i, LAYOUT) for i in rows])
        yield RowBatch(latents, None, [line(i) for i in rows])


def open_draft(path: Path) -> Draft:
    return Draft.open(path, "latents", {"encoder": ENCODER, "rows": 40, "seed": 0, "vae": []})


def fill(draft: Draft, size: int = 4) -> StoreWriter:
    writer = StoreWriter(draft, LAYOUT, {"encoder": ENCODER, "preprocessing": {}, "painter": None})
    with BackgroundWriter(writer) as background:
        for shard in writer.missing_shards():
            background.write_shard(shard, batches(shard, size))
    return writer


@pytest.mark.parametrize("size", [3, 4, 16])
def test_the_bytes_are_those_of_one_thread_and_of_any_batches(tmp_path: Path, size: int) -> None:
    with open_draft(tmp_path / "a") as draft:
        writer = fill(draft, size)
        made = draft.commit({"statistics": writer.finish()}, hashed=writer.files)
    assert made.files == make_store(tmp_path / "b").files and made.verify() == []


def slow(seconds: float, held: list[int] | None = None) -> Any:
    """A writer that takes that long for each batch."""

    def write(shard: int, rows: Iterator[RowBatch]) -> None:
        for _ in rows:
            time.sleep(seconds)

    return SimpleNamespace(write_shard=write)


def test_the_caller_does_not_wait_for_the_disk() -> None:
    started = time.monotonic()
    with BackgroundWriter(slow(0.1)) as background:
        background.write_shard(0, batches(0, 8))
        handed_over = time.monotonic() - started
    assert handed_over < 0.15 < time.monotonic() - started, "two batches of 0.1 s"


def test_no_more_than_a_few_batches_wait() -> None:
    made = taken = most = 0

    def counted() -> Iterator[RowBatch]:
        nonlocal made, most
        for batch in batches(0, 1):
            made += 1
            most = max(most, made - taken)
            yield batch

    def write(shard: int, rows: Iterator[RowBatch]) -> None:
        nonlocal taken
        for _ in rows:
            time.sleep(0.01)
            taken += 1

    with BackgroundWriter(SimpleNamespace(write_shard=write)) as background:
        background.write_shard(0, counted())
    assert made == taken == 16 and most <= AHEAD + 2, "those that wait, the one being written, and the new one"


DISKS = {"full": ("write", errno.ENOSPC), "broken": ("fsync", errno.EIO)}


@pytest.mark.parametrize("harm", DISKS)
def test_a_disk_that_fails_reaches_the_caller_and_loses_nothing(tmp_path: Path, harm: str) -> None:
    (kind, code), error = DISKS[harm], DiskFull if harm == "full" else EnvironmentProblem
    with open_draft(tmp_path / "a") as draft, pytest.raises(error) as caught:
        with disk(Watched(FailsAt(kind, 9, code, for_good=True))):
            fill(draft)
    assert caught.value.fix is not None and "give the same command again" in caught.value.fix
    assert not list((tmp_path / "a").rglob(f"{TEMP_PREFIX}*"))
    with open_draft(tmp_path / "a") as draft:
        writer = fill(draft)
        assert draft.commit({"statistics": writer.finish()}).files == make_store(tmp_path / "b").files


def test_nothing_is_written_after_an_error() -> None:
    written: list[int] = []

    def write(shard: int, rows: Iterator[RowBatch]) -> None:
        time.sleep(0.05)  # the caller hands over the next shards meanwhile
        if shard == 0:
            raise OSError(errno.EIO, "once")
        written.append(shard)

    with pytest.raises(OSError, match="once"), BackgroundWriter(SimpleNamespace(write_shard=write)) as background:
        for shard in range(3):
            background.write_shard(shard, list(batches(shard, 16))[:1])
    assert written == []


@pytest.mark.parametrize("when", ["first", "last"])
def test_a_thread_that_dies_ends_the_caller(when: str) -> None:
    class Dies(BaseException):
        pass

    def write(shard: int, rows: Iterator[RowBatch]) -> None:
        for _ in rows if when == "last" else ():
            pass
        raise Dies

    with pytest.raises(Dies), BackgroundWriter(SimpleNamespace(write_shard=write)) as background:
        for shard in range(1 if when == "last" else 3):
            background.write_shard(shard, batches(shard, 1))


def test_an_error_of_the_caller_abandons_its_shard_and_completes_those_before(tmp_path: Path) -> None:
    def fails() -> Iterator[RowBatch]:
        yield from list(batches(1))[:2]
        raise KeyboardInterrupt

    with open_draft(tmp_path / "a") as draft:
        writer = StoreWriter(draft, LAYOUT, {"encoder": ENCODER})
        with pytest.raises(KeyboardInterrupt), BackgroundWriter(writer) as background:
            background.write_shard(0, batches(0))
            background.write_shard(1, fails())
        assert StoreWriter(draft, LAYOUT, {"encoder": ENCODER}).missing_shards() == [1, 2]
    assert not list((tmp_path / "a").rglob(f"{TEMP_PREFIX}*")) and threading.active_count() < 20
