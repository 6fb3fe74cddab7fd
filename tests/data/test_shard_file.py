"""Shards as Zarr lays them out, read and written without Zarr: the same bytes, nothing more than was asked for, and an
error that names the place for whatever is not as it was written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from fixtures_store import make_store
from make_formats import CAPTIONS, PLANS
from test_store import cosines, flip

from bifrost_cli.artifacts import Artifact, Draft
from bifrost_cli.data.latents import reader, shard_file
from bifrost_cli.data.latents.convert import convert_store
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.data.latents.writer import StoreWriter
from bifrost_cli.data.latents.zarr_layout import StoreLayout
from bifrost_cli.errors import BifrostError, StoreError, UsageError

LARGE = {"rows": 12, "grid": (8, 8), "channels": 640, "vae": (4, 8, 8), "shard_rows": 8, "chunk_rows": 4}
ROW = 8 * 8 * 640 * 2
OLD = Path(__file__).parents[1] / "formats"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_store(tmp_path_factory.mktemp("large") / "a", **LARGE, failed=(3,))


@pytest.fixture(autouse=True)
def not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_KEPT_IN_MEMORY", 0)


@pytest.mark.parametrize("storage", ["float16", "int8"])
@pytest.mark.parametrize("rows", [40, 37, 5])
def test_plain_zarr_reads_what_is_written(tmp_path: Path, rows: int, storage: str) -> None:
    path = make_store(tmp_path / "a", rows=rows, vae=(4, 2, 2), storage=storage, failed=(3,)).path
    group, store = zarr.open_group(path / "store.zarr", mode="r"), LatentsStore.open(path)
    ok = [i for i in range(rows) if i != 3]
    assert np.array_equal(group["vae"][:][ok], store.vae(range(rows - 1))) and np.isnan(group["vae"][3]).all()
    if storage == "float16":
        assert np.array_equal(group["latents"][:][ok], store.latents(range(rows - 1)))
    else:
        assert cosines(group["latents"][:][ok], store.latents(range(rows - 1))).min() > 0.9
        assert (group["latents"][3] == -128).all() and np.isnan(group["latents_scale"][3]).all()


def test_zarr_writes_what_is_read(large: Artifact, tmp_path: Path) -> None:
    """The same bytes, down to the checksum of each chunk and of the index."""
    layout = LatentsStore.open(large).layout
    group = zarr.create_group(tmp_path / "z", zarr_format=3)
    for name in ("latents", "vae"):
        values = zarr.open_group(large.path / "store.zarr", mode="r")[name][:]
        array = group.create_array(name, **layout.array_settings(name), config={"write_empty_chunks": True})
        array[0:8] = values[0:8]
        file = layout.shard_file(name, 0).removeprefix("store.zarr/")
        assert (tmp_path / "z" / file).read_bytes() == (large.path / "store.zarr" / file).read_bytes()


def test_a_large_row_is_a_chunk_of_its_own_and_nothing_else_is_read(
    large: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, read, real = LatentsStore.open(large), [], shard_file.read_into
    assert store.layout.rows_of_chunk == store.attributes["chunk_rows"] == 1
    assert StoreLayout(10, (4, 4), 64, None, 8, 4).rows_of_chunk == 4, "small rows share one"

    def counted(path: Path, offset: int, out: np.ndarray) -> int:
        read.append(len(out))
        return real(path, offset, out)

    monkeypatch.setattr(shard_file, "read_into", counted)
    rows = [9, 0, 9, 2]
    found = store.latents(rows)
    assert read.count(ROW) == 3 and set(read) == {8 * 16, ROW}, (
        "each row once, and indices (two threads may meet at one)"
    )
    assert np.array_equal(found, LatentsStore.open(large).latents(range(11))[rows])


def test_many_threads_read_at_once(large: Artifact) -> None:
    store = LatentsStore.open(large)
    wanted, chance = store.latents(range(11)), np.random.default_rng(0)
    asked = [chance.integers(0, 11, 7) for _ in range(60)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(store.latents, asked))
    assert all(np.array_equal(rows, wanted[i]) for rows, i in zip(found, asked, strict=True))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:ROW])


def another_row(path: Path) -> None:
    """Chunk 1 in the place of chunk 0: its own checksum fits."""
    data = bytearray(path.read_bytes())
    data[: ROW + 4] = data[ROW + 4 : 2 * (ROW + 4)]
    path.write_bytes(data)


HARM: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (lambda path: flip(path, ROW // 2, 3), "row 0: its crc32c is"),
    "a flipped checksum": (lambda path: flip(path, ROW + 1, 3), "row 0: its crc32c is"),
    "another row": (another_row, "row 0: its crc32c is"),
    "a flipped index": (lambda path: flip(path, path.stat().st_size - 100, 0), "row 0: its index is damaged"),
    "cut short": (cut, "row 0: its index is damaged"),
    "cut to nothing": (lambda path: path.write_bytes(b""), "row 0: it is cut short"),
    "removed": (Path.unlink, "No such file"),
}


@pytest.mark.parametrize("name", HARM)
def test_what_changes_while_a_training_reads_is_named_with_shard_row_and_fix(
    large: Artifact, tmp_path: Path, name: str
) -> None:
    harm, why = HARM[name]
    store = LatentsStore.open(shutil.copytree(large.path, tmp_path / "a"))
    harm(tmp_path / "a" / store.layout.shard_file("latents", 0))
    with pytest.raises(StoreError, match=r"shard 0 of latents \(rows 0 to 7\) is damaged") as caught:
        store.latents([10, 0, 9])
    assert why in str(caught.value.at) and "store.zarr/latents/c/0/0/0" in str(caught.value.at)
    assert caught.value.exit_code == 5 and "extract again" in str(caught.value.fix)
    assert store.latents([10]).shape == (1, 64, 640), "the other shard is whole"


# ---- older formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["latents-1", "latents-1-store-2"])
def test_a_flipped_bit_of_an_older_store_is_found_without_its_sha256(tmp_path: Path, name: str) -> None:
    path = Path(shutil.copytree(OLD / name, tmp_path / "a"))
    wanted = LatentsStore.open(path).latents(range(5))
    for file in [file for file in path.glob("store.zarr/latents*/c/**/0") if file.is_file()]:
        whole = file.read_bytes()
        for byte in range(0, len(whole), 31):
            flip(file, byte, byte % 8)
            with pytest.raises(BifrostError) as caught:
                LatentsStore.open(path).latents(range(5))
            assert caught.value.code == "BF-STORE-005"
            file.write_bytes(whole)
    assert np.array_equal(LatentsStore.open(path).latents(range(5)), wanted)


@pytest.mark.parametrize("name", ["latents-1", "latents-1-store-2"])
def test_an_older_store_is_converted_to_the_same_rows_and_id(tmp_path: Path, name: str) -> None:
    old = Artifact.open(OLD / name)
    made, before = convert_store(old, tmp_path / "new"), LatentsStore.open(old)
    after = LatentsStore.open(made)
    assert made.id == old.id and made.info == old.info and made.verify() == [] and after.attributes["format"] == 3
    assert np.array_equal(after.latents(range(5)), before.latents(range(5)))
    assert np.array_equal(after.vae(range(5)), before.vae(range(5)))
    changed = {"format"}
    assert {k: v for k, v in after.attributes.items() if k not in changed} == {
        k: v for k, v in before.attributes.items() if k not in changed
    }
    assert after.lines == before.lines and convert_store(old, tmp_path / "new").files == made.files
    with pytest.raises(UsageError, match="the newest"):
        convert_store(made, tmp_path / "newer")


def test_a_damaged_older_store_is_not_converted(tmp_path: Path) -> None:
    path = Path(shutil.copytree(OLD / "latents-1", tmp_path / "a"))
    flip(path / "store.zarr/latents/c/1/0/0", 20, 1)
    with pytest.raises(StoreError, match="shard 1 of latents"):
        convert_store(Artifact.open(path), tmp_path / "new")
    assert not (tmp_path / "new" / "manifest.json").exists()


@pytest.mark.parametrize(("name", "storage"), [("latents-1", "float16"), ("latents-1-store-2", "int8")])
def test_an_extraction_that_an_older_bifrost_began_goes_on(tmp_path: Path, name: str, storage: str) -> None:
    path = Path(shutil.copytree(OLD / name, tmp_path / "a"))
    manifest = json.loads((path / "manifest.json").read_text())
    header = {key: manifest[key] for key in ("format", "kind", "id", "identity", "parents")}
    (path / "manifest.json").unlink()
    shutil.rmtree(path / "index", ignore_errors=False)
    shutil.copytree(OLD / name / "index", path / "index")
    (path / "index" / "shard-00001.jsonl").unlink()
    (path / "draft.json").write_text(json.dumps(header))
    layout = StoreLayout(6, (2, 2), 8, (4, 4, 4), 4, 2, storage)
    with Draft.open(path, "latents", manifest["identity"]) as draft:
        assert StoreWriter(draft, layout, {}).missing_shards() == [1], "the first one is kept"
    wanted = LatentsStore.open(OLD / name)
    options = {"captions": CAPTIONS, "plans": PLANS, "failed": (3,), "storage": storage}
    made = make_store(path, rows=6, shard_rows=4, chunk_rows=2, vae=(4, 4, 4), **options)
    store = LatentsStore.open(made, verify=True)
    assert made.id == manifest["id"] and store.attributes["format"] == 3
    assert np.array_equal(store.latents(range(5)), wanted.latents(range(5)))
