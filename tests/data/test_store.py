"""The latents store: what was written comes back, or an error; never another number."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from fixtures_store import ENCODER, line, make_store, row

from bifrost_cli.artifacts import Artifact, Draft
from bifrost_cli.data.latents import reader as store_module
from bifrost_cli.data.latents import writer
from bifrost_cli.data.latents.channel_sums import ChannelSums, statistics_of
from bifrost_cli.data.latents.int8 import decode_int8, encode_int8
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.data.latents.writer import RowBatch, StoreWriter
from bifrost_cli.data.latents.zarr_layout import StoreLayout, index_file, read_index
from bifrost_cli.errors import ArtifactError, BifrostError, DataError, StoreError

LAYOUT = StoreLayout(40, (2, 2), 8, (4, 2, 2), shard_rows=16, chunk_rows=4)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_store(tmp_path_factory.mktemp("store") / "a", vae=LAYOUT.vae)


@pytest.fixture(params=[2_000_000_000, 0], ids=["memory", "chunks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of reading: all at once, and chunk by chunk."""
    monkeypatch.setattr(store_module, "_KEPT_IN_MEMORY", request.param)


def truth(name: str, rows: list[int]) -> np.ndarray:
    return np.stack([row(name, i, LAYOUT) for i in rows])


def test_rows_come_back_in_the_order_asked(stored: Artifact, way: None) -> None:
    store = LatentsStore.open(stored.path)
    rows = [39, 0, 17, 17, 5, 31]
    assert np.array_equal(store.latents(rows), truth("latents", rows)) and store.latents(rows).dtype == np.float16
    assert np.array_equal(store.vae(np.array(rows)), truth("vae", rows))
    assert np.array_equal(store.latents(range(40)), truth("latents", list(range(40))))
    assert store.latents([]).shape == (0, 4, 8)


def test_what_a_reader_sees(stored: Artifact) -> None:
    store = LatentsStore.open(stored)
    assert (store.rows, store.grid, store.channels, store.vae_shape) == (40, (2, 2), 8, (4, 2, 2))
    assert store.keys == sorted(store.keys) and store.captions[7] == "caption 7" and store.plans[7] is None
    assert store.encoder["name"] == ENCODER["name"]
    tokens = truth("latents", list(range(40))).reshape(-1, 8).astype(np.float64)
    assert np.allclose(store.mean_C, tokens.mean(0), atol=1e-7) and np.allclose(store.std_C, tokens.std(0), atol=1e-6)
    assert store.norm == pytest.approx(np.linalg.norm(tokens, axis=1).mean())


def test_the_checksum_is_inside_the_shard(stored: Artifact) -> None:
    for name in ("latents", "vae"):
        array = json.loads((stored.path / "store.zarr" / name / "zarr.json").read_text())
        sharding = array["codecs"][0]
        assert sharding["name"] == "sharding_indexed" and array["fill_value"] == "NaN"
        assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "crc32c"]
        assert sharding["configuration"]["index_codecs"][-1]["name"] == "crc32c"


def test_failed_rows_are_left_out(tmp_path: Path, way: None) -> None:
    store = LatentsStore.open(make_store(tmp_path / "a", vae=LAYOUT.vae, failed=(3, 16)))
    assert store.rows == 38 and store.keys[3] == "00000004"
    assert np.array_equal(store.latents([2, 3, 15]), truth("latents", [2, 4, 17]))
    tokens = truth("latents", [i for i in range(40) if i not in (3, 16)]).reshape(-1, 8).astype(np.float64)
    assert np.allclose(store.mean_C, tokens.mean(0), atol=1e-7)


def test_a_store_without_vae_says_how_to_get_them(tmp_path: Path) -> None:
    store = LatentsStore.open(make_store(tmp_path / "a", rows=5))
    with pytest.raises(StoreError, match="latents.vae=true"):
        store.vae([0])


def test_two_writings_give_the_same_bytes(tmp_path: Path, stored: Artifact) -> None:
    assert make_store(tmp_path / "b", vae=LAYOUT.vae).files == stored.files


