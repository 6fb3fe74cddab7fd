"""The kept hash of a base: computed once, and again after any change of its files that the file system saw."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from fixtures_flux import save_mllm, save_painter, tiny_painter
from fixtures_mllm import random_mllm

from bifrost_cli.artifacts import Draft
from bifrost_cli.artifacts.workspace import BUILTIN
from bifrost_cli.config.schema import Models
from bifrost_cli.errors import ArtifactError
from bifrost_cli.loading import loaders
from bifrost_cli.loading.compatibility import require_base
from bifrost_cli.loading.loaders import ModelLoader, decisive_files, fingerprint


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


@pytest.mark.parametrize(
    ("name", "old", "new", "decides"),
    [
        ("tokenizer.json", "", "\n", True), ("chat_template.jinja", "", "x", True), ("merges.txt", "", "x", True),
        ("preprocessor_config.json", "{", '{"of": 1, ', True), ("config.json", "{", '{"of": 1, ', True),
        ("processor_config.json", "", '{"of": 1}', True), ("generation_config.json", "", "[NaN]", True),
        ("config.json", "{", '{"_name_or_path": "here", "x": 1, ', True),
        ("config.json", "{", '{"_name_or_path": "here", ', False), ("config.json", "", "\n ", False),
        ("README.md", "", "x", False), ("model.safetensors.index.json", "", "{}", False), ("notes.txt", "", "x", False),
    ],
)  # fmt: skip
def test_the_files_that_decide_belong_to_the_identity(models, tmp_path, name, old, new, decides):
    before, path = decisive_files("mllm", models), tmp_path / "mllm" / name
    text = path.read_text("utf-8") if path.exists() else ""
    if old:
        text = text if old in text else "{}"
        path.write_text(text.replace(old, new, 1).replace(", }", "}"), "utf-8")
    else:
        path.write_text(text + new, "utf-8")
    after = decisive_files("mllm", models)
    assert (before != after) == decides and list(before) == ["mllm_files"]
    copy = shutil.copytree(tmp_path / "mllm", tmp_path / "elsewhere")
    assert decisive_files("mllm", models.model_copy(update={"mllm": str(copy)})) == after, "wherever they are"


def test_what_ships_with_the_package_has_its_ids(tmp_path):
    models = Models(mllm="builtin:mllm", diffusion="builtin:flux")
    assert decisive_files("mllm", models) == decisive_files("diffusion", models) == {}
    copy = Models(diffusion=str(shutil.copytree(BUILTIN / "flux", tmp_path / "flux")))
    before = decisive_files("diffusion", copy)
    for name in ("scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "vae/config.json"):
        path = tmp_path / "flux" / name
        path.write_text(path.read_text("utf-8").replace("{", '{"of": 1, ', 1), "utf-8")
        assert before != (before := decisive_files("diffusion", copy)), name


def test_a_branch_says_which_files_it_was_trained_with(tmp_path):
    def branch(name, **identity):
        with Draft.open(tmp_path / name, "branch", {"mllm": "w", **identity}) as draft:
            return draft.commit()

    require_base(branch("a"), "mllm", "m", "w", "new")  # made before they were recorded
    require_base(branch("b", mllm_files="old"), "mllm", "m", "w", "old")
    with pytest.raises(ArtifactError, match="another tokenizer, chat template or config") as caught:
        require_base(branch("c", mllm_files="old"), "mllm", "m", "w", "new")
    assert caught.value.code == "BF-ART-004"
