"""Nothing is silently wrong: each bit of a store, a checkpoint, a manifest, flipped alone: exit 5, or the same numbers.

The ordinary suite takes a sample; `pytest -m crash` takes every bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_store import make_store
from fixtures_targets import OUT, TARGETS
from fixtures_training import SmallTask, settings
from harness import flips, undisturbed

from bifrost_cli.artifacts import Artifact
from bifrost_cli.data.latents import reader as store_module
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.evaluation.feature_statistics import Statistics, load_statistics, save_statistics
from bifrost_cli.training.checkpoint import Checkpoint, Checkpoints
from bifrost_cli.training.loop import fit
from bifrost_cli.training.train_log import TrainingLogger

EVERY = pytest.mark.parametrize(
    "step",
    [pytest.param(101, id="sample"), pytest.param(1, id="every", marks=[pytest.mark.crash, pytest.mark.timeout(3000)])],
)


def read_store(path: Path, verify: bool) -> Any:
    store = LatentsStore.open(path, verify)
    rows = range(store.rows)
    numbers = [store.mean_C.tolist(), store.std_C.tolist(), store.norm, store.grid, store.encoder]
    values = [store.latents(rows).tobytes(), store.vae(rows).tobytes() if store.vae_shape else b""]
    return values, numbers, store.keys, store.captions, store.plans, store.lines


@EVERY
@pytest.mark.parametrize("verify", [True, False], ids=["hashed", "checksums only"])
@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_a_store(tmp_path, storage, verify, step, monkeypatch):
    monkeypatch.setattr(store_module, "_KEPT_IN_MEMORY", 0)
    sizes = {"rows": 3, "grid": (1, 2), "channels": 2, "vae": (1, 2, 2), "shard_rows": 2, "chunk_rows": 1}
    store = make_store(tmp_path / "a", **sizes, storage=storage)
    files = [store.path / name for name in (*store.files, "manifest.json")]
    wanted = read_store(store.path, verify)
    outcomes = flips(files, lambda: read_store(store.path, verify), wanted, step)
    print(f"{storage}, verify={verify}: {dict(outcomes)}")
    assert outcomes["refused"] and not (verify and outcomes["same"])


@EVERY
def test_a_checkpoint(tmp_path, step):
    tensors = {"w": torch.arange(6.0).reshape(2, 3), "half": torch.ones(3, dtype=torch.bfloat16)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.prepare()
    groups = {"model": tensors, "optimizer": {"w/step": torch.tensor(5.0)}}
    checkpoints.save(Checkpoint(5, groups, {"seconds": 1.5}))

    def read() -> Any:
        found = Checkpoints(tmp_path).newest()
        groups = {group: dict(found.read(group, torch.nn.Identity())) for group in ("model", "optimizer")}
        numbers = {name: {key: value.tolist() for key, value in group.items()} for name, group in groups.items()}
        return found.step, numbers, found.state

    outcomes = flips(sorted(checkpoints.path(5).iterdir()), read, read(), max(1, step // 5))
    print(f"checkpoint: {dict(outcomes)}")
    assert outcomes["refused"]


@EVERY
def test_kept_statistics(tmp_path, step):
    features_ND = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    path = tmp_path / "kept.safetensors"
    save_statistics(path, Statistics(features_ND.mean(0), np.cov(features_ND.T), 3, {"layer": "pool"}, features_ND))

    def read() -> Any:
        found = load_statistics(path)
        arrays = (found.mean_D, found.covariance_DD, found.features_ND)
        return found.count, found.identity, [array.tobytes() for array in arrays]

    outcomes = flips([path], read, read(), max(1, step // 5))
    print(f"statistics: {dict(outcomes)}")
    assert outcomes["refused"]


@EVERY
@pytest.mark.parametrize("name", TARGETS)
def test_a_manifest(tmp_path, name, step):
    undisturbed(TARGETS[name], tmp_path)
    path = tmp_path / name / OUT
    outcomes = flips([path / "manifest.json"], lambda: Artifact.open(path).manifest, Artifact.open(path).manifest, step)
    print(f"manifest of {name}: {dict(outcomes)}")
    assert set(outcomes) == {"refused"}


def test_the_payload_of_every_kind_is_verified(tmp_path):
    for name, target in TARGETS.items():
        undisturbed(target, tmp_path)
        artifact = Artifact.open(tmp_path / name / OUT)

        def read(artifact=artifact) -> str:
            artifact.check()
            return "whole"

        outcomes = flips([artifact.path / file for file in artifact.files], read, "whole", step=499)
        assert set(outcomes) == {"refused"}


def test_the_tables_of_an_unfinished_training(tmp_path):
    """Each bit of the rows that the checkpoint counts on."""
    train = settings(steps=4, checkpoint_every=4, validate_every=2)
    fit(SmallTask(train), train, tmp_path)
    digests = Checkpoints(tmp_path / "checkpoints").newest().state["records"]

    def read() -> str:
        TrainingLogger(tmp_path, train, None).cut(4, digests)
        return "same"

    files = [tmp_path / "losses.csv", tmp_path / "validation.csv"]
    assert set(flips(files, read, "same", step=7)) == {"refused"}