def interrupted(path: Path, shards: list[int]) -> None:
    """A draft with these shards written, in this order."""
    with open_draft(path) as draft:
        writer = StoreWriter(draft, LAYOUT, {"encoder": ENCODER, "preprocessing": {}, "painter": None})
        for shard in shards:
            write(writer, shard)


def open_draft(path: Path) -> Draft:
    encoder = {**ENCODER, "grid": [2, 2], "channels": 8}
    return Draft.open(path, "latents", {"encoder": encoder, "rows": 40, "seed": 0, "vae": [4, 2, 2]})


def write(writer: StoreWriter, shard: int) -> None:
    span = range(*LAYOUT.span(shard).indices(40))
    latents, vae = (np.stack([row(name, i, LAYOUT) for i in span]) for name in ("latents", "vae"))
    writer.write_shard(shard, [RowBatch(latents, vae, [line(i) for i in span])])


@pytest.mark.parametrize("shards", [[], [0], [2], [2, 0], [0, 1, 2]])
def test_writing_continues_at_the_missing_shards(tmp_path: Path, stored: Artifact, shards: list[int]) -> None:
    interrupted(tmp_path / "a", shards)
    with pytest.raises(ArtifactError, match="unfinished"):
        LatentsStore.open(tmp_path / "a")
    writes = []
    real = StoreWriter.write_shard
    with mock.patch.object(StoreWriter, "write_shard", lambda self, k, *rest: writes.append(k) or real(self, k, *rest)):
        assert make_store(tmp_path / "a", vae=LAYOUT.vae).files == stored.files
    assert writes == [k for k in range(3) if k not in shards]


@pytest.mark.parametrize("harm", ["shard", "index", "missing", "torn", "leftover"])
def test_a_damaged_draft_is_mended(tmp_path: Path, stored: Artifact, harm: str) -> None:
    interrupted(tmp_path / "a", [0, 1])
    shard = tmp_path / "a" / LAYOUT.shard_file("latents", 1)
    if harm == "shard":
        flip(shard, 100, 0)
    elif harm == "index":
        flip(tmp_path / "a" / index_file(1), 50, 0)
    elif harm == "missing":
        shard.unlink()
    elif harm == "torn":  # killed between the shard and its index, with half of a shard on the disk
        torn = tmp_path / "a" / LAYOUT.shard_file("latents", 2)
        torn.parent.mkdir(parents=True)
        torn.write_bytes(shard.read_bytes()[:200])
    else:
        (shard.parent / ".bifrost-tmp-1-0").write_bytes(b"x")
        (tmp_path / "a" / "index" / ".bifrost-tmp-x").write_bytes(b"x")
    artifact = make_store(tmp_path / "a", vae=LAYOUT.vae)
    assert artifact.files == stored.files and artifact.strays() == []


def test_hidden_files_of_others_in_a_draft_are_no_part_of_the_store(tmp_path: Path, stored: Artifact) -> None:
    interrupted(tmp_path / "a", [0])
    for name in (".DS_Store", "store.zarr/latents/.nfs0001"):
        (tmp_path / "a" / name).write_bytes(b"x")
    artifact = make_store(tmp_path / "a", vae=LAYOUT.vae)
    assert artifact.files == stored.files and len(artifact.strays()) == 2


def test_values_that_do_not_fit_name_their_row(tmp_path: Path) -> None:
    with open_draft(tmp_path / "a") as draft:
        writer = StoreWriter(draft, LAYOUT, {"encoder": ENCODER})
        rows = [line(i) for i in range(16)]
        for bad in (np.nan, np.inf, 70_000.0):
            latents = np.zeros((16, 4, 8), np.float32)
            latents[5, 1, 2] = bad
            with pytest.raises(DataError, match="00000005 are not finite"):
                writer.write_shard(0, [RowBatch(latents, np.zeros((16, 4, 2, 2), np.float32), rows)])
        assert writer.missing_shards() == [0, 1, 2]


