"""Old artifacts keep loading: an example of every format, kept from now on, is read by the program of today.

`formats/` holds what `make_formats.py` wrote once. The branch and the ControlNet of format 1 are the built-in ones; who
replaces those by a later format moves them here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_loading import load_branch, load_controlnet, load_mllm
from fixtures_store import make_store, row
from make_formats import CAPTIONS, PLANS

from bifrost_cli.artifacts import FORMATS, Artifact
from bifrost_cli.artifacts.files import write_json
from bifrost_cli.artifacts.identity import digest_of
from bifrost_cli.cli.app import run
from bifrost_cli.config.load import load_recipe
from bifrost_cli.config.schema import FORMAT as RECIPE_FORMAT
from bifrost_cli.data.image_sets import from_samples
from bifrost_cli.data.latents import zarr_layout
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.data.latents.zarr_layout import StoreLayout
from bifrost_cli.data.safetensors_io import load_tensors, save_tensors
from bifrost_cli.errors import ArtifactError, RecipeError, StoreError
from bifrost_cli.evaluation import feature_statistics
from bifrost_cli.evaluation.feature_statistics import load_statistics
from bifrost_cli.loading.resolve import builtin
from bifrost_cli.reports.page import report_html
from bifrost_cli.training import checkpoint
from bifrost_cli.training.checkpoint import Checkpoints

HERE = Path(__file__).parents[1] / "formats"


# ---- what each holds ------------------------------------------------------------------------------------------------


def latents(path: Path, tolerance: float) -> None:
    store, layout = LatentsStore.open(path), StoreLayout(6, (2, 2), 8, (4, 4, 4), 4, 2, "float16")
    rows = [0, 1, 2, 4, 5]  # row 3 failed
    assert store.rows == 5 and store.captions == [CAPTIONS[i] for i in rows] and store.plans == [PLANS[i] for i in rows]
    true = np.stack([row("latents", i, layout) for i in rows])
    assert np.abs(store.latents(range(5)) - true).max() <= tolerance
    assert np.array_equal(store.vae(range(5)), np.stack([row("vae", i, layout) for i in rows]))


def branch(path: Path) -> None:
    mllm = load_mllm("builtin:mllm", torch.device("cpu"), torch.float32)
    loaded = load_branch(Artifact.open(path), device=torch.device("cpu"), dtype=torch.float32, mllm=mllm)
    assert loaded.patches == 16


def controlnet(path: Path) -> None:
    load_controlnet(Artifact.open(path), device=torch.device("cpu"), dtype=torch.float32)


def samples(path: Path) -> None:
    found = from_samples(Artifact.open(path), load_recipe(str(path)).images)
    assert len(found.entries) == 4 and found.entries[2].seed == 2 and found.entries[0].plan == "white aa none"
    assert found.entries[0].load().shape == (64, 64, 3)
    assert load_tensors(path / "latents" / "00000.safetensors")[0]["latents"].shape == (4, 2)


def report(path: Path) -> None:
    found = json.loads(Artifact.open(path).file("report.json").read_text())
    assert found["results"][0]["value"] == 1.0
    assert "100.0%" in report_html(found, {}), "today's page shows it"


def training_state(path: Path) -> None:
    found = Checkpoints(path).newest()
    assert found.step == 5
    assert all(dict(found.read(group, torch.nn.Linear(1, 1))) for group in ("model", "optimizer", "ema"))


def saved_statistics(path: Path) -> None:
    found = load_statistics(path)
    assert found.features_ND.shape == (6, 3) and found.checked == (path.stem == "statistics-3")


def recipe(path: Path) -> None:
    found = load_recipe(str(path))
    assert found.models.diffusion == "builtin:flux" and found.models.diffusion_text_tokens == 24


READ = {
    ("latents", 1): ("latents-1", lambda path: latents(path, 0.0)),
    ("branch", 1): (builtin("branch").path, branch),
    ("controlnet", 1): (builtin("controlnet").path, controlnet),
    ("samples", 1): ("samples-1", samples),
    ("report", 1): ("report-1", report),
    ("store float16", 1): ("latents-1", lambda path: latents(path, 0.0)),
    ("store int8", 2): ("latents-1-store-2", lambda path: latents(path, 0.02)),
    ("store float16", 3): ("latents-1-store-3", lambda path: latents(path, 0.0)),
    ("store int8", 3): ("latents-1-store-3-int8", lambda path: latents(path, 0.02)),
    ("checkpoint", 1): ("checkpoint-1", training_state),
    ("statistics", 2): ("statistics-2.safetensors", saved_statistics),
    ("statistics", 3): ("statistics-3.safetensors", saved_statistics),
    ("recipe", 1): ("recipe-1.yaml", recipe),
    ("recipe", 2): ("recipe-2.yaml", recipe),
    ("recipe", 3): ("recipe-3.yaml", recipe),
}


@pytest.mark.parametrize(("kind", "number"), READ, ids=[f"{kind}-{number}" for kind, number in READ])
def test_an_example_is_read(kind, number):
    where, read = READ[kind, number]
    read(HERE / where)


def test_every_format_of_today_has_an_example():
    today = {*FORMATS.items(), ("recipe", RECIPE_FORMAT), ("checkpoint", checkpoint.FORMAT),
             ("statistics", int(feature_statistics.FORMAT.rpartition("/")[2])),
             *((f"store {storage}", zarr_layout.FORMAT) for storage in zarr_layout.OLDER)}  # fmt: skip
    assert today <= set(READ)


STORES = ["latents-1", "latents-1-store-2", "latents-1-store-3", "latents-1-store-3-int8"]


@pytest.mark.parametrize("name", [*STORES, "samples-1", "report-1"])
def test_examples_are_whole_and_as_they_were(name, capsys):
    assert run(["artifacts", "verify", str(HERE / name)]) == 0


# ---- what is newer than this program --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["latents-1", "samples-1", "report-1"])
def test_a_newer_artifact_says_update(name, tmp_path):
    shutil.copytree(HERE / name, tmp_path / "it")
    manifest = json.loads((tmp_path / "it" / "manifest.json").read_text())
    manifest["format"] += 1
    manifest["digest"] = digest_of({key: value for key, value in manifest.items() if key != "digest"})
    (tmp_path / "it" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError) as told:
        Artifact.open(tmp_path / "it")
    assert told.value.exit_code == 5 and "update bifrost" in f"{told.value.message} {told.value.fix}"


def test_a_newer_recipe_says_update(tmp_path):
    (tmp_path / "new.yaml").write_text(f"format: {RECIPE_FORMAT + 1}\nname: new\n")
    with pytest.raises(RecipeError, match="newer") as told:
        load_recipe(str(tmp_path / "new.yaml"))
    assert told.value.exit_code == 2 and "update" in told.value.fix


def test_newer_statistics_say_update(tmp_path):
    tensors, meta = load_tensors(HERE / "statistics-3.safetensors")
    save_tensors(tmp_path / "new.safetensors", tensors, {**meta, "format": "bifrost.statistics/4"})
    with pytest.raises(ArtifactError, match="of format 4; this bifrost reads up to 3") as told:
        load_statistics(tmp_path / "new.safetensors")
    assert told.value.code == "BF-ART-002" and told.value.fix == "update bifrost"


def test_a_newer_checkpoint_says_update(tmp_path):
    shutil.copytree(HERE / "checkpoint-1", tmp_path / "it")
    (path,) = (tmp_path / "it").glob("step-*/manifest.json")
    write_json(path, {**json.loads(path.read_text()), "format": checkpoint.FORMAT + 1})
    with pytest.raises(ArtifactError) as told:
        Checkpoints(tmp_path / "it").newest()
    assert told.value.code == "BF-ART-002" and told.value.fix == "update bifrost"


def test_a_newer_store_says_update(tmp_path, monkeypatch):
    with monkeypatch.context() as later:
        later.setattr(StoreLayout, "attributes", {**StoreLayout(2, (2, 2), 8).attributes, "format": 9})
        path = make_store(tmp_path, rows=2, shard_rows=2, chunk_rows=1).path
    with pytest.raises(StoreError) as told:
        LatentsStore.open(path)
    assert told.value.code == "BF-ART-002" and told.value.fix == "update bifrost"
