"""Bad inputs 47 to 52, as commands: stores that are damaged, written by another, or of another encoder."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures_stage_training import mllm_store, save_mllm
from fixtures_targets import Means
from refusals import SMALL, refused, told

from bifrost_cli.artifacts import Artifact
from bifrost_cli.artifacts.lock import Lock
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.loading.loaders import ModelLoader

SHARD = "store.zarr/latents/c/1/0/0"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return mllm_store(tmp_path_factory.mktemp("whole") / "store").path


@pytest.fixture
def store(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "in" / "store"))


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """A store is looked at before any weight is loaded."""
    monkeypatch.setattr(ModelLoader, "mllm", lambda *rest, **more: pytest.fail("weights were loaded"))
    monkeypatch.setattr(ModelLoader, "encoder", lambda *_, **__: Means(lambda: None))


def edited_zarr(path: Path) -> None:
    value = json.loads(path.read_text())
    value["shape"][0] = 99_999_999_999_999
    path.write_text(json.dumps(value))


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "48 a missing shard": (SHARD, Path.unlink, "is missing"),
    "48 a missing index": ("index/shard-00001.jsonl", Path.unlink, "is missing"),
    "49 a shard cut short": (SHARD, lambda path: os.truncate(path, 100), "has another size"),
    "49 an index with a flipped bit": ("index/shard-00001.jsonl", flipped, "was changed"),
    "49 half a zarr.json": ("store.zarr/latents/zarr.json", lambda path: os.truncate(path, 200), "has another size"),
    "49 an absurd shape": ("store.zarr/latents/zarr.json", edited_zarr, "has another size"),
    "49 a flipped bit in zarr.json": ("store.zarr/latents/zarr.json", flipped, "was changed"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_store_stops_a_training_at_its_start(store, tmp_path, capsys, name):
    file, harm, why = DAMAGE[name]
    harm(store / file)
    said = refused(capsys, tmp_path / "in", 5, "STORE-005", f"{store}: {file} {why}", "train", "branch", "--latents",
                   store, "-o", tmp_path / "out", "--device", "cpu")  # fmt: skip
    assert "extract again" in said and not (tmp_path / "out").exists()
    code, said = told(capsys, tmp_path / "in", "artifacts", "verify", store)
    assert code == 8 and file in said, said


def test_49_a_flipped_bit_is_told_with_its_shard_and_rows(store, tmp_path, capsys):
    """The bytes of a shard are looked at when it is read; the training ends there, and nothing is made of it."""
    flipped(store / SHARD)
    store = LatentsStore.open(store)
    with pytest.raises(Exception, match=r"shard 1 of latents \(rows 16 to 31\) is damaged") as found:
        store.latents([20])
    assert found.value.exit_code == 5 and SHARD in found.value.at


def test_47_a_second_extraction_is_told_at_once_who_writes(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with Lock(out):
        said = refused(capsys, out, 5, "ART-006", f"{out}", "extract-latents", "shapes:8:0", "-o", out, *SMALL)
    assert re.search(rf"locked by pid {os.getpid()} on \S+ since \d", said), said
    assert told(capsys, tmp_path, "artifacts", "ls", "-w", tmp_path)[0] == 0


def test_50_foreign_files_are_listed_and_left_alone(store, tmp_path, capsys):
    for name in (".DS_Store", f"{SHARD}.partial", "store.zarr/others/zarr.json"):
        (store / name).parent.mkdir(exist_ok=True)
        (store / name).write_bytes(b"x")
    code, said = told(capsys, tmp_path / "in", "artifacts", "verify", store)
    assert code == 0, said
    assert sorted(Artifact.open(store).strays()) == [".DS_Store", f"{SHARD}.partial", "store.zarr/others/zarr.json"]
    assert LatentsStore.open(store).latents([20]).any()


def test_50_temporary_files_of_a_killed_extraction_are_swept(tmp_path, capsys, monkeypatch):
    out, calls = tmp_path / "out", iter(range(2))
    (tmp_path / "in").mkdir()

    def stop() -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(ModelLoader, "encoder", lambda *_, **__: Means(stop))
    command = ["extract-latents", "shapes:16:0", "-o", out, *SMALL, "--set", "latents.batch_size=4"]
    assert told(capsys, tmp_path / "in", *command)[0] == 130
    (out / "index" / ".bifrost-tmp-1-1").write_bytes(b"half")
    (out / "thesis.tex").write_text("kept")
    monkeypatch.setattr(ModelLoader, "encoder", lambda *_, **__: Means(lambda: None))
    assert told(capsys, tmp_path / "in", *command)[0] == 0
    assert not list(out.rglob(".bifrost-tmp-*")) and (out / "thesis.tex").read_text() == "kept"


def test_51_52_latents_of_another_encoder_or_of_other_weights(tmp_path, capsys, monkeypatch):
    other = mllm_store(tmp_path / "in" / "clip", encoder={"name": "open_clip:ViT-B-32/x", "weights": "1" * 64}).path
    said = refused(capsys, tmp_path / "in", 5, "ART-004", "encoder open_clip:ViT-B-32/x, not mllm", "train", "branch",
                   "--latents", other, "-o", tmp_path / "out", "--device", "cpu")  # fmt: skip
    assert str(other) in said and not (tmp_path / "out").exists()
    identity = {**LatentsStore.open(mllm_store(tmp_path / "in" / "same")).encoder, "weights": "1" * 64}
    renamed = mllm_store(tmp_path / "in" / "renamed", encoder=identity).path
    mllm = save_mllm(tmp_path / "in" / "mllm")
    monkeypatch.undo()
    said = refused(capsys, tmp_path / "in", 5, "ART-004", "weights: 1111", "train", "branch", "--latents", renamed,
                   "-o", tmp_path / "out", "--device", "cpu", "--set", f"models.mllm={mllm}", "--set",
                   "images.input_size=64")  # fmt: skip
    assert str(renamed) in said and not (tmp_path / "out").exists()