def test_only_whole_shards_are_written(tmp_path: Path) -> None:
    with open_draft(tmp_path / "a") as draft:
        writer = StoreWriter(draft, LAYOUT, {"encoder": ENCODER})
        with pytest.raises(AssertionError, match="whole"):
            writer.write_shard(0, [RowBatch(np.zeros((8, 4, 8)), np.zeros((8, 4, 2, 2)), [line(i) for i in range(8)])])
        with pytest.raises(StoreError, match="3 shards are not written"):
            writer.finish()


def test_the_index_is_written_after_the_shard_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []
    real_file, real_index = writer.new_file, writer.write_index

    @contextmanager
    def noted(path: Path, *rest: object, **more: bool) -> Iterator[object]:
        with real_file(path, *rest, **more) as write:
            yield write
        events.append(path)

    monkeypatch.setattr(writer, "new_file", noted)
    monkeypatch.setattr(writer, "write_index", lambda *rest: (events.append("index"), real_index(*rest)))
    interrupted(tmp_path / "a", [1])
    assert set(events[:-1]) == {tmp_path / "a" / name for name in LAYOUT.shard_files(1)} and events[-1] == "index"


def sums_of(*batches: np.ndarray) -> dict:
    sums = ChannelSums(batches[0].shape[-1])
    for rows in batches:
        sums.add(rows)
    return json.loads(json.dumps(sums.json()))


def test_statistics_do_not_depend_on_how_shards_were_made() -> None:
    rows = np.random.default_rng(0).normal(3, 100, (50, 4, 8)).astype(np.float16)
    parts = [sums_of(rows[i : i + 16]) for i in range(0, 50, 16)]
    assert parts[1] == sums_of(rows[16:17], rows[17:29], rows[29:32])
    found = statistics_of(parts, 8)
    tokens = rows.reshape(-1, 8).astype(np.float64)
    assert found == statistics_of(parts, 8) and found["tokens"] == 200
    assert np.allclose(found["mean"], tokens.mean(0), rtol=1e-12) and np.allclose(
        found["std"], tokens.std(0), rtol=1e-12
    )


def flip(path: Path, byte: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte % len(data)] ^= 1 << bit
    path.write_bytes(data)


def outcome(path: Path, verify: bool = True) -> str:
    """What reading everything gives: an error's code, or "same"; anything else fails the test."""
    try:
        store = LatentsStore.open(path, verify)
        found = (store.latents(range(store.rows)), store.vae(range(store.rows)))
    except BifrostError as error:
        assert error.exit_code == 5 and (error.fix or not isinstance(error, StoreError)), str(error)
        return error.code
    everything = list(range(40))
    assert np.array_equal(found[0], truth("latents", everything)) and np.array_equal(found[1], truth("vae", everything))
    assert store.captions == [f"caption {i}" for i in everything]
    return "same"


def copied(stored: Artifact, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(stored.path, target))


def test_a_flipped_bit_anywhere_is_found(stored: Artifact, tmp_path: Path) -> None:
    """Sampled positions of every file, the ends included. With the manifest's sha256 all are errors."""
    rng = np.random.default_rng(0)
    path = copied(stored, tmp_path)
    for name in (*stored.files, "manifest.json"):
        size = (path / name).stat().st_size
        whole = (path / name).read_bytes()
        for byte in {0, size - 1, *rng.integers(0, size, 12).tolist()}:
            flip(path / name, byte, int(rng.integers(8)))
            assert outcome(path).startswith(("BF-STORE", "BF-ART")), f"{name} byte {byte}"
            (path / name).write_bytes(whole)
    assert outcome(path) == "same"


def test_without_sha256_the_inner_checksums_still_find_it(stored: Artifact, tmp_path: Path, way: None) -> None:
    rng = np.random.default_rng(1)
    path = copied(stored, tmp_path)
    found = []
    for name in [name for name in stored.files if "/c/" in name]:
        whole = (path / name).read_bytes()
        for byte in rng.integers(0, len(whole), 25).tolist():
            flip(path / name, byte, int(rng.integers(8)))
            found.append(outcome(path, verify=False))  # asserts: an error, or the same numbers
            (path / name).write_bytes(whole)
    assert found.count("BF-STORE-005") == len(found)


