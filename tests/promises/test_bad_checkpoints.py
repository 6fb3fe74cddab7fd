"""Bad inputs 53, 56 and 57, as commands: trained parts that were tampered with, other formats, numbers that diverge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures_flux import save_system
from fixtures_stage_training import mllm_store, save_mllm
from refusals import refused, told
from safetensors.torch import load_file, save_file

from bifrost_cli.artifacts.files import sha256_file, write_json
from bifrost_cli.artifacts.identity import digest_of
from bifrost_cli.training.checkpoint import Checkpoints

NAMES = ("head.weight", "head.bias")


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    return save_system(tmp_path_factory.mktemp("system"))


@pytest.fixture
def branch(system, tmp_path) -> Path:
    return Path(shutil.copytree(system.branch.path, tmp_path / "in" / "branch"))


def render(system, branch: Path, out: Path) -> list[object]:
    """The command that reads a branch, with the recipe of the system it is of."""
    models = system.recipe.models
    return ["generate", "a red circle", "-o", out, "--branch", branch, "--controlnet", system.controlnet.path,
            "--device", "cpu", "--set",
            f"models.mllm={models.mllm}", "--set", f"models.diffusion={models.diffusion}"]  # fmt: skip


def agreed(path: Path) -> None:
    """Make the manifest agree with the files, as somebody would who means harm."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = {"sha256": sha256_file(path / name), "size": (path / name).stat().st_size}
    changed(path, manifest)


def changed(path: Path, manifest: dict) -> None:
    body = {key: value for key, value in manifest.items() if key != "digest"}
    write_json(path / "manifest.json", {**body, "digest": digest_of(body)})


Tensors = dict[str, torch.Tensor]


def first(tensors: Tensors) -> str:
    return next(name for name in sorted(tensors) if tensors[name].ndim == 2)


def swapped(tensors: Tensors) -> Tensors:
    """Two tensors of different shapes under each other's names."""
    one = first(tensors)
    two = next(name for name in sorted(tensors) if tensors[name].shape != tensors[one].shape)
    return {**tensors, one: tensors[two], two: tensors[one]}


# What is done to the tensors; the code and the words once the manifest agrees.
TAMPERED: dict[str, tuple[Callable[[Tensors], Tensors], str, str]] = {
    "a tensor more": (lambda t: {**t, "zz.weight": torch.ones(2)}, "ART-007", "unexpected zz.weight"),
    "a tensor less": (lambda t: {n: v for n, v in t.items() if n != first(t)}, "ART-007", "missing {first}"),
    "another shape": (lambda t: {**t, first(t): t[first(t)][:-1].clone()}, "ART-007", "{first} is ("),
    "swapped tensors": (swapped, "ART-007", "{first} is ("),
    "NaN": (lambda t: {**t, first(t): torch.full_like(t[first(t)], float("nan"))}, "ART-005", "{first} holds numbers"),
    "whole numbers": (lambda t: {**t, first(t): t[first(t)].int()}, "ART-007", "{first} holds torch.int32"),
}


@pytest.mark.parametrize("manifest", ["as it was", "agrees"])
@pytest.mark.parametrize("name", TAMPERED)
def test_53_a_branch_that_was_tampered_with(system, branch, tmp_path, capsys, name, manifest):
    change, code, words = TAMPERED[name]
    path = branch / "model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors), path)
    if manifest == "agrees":
        agreed(branch)
        words = words.format(first=first(tensors))
    else:
        code, words = "ART-005", "model.safetensors"
    said = refused(capsys, tmp_path / "in", 5, code, words, *render(system, branch, tmp_path / "out.png"))
    assert str(branch) in said and not (tmp_path / "out.png").exists()


def test_53_a_flipped_bit_is_seen_by_the_hash(system, branch, tmp_path, capsys):
    path = branch / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(capsys, tmp_path / "in", 5, "ART-005", "model.safetensors was changed",
            *render(system, branch, tmp_path / "out.png"))  # fmt: skip
    code, said = told(capsys, tmp_path / "in", "artifacts", "verify", branch)
    assert code == 8 and "model.safetensors" in said, said


# ---- 56 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format_", "code", "words"), [
    (99, "ART-002", "update bifrost"), (0, "ART-005", "edited"), (-1, "ART-005", "edited"), ("1", "ART-005", "edited"),
    (True, "ART-005", "edited"), (None, "ART-005", "edited")])  # fmt: skip
def test_56_an_artifact_of_another_format(branch, tmp_path, capsys, format_, code, words):
    changed(branch, {**json.loads((branch / "manifest.json").read_text()), "format": format_})
    said = refused(capsys, tmp_path / "in", 5, code, words, "artifacts", "show", branch)
    assert str(branch) in said


@pytest.mark.parametrize(("format_", "code"), [(99, "RECIPE-006"), (0, "RECIPE-003"), ("two", "RECIPE-003"),
                                               ("true", "RECIPE-003")])  # fmt: skip
def test_56_a_recipe_of_another_format(tmp_path, capsys, format_, code):
    path = tmp_path / "r.yaml"
    path.write_text(f"name: x\nformat: {format_}\n")
    said = refused(capsys, path, 2, code, f"{path}:2:1", "recipes", "show", path)
    assert "update bifrost" in said or format_ != 99


# ---- 57 --------------------------------------------------------------------------------------------------------------


def test_57_a_learning_rate_of_1e9_writes_no_checkpoint(tmp_path, capsys):
    inputs = tmp_path / "in"
    store, mllm = mllm_store(inputs / "store").path, save_mllm(inputs / "mllm")
    train = {"lr": "1e9", "warmup": 0, "steps": 40, "batch_size": 4, "clip": 0, "precision": "fp32",
             "checkpoint_every": 1, "validate_every": 0, "sample_every": 0}  # fmt: skip
    sets = {"models.mllm": mllm, "models.dtype": "float32", "images.input_size": 64,
            **{f"branch.train.{name}": value for name, value in train.items()}}  # fmt: skip
    words = [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]
    said = refused(capsys, inputs, 7, "NAN-001", "not finite", "train", "branch", "--latents", store, "-o",
                   tmp_path / "out", "--device", "cpu", *words)  # fmt: skip
    assert "lower the learning rate" in said and not (tmp_path / "out" / "manifest.json").exists()
    kept = Checkpoints(tmp_path / "out" / "work" / "checkpoints").newest()
    files = list(kept.path.glob("*.safetensors"))
    assert files and all(torch.isfinite(tensor).all() for path in files for tensor in load_file(path).values())
