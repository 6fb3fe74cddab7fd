"""A branch trained in part: what is trained and saved; that it resumes to the bit, generates, and refuses others."""

from __future__ import annotations

import sys

import pytest
import torch
from fixtures_flux import save_painter, save_part, tiny_controlnet, tiny_painter
from fixtures_loading import load_branch, load_mllm
from fixtures_mllm import PATCHES, normal, random_mllm, tiny_mllm  # noqa: F401
from fixtures_stage_training import TRAIN, mllm_store, recipe, save_mllm

from bifrost_cli.data.safetensors_io import load_tensors
from bifrost_cli.errors import ArtifactError, EnvironmentProblem, RecipeError, Stopped
from bifrost_cli.generation.generate import generate
from bifrost_cli.models.branch.visual_branch import VisualBranch
from bifrost_cli.models.diffusion.controlnet import controlnet_config
from bifrost_cli.training.train_branch import BranchTask, train_branch

KINDS = {"lora": {"tune": "lora", "lora_rank": 2}, "layers": {"tune": "layers", "layers": 1}}
NEW = {"mask_token", "position_embedding", "vision_head.weight", "vision_head.bias"}
WEIGHTS = "model.safetensors"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tuning")
    mllm_store(root / "runs" / "latents-a")
    return {
        "workspace": root / "runs",
        "mllm": save_mllm(root / "mllm"),
        "flux": save_painter(tiny_painter(), root / "f"),
    }


@pytest.fixture(scope="module", params=list(KINDS))
def made(request, folders):
    return request.param, train(folders, **KINDS[request.param])


def train(folders, output=None, **changes):
    wanted = recipe(folders["mllm"], folders["flux"], **changes)
    return train_branch(wanted, workspace=folders["workspace"], output=output, device="cpu")


@pytest.mark.parametrize("tune", [{"rank": 4}, {"layers": 2}])
def test_a_new_branch_computes_what_a_full_one_does_and_copies_nothing_frozen(tiny_mllm, tune):  # noqa: F811
    full, part = (VisualBranch.from_mllm(tiny_mllm, PATCHES, tune=wanted) for wanted in (None, tune))
    prefix = tiny_mllm.encode_prompts(tiny_mllm.tokenize_prompts(["red", "a red circle above a blue square"], 300))
    known, masked = normal(2, PATCHES, 128), torch.ones(2, PATCHES, dtype=torch.bool)
    assert torch.equal(full.hidden(known, masked, prefix), part.hidden(known, masked, prefix))
    stock = {value.data_ptr() for value in tiny_mllm.model.state_dict().values()}
    for name, parameter in part.named_parameters():
        assert (parameter.data_ptr() in stock) != parameter.requires_grad, name
    assert not any(parameter.requires_grad for parameter in tiny_mllm.model.parameters())


def test_only_what_was_trained_is_saved(made, folders):
    kind, artifact = made
    names = set(load_tensors(artifact.path / WEIGHTS)[0])
    rest = names - NEW
    assert names >= NEW and rest
    assert all(".lora_" in name if kind == "lora" else name.startswith("decoder.layers.2.") for name in rest)
    assert artifact.info["parameters"] < 0.5 * sum(p.numel() for p in random_mllm().model.parameters())
    mllm = load_mllm(str(folders["mllm"]), CPU)
    branch, stock = load_branch(artifact, CPU, mllm=mllm), mllm.decoder.state_dict()
    for name in branch.state_dict().keys() - names:
        stock_name = name.replace(".base_layer.", ".").removeprefix("decoder.")
        assert torch.equal(branch.state_dict()[name], stock[stock_name]), name
    if kind == "lora":
        moved = branch.decoder.layers[0].mlp.up_proj.lora_B["default"].weight
    else:
        moved = branch.decoder.layers[-1].mlp.up_proj.weight - stock["layers.2.mlp.up_proj.weight"]
    assert moved.abs().max() > 1e-4
    with pytest.raises(ArtifactError, match="do not fit"):
        load_branch(artifact, CPU)


def test_a_stopped_training_ends_in_the_same_bytes(made, folders, tmp_path, monkeypatch):
    kind, artifact = made
    plain, left = BranchTask.loss, TRAIN["checkpoint_every"] + 1

    def stopping(self, batch, generator):
        nonlocal left
        left -= 1
        if left < 0:
            raise Stopped("here")
        return plain(self, batch, generator)

    options = {**KINDS[kind], "gradient_checkpointing": True, "output": tmp_path / "b"}
    monkeypatch.setattr(BranchTask, "loss", stopping)
    with pytest.raises(Stopped):
        train(folders, **options)
    (checkpoint,) = (tmp_path / "b" / "work" / "checkpoints").glob("step-*")
    assert set(load_tensors(checkpoint / "ema.safetensors")[0]) == set(load_tensors(artifact.path / WEIGHTS)[0])
    monkeypatch.setattr(BranchTask, "loss", plain)
    assert train(folders, **options).files == artifact.files


def test_it_paints_on_its_base_and_on_no_other(made, folders, tmp_path):
    _, artifact = made
    diffusion = tiny_painter()
    controlnet = tiny_controlnet(diffusion, channels=128)
    shared = {key: artifact.identity[key] for key in ("encoder", "grid", "channels")}
    identity = {**shared, "painter": diffusion.weights_hash()}
    other = save_part(tmp_path / "controlnet", "controlnet", controlnet, controlnet_config(controlnet), identity)
    pair = {"branch": artifact.path, "controlnet": other.path, "device": "cpu"}
    wanted = recipe(folders["mllm"], folders["flux"])
    quick = wanted.generate.model_copy(update={"steps": 1, "decode_steps": 2})
    assert generate(
        wanted.model_copy(update={"generate": quick}), "a star", output=tmp_path / "a.png", **pair
    ).is_file()
    mllm = random_mllm(seed=5)
    for part in (mllm.model, mllm.tokenizer, mllm.image_processor):
        part.save_pretrained(tmp_path / "other")
    with pytest.raises(ArtifactError, match="another mllm") as found:
        generate(recipe(tmp_path / "other", folders["flux"]), "a star", output=tmp_path / "b.png", **pair)
    assert found.value.code == "BF-ART-004"


def test_settings_that_would_be_ignored_or_cannot_be_are_refused(folders, monkeypatch):
    for changes in ({"lora_rank": 2}, {"tune": "lora"}, {"tune": "layers", "lora_rank": 2}):
        with pytest.raises(ValueError, match="belong together"):
            recipe(**changes)
    with pytest.raises(RecipeError, match="3 layers"):
        train(folders, tune="layers", layers=4)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(EnvironmentProblem, match="peft") as found:
        train(folders, tune="lora", lora_rank=2)
    assert "bifrost-cli[lora]" in found.value.fix
