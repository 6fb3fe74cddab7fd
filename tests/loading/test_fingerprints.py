"""The kept hash of a base: computed once, and again after any change of its files that the file system saw."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from fixtures_flux import save_mllm, save_painter, tiny_painter
from fixtures_mllm import random_mllm

from bifrost_cli.config.schema import Models
from bifrost_cli.loading import loaders
from bifrost_cli.loading.loaders import ModelLoader, fingerprint


@pytest.fixture
def models(tmp_path: Path, monkeypatch) -> Models:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(loaders, "SETTLED", 0.0)
    return Models(mllm=str(save_mllm(random_mllm(), tmp_path / "mllm")), diffusion="none", dtype="float32")


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """Every loading of an MLLM."""
    made: list[str] = []

    def load(loader: ModelLoader):
        made.append(loader.models.mllm)
        return real(loader)

    real = ModelLoader.mllm
    monkeypatch.setattr(ModelLoader, "mllm", load)
    return made


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.json"))


def test_it_is_the_hash_over_tensors_and_is_computed_once(models: Models, loads, tmp_path: Path) -> None:
    assert fingerprint("mllm", models) == random_mllm().weights_hash() == fingerprint("mllm", models)
    assert loads == [models.mllm] and len(kept(tmp_path)) == 1
    assert fingerprint("mllm", models.model_copy(update={"dtype": "bfloat16"})) != random_mllm().weights_hash()
    assert len(loads) == 2


def test_a_loaded_base_is_not_loaded_again(models: Models, loads) -> None:
    assert fingerprint("mllm", models, random_mllm()) == random_mllm().weights_hash()
    assert loads == []


def test_one_changed_byte_is_seen_with_the_old_size_and_time(models: Models, loads) -> None:
    before, path = fingerprint("mllm", models), Path(models.mllm) / "model.safetensors"
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert fingerprint("mllm", models) != before and len(loads) == 2


def test_fresh_files_are_not_trusted_and_a_cache_that_fails_only_costs_time(
    models: Models, loads, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(loaders, "SETTLED", 3600.0)
    fingerprint("mllm", models)
    assert kept(tmp_path) == []
    monkeypatch.setattr(loaders, "SETTLED", 0.0)
    fingerprint("mllm", models)
    kept(tmp_path)[0].write_text("{")
    fingerprint("mllm", models)
    assert len(loads) == 3
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    assert fingerprint("mllm", models) == random_mllm().weights_hash()


def test_a_painter_too(models: Models, tmp_path: Path) -> None:
    place = save_painter(tiny_painter(), tmp_path / "flux")
    assert (
        fingerprint("diffusion", models.model_copy(update={"diffusion": str(place)})) == tiny_painter().weights_hash()
    )
    assert len(kept(tmp_path)) == 1 and torch.is_grad_enabled()
