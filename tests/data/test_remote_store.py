"""A latents store behind an address: what is asked for is fetched and checked, nothing else; a hanging one is named."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures_store import make_store
from fsspec.asyn import AsyncFileSystem
from test_shard_file import LARGE, OLD, ROW
from test_store import flip

from bifrost_cli.artifacts import Artifact
from bifrost_cli.data.latents import reader
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.data.sources import remote
from bifrost_cli.errors import BifrostError, EnvironmentProblem, StoreError


class Bucket(AsyncFileSystem):
    """A store of objects that answers after a while, from a folder of this machine."""

    cachable = False

    def __init__(self, folder: Path, delay: float = 0) -> None:
        super().__init__()
        self.folder, self.delay = folder, delay
        self.fetched: list[tuple[str, int]] = []
        self.at_once = self.most = 0

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(self.delay)
        self.at_once -= 1
        name = path.removeprefix("s3://bucket/")
        data = (self.folder / name).read_bytes()[start:end]
        self.fetched.append((name, len(data)))
        return data

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"size": (self.folder / path.removeprefix("s3://bucket/")).stat().st_size}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_store(tmp_path_factory.mktemp("made") / "store", **LARGE)


@pytest.fixture
def bucket(made: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    shutil.copytree(made.path, tmp_path / "bucket" / "store")
    files = Bucket(tmp_path / "bucket")
    monkeypatch.setattr(remote, "_files", lambda place: files)
    monkeypatch.setattr(reader, "_KEPT_IN_MEMORY", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield files


def test_only_the_rows_that_are_asked_for_are_fetched(bucket: Bucket, made: Artifact) -> None:
    store = LatentsStore.open("s3://bucket/store/")
    assert not [name for name, _ in bucket.fetched if "/c/" in name] and store.keys == LatentsStore.open(made).keys
    bucket.fetched.clear()
    assert np.array_equal(store.latents([9, 2]), LatentsStore.open(made).latents([9, 2]))
    assert sorted(size for _, size in bucket.fetched) == [8 * 16 + 4] * 2 + [ROW + 4] * 2
    bucket.fetched.clear()
    again = LatentsStore.open("s3://bucket/store")
    assert [name for name, _ in bucket.fetched] == ["store/manifest.json"], "the rest lies in the cache"
    assert again.artifact.id == made.id and np.array_equal(again.vae([0]), LatentsStore.open(made).vae([0]))


def test_rows_are_fetched_side_by_side(bucket: Bucket) -> None:
    store = LatentsStore.open("s3://bucket/store")
    store.latents([0, 8])  # the indexes of both shards
    bucket.delay, bucket.most = 0.05, 0
    store.latents(range(12))
    assert bucket.most >= min(12, reader.cores())


def test_an_older_store_is_read_too(bucket: Bucket) -> None:
    shutil.copytree(OLD / "latents-1", bucket.folder / "old")
    assert np.array_equal(
        LatentsStore.open("s3://bucket/old").latents([4, 0]), LatentsStore.open(OLD / "latents-1").latents([4, 0])
    )


@pytest.mark.parametrize("harm", ["flipped", "cut", "gone"])
def test_a_damaged_shard_is_named_with_its_row(bucket: Bucket, harm: str) -> None:
    store, shard = LatentsStore.open("s3://bucket/store"), bucket.folder / "store/store.zarr/latents/c/0/0/0"
    if harm == "gone":
        shard.unlink()
    else:
        flip(shard, ROW // 2, 1) if harm == "flipped" else shard.write_bytes(shard.read_bytes()[:ROW])
    with pytest.raises(StoreError, match="s3://bucket/store: shard 0 of latents") as caught:
        store.latents([0])
    assert "row 0" in str(caught.value.at)


def test_a_store_that_hangs_is_named_after_its_time_limit(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LatentsStore.open("s3://bucket/store")
    monkeypatch.setattr(remote, "TIME_LIMIT", 1)
    bucket.delay, started = 60, time.monotonic()
    with pytest.raises(EnvironmentProblem, match="s3://bucket/store/.* no answer in 1 seconds") as caught:
        store.latents([0, 1])
    assert caught.value.exit_code == 3 and time.monotonic() - started < 10
    assert threading.active_count() < 60


@pytest.mark.parametrize("harm", ["no store", "an index", "a manifest"])
def test_what_is_no_whole_store_is_refused(bucket: Bucket, harm: str) -> None:
    if harm == "no store":
        shutil.rmtree(bucket.folder / "store")
    else:
        flip(
            bucket.folder / "store" / {"an index": "index/shard-00000.jsonl", "a manifest": "manifest.json"}[harm],
            60,
            1,
        )
    with pytest.raises(BifrostError) as caught:
        LatentsStore.open("s3://bucket/store")
    assert caught.value.exit_code == 5