@pytest.mark.parametrize("verify", [True, False])
def test_missing_and_truncated_files(stored: Artifact, tmp_path: Path, verify: bool) -> None:
    for name in stored.files:
        path = copied(stored, tmp_path)
        whole = (path / name).read_bytes()
        for cut in (0, 1, len(whole) // 2, len(whole) - 1):
            (path / name).write_bytes(whole[:cut])
            assert outcome(path, verify) == "BF-STORE-005"
        (path / name).write_bytes(whole + b" ")
        assert outcome(path, verify) == "BF-STORE-005"
        (path / name).unlink()
        assert outcome(path, verify) == "BF-STORE-005"


def test_a_missing_inner_chunk_is_no_row_of_zeros(tmp_path: Path, way: None) -> None:
    """A shard whose own index says that one chunk was never written, under a manifest that agrees."""
    with open_draft(tmp_path / "a") as draft:
        writer = StoreWriter(draft, LAYOUT, {"encoder": ENCODER})
        for shard in writer.missing_shards():
            write(writer, shard)
        writer.finish()
        path = draft.path / LAYOUT.shard_file("latents", 1)
        path.write_bytes(without_chunk(path.read_bytes(), 2, 4))
        draft.commit()
    assert outcome(tmp_path / "a", verify=False) == "BF-STORE-005"
    assert outcome(tmp_path / "a") == "BF-STORE-005"
    intact = LatentsStore.open(tmp_path / "a")
    with pytest.raises(StoreError, match=r"shard 1 of latents \(rows 16 to 31\)"):
        intact.latents([24])


def without_chunk(shard: bytes, chunk: int, chunks: int) -> bytes:
    """The shard with one entry of its closing index (offset, length as uint64, then crc32c) set to "not there"."""
    from numcodecs.checksum32 import CRC32C

    index = np.frombuffer(shard[-(chunks * 16 + 4) : -4], np.uint64).reshape(chunks, 2).copy()
    index[chunk] = 2**64 - 1
    return shard[: -(chunks * 16 + 4)] + bytes(CRC32C(location="end").encode(index.tobytes()))


def test_shards_of_another_generation_are_refused(stored: Artifact, tmp_path: Path) -> None:
    path = copied(stored, tmp_path)
    other = make_store(tmp_path / "other", vae=LAYOUT.vae, seed=1)
    name = LAYOUT.shard_file("latents", 0)
    shutil.copy(other.path / name, path / name)
    assert outcome(path) == "BF-STORE-005"
    shutil.copy(stored.path / name, path / name)
    first, second = (path / LAYOUT.shard_file("latents", shard) for shard in (0, 1))
    data = first.read_bytes(), second.read_bytes()
    first.write_bytes(data[1]), second.write_bytes(data[0])
    assert outcome(path) == "BF-STORE-005"


def test_an_absurd_shape_is_refused_at_once(tmp_path: Path) -> None:
    with open_draft(tmp_path / "a") as draft:
        writer = StoreWriter(draft, LAYOUT, {"encoder": ENCODER})
        for shard in writer.missing_shards():
            write(writer, shard)
        writer.finish()
        metadata = draft.path / "store.zarr" / "latents" / "zarr.json"
        value = json.loads(metadata.read_text())
        value["shape"][0] = 99_999_999_999_999
        metadata.write_text(json.dumps(value))
        draft.commit()
    assert outcome(tmp_path / "a") == "BF-STORE-005"


def test_foreign_files_are_listed_and_ignored(stored: Artifact, tmp_path: Path) -> None:
    path = copied(stored, tmp_path)
    for name in (
        ".DS_Store",
        "store.zarr/.DS_Store",
        "store.zarr/latents/c/0/0/0.abc.partial",
        "store.zarr/notes/x.txt",
    ):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"x")
    assert outcome(path) == "same" and len(Artifact.open(path).strays()) == 4


def test_other_artifacts_are_no_stores(tmp_path: Path) -> None:
    with Draft.open(tmp_path / "report", "report", {}) as draft:
        draft.commit()
    with pytest.raises(StoreError, match="a report artifact, not latents"):
        LatentsStore.open(tmp_path / "report")
    with Draft.open(tmp_path / "empty", "latents", {}) as draft:
        draft.commit()
    with pytest.raises(StoreError):
        LatentsStore.open(tmp_path / "empty")


def test_a_second_writer_is_refused_with_the_owner(tmp_path: Path) -> None:
    with open_draft(tmp_path / "a"), pytest.raises(ArtifactError, match="locked by pid") as caught:
        open_draft(tmp_path / "a")
    assert caught.value.exit_code == 5


def test_the_index_refuses_what_it_did_not_write(tmp_path: Path) -> None:
    interrupted(tmp_path / "a", [0])
    path = tmp_path / "a" / index_file(0)
    whole = path.read_bytes()
    assert len(read_index(tmp_path / "a", 0).lines) == 16
    for text in (
        b"",
        b"\n",
        b"[]\n",
        whole[:-2],
        whole.replace(b"caption 3", b"caption 4"),
        whole.replace(b'"size":[64', b'"size":[65'),
    ):
        path.write_bytes(text)
        with pytest.raises(StoreError):
            read_index(tmp_path / "a", 0)


# ---- 8 bits ----------------------------------------------------------------------------------------------------------


def cosines(a_NPC: np.ndarray, b_NPC: np.ndarray) -> np.ndarray:
    a_NPC, b_NPC = a_NPC.astype(np.float64), b_NPC.astype(np.float64)
    return (a_NPC * b_NPC).sum(-1) / np.linalg.norm(a_NPC, axis=-1) / np.linalg.norm(b_NPC, axis=-1)


def heavy_tailed(kind: str) -> np.ndarray:
    """Latents (2, 64, 520) as encoders make them at their worst."""
    rng = np.random.default_rng(0)
    values = rng.standard_t(2 if kind == "tails" else 30, (2, 64, 520))
    if kind == "outliers":  # a few channels are a hundred times the others, or far from zero
        values[..., ::128] *= 100
        values[..., 5] += 60
    elif kind == "channels":
        values *= np.exp(1.5 * rng.normal(size=(1, 1, 520)))
    elif kind == "tokens":
        values *= np.exp(1.5 * rng.normal(size=(2, 64, 1)))
    return values.astype(np.float16)


@pytest.mark.parametrize("kind", ["tails", "outliers", "channels", "tokens"])
def test_8_bits_keep_directions_of_tokens_and_shapes_of_channels(kind: str) -> None:
    half = heavy_tailed(kind)
    codes, scales = encode_int8(half)
    back = decode_int8(codes, scales).astype(np.float64)
    assert codes.nbytes + scales.nbytes < 0.54 * half.nbytes and codes.min() >= -127
    assert cosines(back, half).min() > 0.999
    error_C = np.sqrt(((back - half) ** 2).mean((0, 1))) / half.astype(np.float64).std((0, 1))
    assert np.sort(error_C)[-2] < 0.08, "deviations of a channel, which is what normalised latents show"
    assert error_C.max() < 0.15, "a channel whose mean is 60 deviations from zero"


@pytest.mark.parametrize("channels", [8, 64, 100, 520])
def test_decoding_8_bits_is_its_formula_to_the_bit(channels: int) -> None:
    half = heavy_tailed("channels")[..., :channels]
    half[1, 5] = np.nan
    codes, scales = encode_int8(half)
    largest, channel = (part.astype(np.float32) for part in np.split(scales, [-channels], axis=1))
    largest = np.repeat(largest.reshape(2, 64, -1) / 127, 64, axis=2)[..., :channels]
    values = codes.astype(np.float32) * largest * np.where(channel == 0, 1, channel)[:, None]
    wanted = np.where(codes == -128, np.nan, values.clip(-65504, 65504)).astype(np.float16)
    assert np.array_equal(decode_int8(codes, scales), wanted, equal_nan=True)


def test_8_bits_at_the_ends_of_float16() -> None:
    half = np.array([[[65504, -65504, 0, 1e-7], [0, 1, 0, 0], [0, 0, 0, 0]], [[np.nan] * 4] * 3], np.float16)
    codes, scales = encode_int8(half)
    back = decode_int8(codes, scales)
    assert np.array_equal(back[0, 2], [0] * 4) and np.isnan(back[1]).all() and np.isnan(scales[1]).all()
    assert np.allclose(back[0, 0, :2], [65504, -65504], rtol=1e-2) and np.isfinite(back[0]).all()
    assert np.allclose(back[0, 1], [0, 1, 0, 0], rtol=1e-2)


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_store(tmp_path_factory.mktemp("store8") / "a", vae=LAYOUT.vae, storage="int8", failed=(3,))


def rounded(rows: list[int]) -> np.ndarray:
    return decode_int8(*encode_int8(truth("latents", rows)))


def test_a_store_in_8_bits_reads_like_any_other(eight: Artifact, stored: Artifact, tmp_path: Path, way: None) -> None:
    store = LatentsStore.open(eight)
    rows = [i for i in range(40) if i != 3]
    assert store.rows == 39 and np.array_equal(store.latents(range(39)), rounded(rows))
    assert store.latents([38, 0, 0]).dtype == np.float16 and np.array_equal(store.vae([5]), truth("vae", [6]))
    assert np.array_equal(store.latents([38, 0, 5]), rounded([39, 0, 6]))
    assert cosines(store.latents(range(39)), truth("latents", rows)).min() > 0.999
    tokens = rounded(rows).reshape(-1, 8).astype(np.float64)
    assert np.allclose(store.mean_C, tokens.mean(0), atol=1e-7) and np.allclose(store.std_C, tokens.std(0), atol=1e-6)
    assert (store.attributes["format"], store.attributes["storage"]) == (3, "int8")
    assert "storage" not in LatentsStore.open(stored).attributes
    made = make_store(tmp_path / "again", vae=LAYOUT.vae, storage="int8", failed=(3,))
    assert made.files == eight.files


def outcome8(path: Path, verify: bool) -> str:
    try:
        found = LatentsStore.open(path, verify).latents(range(39))
    except BifrostError as error:
        assert error.exit_code == 5
        return error.code
    assert np.array_equal(found, rounded([i for i in range(40) if i != 3]))
    return "same"


@pytest.mark.parametrize("verify", [True, False])
def test_a_flipped_bit_in_codes_or_scales_is_found(eight: Artifact, tmp_path: Path, verify: bool) -> None:
    rng = np.random.default_rng(2)
    path = copied(eight, tmp_path)
    for name in [name for name in eight.files if "/latents" in name]:
        whole = (path / name).read_bytes()
        for byte in rng.integers(0, len(whole), 6).tolist():
            flip(path / name, byte, int(rng.integers(8)))
            assert outcome8(path, verify) == "BF-STORE-005", f"{name} byte {byte}"
            (path / name).write_bytes(whole)
    assert outcome8(path, verify) == "same"


@pytest.mark.parametrize("array", ["latents", "latents_scale"])
def test_a_missing_chunk_of_codes_or_scales_is_no_row(tmp_path: Path, array: str, way: None) -> None:
    layout = replace(LAYOUT, storage="int8")
    with open_draft(tmp_path / "a") as draft:
        writer = StoreWriter(draft, layout, {"encoder": ENCODER})
        for shard in writer.missing_shards():
            write(writer, shard)
        writer.finish()
        path = draft.path / layout.shard_file(array, 1)
        path.write_bytes(without_chunk(path.read_bytes(), 2, 4))
        draft.commit()
    with pytest.raises(StoreError, match="shard 1 of latents"):
        LatentsStore.open(tmp_path / "a", verify=False).latents([24])


def test_writing_in_8_bits_continues(eight: Artifact, tmp_path: Path) -> None:
    layout = replace(LAYOUT, storage="int8")
    with open_draft(tmp_path / "a") as draft:
        write(StoreWriter(draft, layout, {"encoder": ENCODER}), 1)
    flip(tmp_path / "a" / layout.shard_file("latents_scale", 1), 9, 1)
    with open_draft(tmp_path / "a") as draft:
        assert StoreWriter(draft, layout, {"encoder": ENCODER}).missing_shards() == [0, 1, 2]
