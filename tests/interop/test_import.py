"""import: the published layout becomes the same pair to the bit, every key is accounted for, and nothing is guessed."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fixtures_published as published
import parity_flux
import parity_mllm
import pytest
import torch
from fixtures_flux import System, save_mllm, save_painter, save_system, tiny_painter
from fixtures_loading import load_branch, load_controlnet, load_mllm
from parity import VECTORS
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from bifrost_cli.artifacts import Artifact
from bifrost_cli.cli.app import run
from bifrost_cli.config.schema import Generate, Images, Models, Recipe
from bifrost_cli.data.png import png_pixels, png_text
from bifrost_cli.errors import ArtifactError, EnvironmentProblem
from bifrost_cli.interop import import_checkpoint as stage
from bifrost_cli.interop.import_checkpoint import import_checkpoint
from bifrost_cli.loading.loaders import ModelLoader
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.toy_system import tiny_models

CPU = torch.device("cpu")
LAYER = "vision_language_model.model.layers.1."
Q = LAYER + "self_attn.vision_branch_q_proj.weight"
SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


class Heard(Ui):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def system(tmp_path_factory) -> System:
    return save_system(tmp_path_factory.mktemp("system"), control_scale=1.0)


@pytest.fixture(scope="module")
def checkpoint(system, tmp_path_factory) -> Path:
    return published.publish(system, tmp_path_factory.mktemp("published"))


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def refused(recipe: Recipe, folder: Path, tmp_path: Path, kind=ArtifactError):
    """The error of an import; and nothing was written."""
    with pytest.raises(kind) as caught:
        import_checkpoint(recipe, folder, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return caught.value


def same_bits(one: Path, other: Path) -> bool:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- what is imported ------------------------------------------------------------------------------------------------


def test_the_command_line_from_the_folder_to_the_same_picture(system, checkpoint, tmp_path, capsys):
    recipe, out = str(published.save_recipe(system, tmp_path / "small.yaml")), tmp_path / "imported"
    assert run(["import", str(checkpoint), "-o", str(out), "--recipe", recipe, "--json"]) == 0
    printed, told = capsys.readouterr()
    assert json.loads(printed)["branch"]["path"] == str(out / "branch")
    assert re.search(r"frozen MLLM: \d\d equal, 0 different", told)
    assert "ignored: 2 keys: " in told and "diffusion_decoder (1)" in told
    assert "unknown: 1 keys: something_else (1)" in told
    assert same_bits(out / "branch", system.branch.path) and same_bits(out / "controlnet", system.controlnet.path)
    images = []
    for parts in ((system.branch.path, system.controlnet.path), (out / "branch", out / "controlnet")):
        file = tmp_path / f"{parts[0].parent.name}.png"
        words = ["generate", "a red circle", "-o", str(file), "--recipe", recipe, "--device", "cpu"]
        assert run([*words, "--branch", str(parts[0]), "--controlnet", str(parts[1])]) == 0
        images.append(file.read_bytes())
    assert (png_pixels(images[0]) == png_pixels(images[1])).all()
    assert png_text(images[0])["artifacts"] != png_text(images[1])["artifacts"]


def test_every_key_is_in_the_report_once(system, checkpoint, tmp_path):
    branch, controlnet = import_checkpoint(system.recipe, checkpoint, workspace=tmp_path)
    report = json.loads(branch.file("import.json").read_text())
    frozen = {how: names for how, names in report["frozen"].items() if how != "the base's own"}
    told = [*report["imported"], *report["ignored"], *report["unknown"], *(n for part in frozen.values() for n in part)]
    assert sorted(told) == sorted(json.loads((checkpoint / INDEX).read_text())["weight_map"])
    assert report["imported"][Q] == "decoder.layers.1.self_attn.q_proj.weight"
    assert report["frozen"]["the base's own"] == ["lm_head.weight"]  # tied, so the file of the base has it once
    report = json.loads(controlnet.file("import.json").read_text())
    weights = load_file(checkpoint / "flux_controlnet" / "diffusion_pytorch_model.safetensors")
    assert sorted(report["imported"]) == sorted(weights)
    assert "up_sampling_block.bn1.running_var" in report["imported"]
    assert report["unused keys of config.json"] == {"a_key_of_theirs": 3}
    assert branch.path.name == branch.id and branch.identity["encoder"] == system.encoder
    again = Heard()
    assert import_checkpoint(system.recipe, checkpoint, workspace=tmp_path, ui=again)[0].id == branch.id
    assert sum("already" in line for line in again.lines) == 2


def test_one_file_without_an_index_and_either_part_alone(system, copy, tmp_path):
    weights = {name: tensor for file in copy.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in copy.glob("model*"):
        file.unlink()
    ui = Heard()
    (only,) = import_checkpoint(system.recipe, copy, workspace=tmp_path / "a", ui=ui)
    assert only.kind == "controlnet" and any("no weights at the root" in line for line in ui.lines)
    save_file(weights, copy / "model.safetensors")
    assert len(import_checkpoint(system.recipe, copy, workspace=tmp_path / "a")) == 2
    shutil.rmtree(copy / "flux_controlnet")
    (only,) = import_checkpoint(system.recipe, copy, workspace=tmp_path / "b")
    assert only.kind == "branch"
    (copy / "model.safetensors").unlink()
    assert "no Bifrost checkpoint" in refused(system.recipe, copy, tmp_path).message


def test_half_precision_stays_what_it_is(system, tmp_path):
    def half(weights):
        weights.update({name: tensor.bfloat16() for name, tensor in weights.items() if "vision_branch" in name})

    branch, _ = import_checkpoint(system.recipe, published.publish(system, tmp_path / "p", half), workspace=tmp_path)
    assert load_file(branch.file("model.safetensors"))["decoder.norm.weight"].dtype == torch.bfloat16
    assert load_branch(branch, CPU).decoder.norm.weight.dtype == torch.float32


def test_a_dry_run_lists_every_key_and_loads_and_writes_nothing(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stage, "load_base", lambda *a: pytest.fail("a base was loaded"))
    monkeypatch.chdir(tmp_path)
    assert run(["import", str(checkpoint), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = list(json.loads((checkpoint / INDEX).read_text())["weight_map"])
    theirs = list(load_file(checkpoint / "flux_controlnet" / "diffusion_pytorch_model.safetensors"))
    assert sorted(line.split()[-1] for line in lines) == sorted(names + theirs)
    assert any(re.fullmatch(rf"branch +{re.escape(Q)}", line) for line in lines) and not list(tmp_path.iterdir())


def test_what_a_trainer_left_is_listed_and_never_opened(system, copy, tmp_path, capsys):
    left = ["optimizer.pt", "rng_state.pth", "rng_state_3.pth", "scheduler.pt", "training_args.bin"]
    for name in left:
        (copy / name).write_bytes(b"no pickle")
    (copy / "flux_controlnet" / "random_states_0.pkl").write_bytes(b"no pickle")
    left.append("flux_controlnet/random_states_0.pkl")
    assert run(["import", str(copy), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ignored files"] == left
    ui = Heard()
    parts = import_checkpoint(system.recipe, copy, workspace=tmp_path, ui=ui)
    assert all(json.loads(part.file("import.json").read_text())["ignored files"] == left for part in parts)
    assert any("training_args.bin" in line for line in ui.lines)
    assert parts[0].id == import_checkpoint(system.recipe, copy, workspace=tmp_path)[0].id


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.bin.pt", "my_optimizer.pt", "training_args.ckpt"])
def test_other_pickles_beside_a_trainers_are_refused(system, copy, tmp_path, name):
    (copy / "training_args.bin").write_bytes(b"x")
    (copy / name).write_bytes(b"x")
    error = refused(system.recipe, copy, tmp_path)
    assert error.code == "BF-ART-008" and error.at == name


# ---- what is refused -------------------------------------------------------------------------------------------------


def lose(name):
    return lambda weights: weights.pop(name)


def put(name, *shape):
    return lambda weights: weights.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lose(Q), f"missing {Q}"),
        (lose("mask_token"), "missing mask_token"),
        (lose("learnable_pos_emb"), "missing learnable_pos_emb"),
        (lose("vision_head.bias"), "missing vision_head.bias"),
        (put(LAYER.replace("1", "7") + "vision_branch_mlp.up_proj.weight", 2, 2), "unexpected vision_language_model"),
        (put("vision_head.0.weight", 2), "unexpected vision_head.0.weight"),
        (put("vision_language_model.model.vision_branch_extra", 2), "unexpected vision_language_model.model.vision_b"),
        (put("bifrost.mask_token", 2), "unexpected bifrost.mask_token"),
        (put(Q, 128, 3), f"{Q} is (128, 3), not (128, 128)"),
    ],
)
def test_a_branch_that_does_not_fit_is_named(system, tmp_path, change, told):
    error = refused(system.recipe, published.publish(system, tmp_path / "p", change), tmp_path)
    assert error.code == "BF-ART-007" and error.exit_code == 5 and told in error.at


def test_the_command_line_stops_by_name_too(system, tmp_path, capsys):
    folder, recipe = published.publish(system, tmp_path / "p", lose(Q)), tmp_path / "r.yaml"
    published.save_recipe(system, recipe)
    assert run(["import", str(folder), "-o", str(tmp_path / "out"), "--recipe", str(recipe)]) == 5
    assert Q in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_another_width_or_another_grid_says_both(system, tmp_path):
    wide = published.publish(system, tmp_path / "wide", put("mask_token", 1, 1, 2048))
    error = refused(system.recipe, wide, tmp_path)
    assert "width 2048" in error.message and "has width 128" in error.message and "3B" in error.fix
    grid = published.publish(system, tmp_path / "grid", put("learnable_pos_emb", 1, 64, 128))
    error = refused(system.recipe, grid, tmp_path)
    assert "64 positions" in error.message and error.fix == "--set images.input_size=128"


def test_other_frozen_weights_stop_unless_nothing_paints_with_them(system, tmp_path):
    norm, words = "vision_language_model.model.norm.weight", "vision_language_model.model.embed_tokens.weight"
    other = published.publish(system, tmp_path / "other", lambda w: w.update({norm: w[norm] + 1}))
    error = refused(system.recipe, other, tmp_path)
    assert error.code == "BF-ART-004" and error.at == norm

    def enlarge(weights):
        weights[words] = torch.cat([weights[words], torch.ones(3, weights[words].shape[1])])
        weights["vision_language_model.lm_head.weight"] = torch.ones(7, weights[words].shape[1])
        weights["vision_language_model.model.rotary_emb.inv_freq"] = torch.ones(3)

    branch, _ = import_checkpoint(system.recipe, published.publish(system, tmp_path / "p", enlarge), workspace=tmp_path)
    frozen = json.loads(branch.file("import.json").read_text())["frozen"]
    assert words in frozen["equal"] and frozen["different"] == []
    assert frozen["different but unread"] == ["vision_language_model.lm_head.weight"]
    assert frozen["unknown"] == ["vision_language_model.model.rotary_emb.inv_freq"]


def break_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def double(folder: Path) -> None:
    weights = load_file(folder / SHARD)
    save_file(weights | {"mask_token": torch.ones(1)}, folder / SHARD)
    save_file(
        load_file(folder / SHARD.replace("2", "1", 1)) | {"mask_token": torch.ones(1)},
        folder / SHARD.replace("2", "1", 1),
    )


BROKEN = {
    "truncated": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-100]), "BF-ART-005", "damaged"),
    "a missing file": (lambda f: (f / SHARD).unlink(), "BF-ART-005", f"names {SHARD}, which is not there"),
    "a key that is nowhere": (lambda f: break_index(f, put_name), "BF-ART-005", "ghost (said to be in " + SHARD),
    "a key in two shards": (double, "BF-ART-005", "mask_token: both in"),
    "a key of no index": (lambda f: break_index(f, lambda m: m.pop("mask_token")), "BF-ART-005", "does not name: mask"),
    "an index of nothing": (lambda f: (f / INDEX).write_text("[]"), "BF-ART-005", "no weight_map"),
    "an index that leads out": (lambda f: break_index(f, lambda m: m.update(x="../x")), "BF-ART-005", "no file beside"),
    "no index": (lambda f: (f / INDEX).unlink(), "BF-ART-005", "3 weight files and no index"),
    "two indexes": (lambda f: shutil.copy(f / INDEX, f / f"b{INDEX}"), "BF-ART-005", "2 indexes"),
    "a pickle": (lambda f: (f / "pytorch_model.bin").write_bytes(b"x"), "BF-ART-008", "(.bin)"),
    "a pickle inside": (lambda f: (f / "flux_controlnet" / "a.pt").write_bytes(b"x"), "BF-ART-008", "(.pt)"),
}


def put_name(listed):
    listed["ghost"] = SHARD


@pytest.mark.parametrize("how", BROKEN)
def test_a_checkpoint_that_is_not_whole_stops_before_a_base_is_loaded(system, copy, tmp_path, monkeypatch, how):
    monkeypatch.setattr(stage, "load_base", lambda *a: pytest.fail("a base was loaded"))
    change, code, told = BROKEN[how]
    change(copy)
    error = refused(system.recipe, copy, tmp_path)
    assert error.code == code and told in error.message and error.exit_code == 5 and error.fix


def test_a_number_that_is_none_stops(system, tmp_path):
    folder = published.publish(system, tmp_path / "p", put("mask_token", 1, 1, 128))
    file = next(f for f in folder.glob("*.safetensors") if "mask_token" in load_file(f))
    save_file({**load_file(file), "mask_token": torch.full((1, 1, 128), float("nan"))}, file)
    assert "not finite" in refused(system.recipe, folder, tmp_path).message


def edit(folder: Path, **changes) -> None:
    path = folder / "flux_controlnet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "code", "told"),
    [
        ({"num_layers": 4, "num_single_layers": 1}, "BF-ART-007", "config.json: 4 double + 1 single"),
        ({"_class_name": "SD3ControlNetModel"}, "BF-ART-007", "not of a FLUX ControlNet"),
        ({"attention_head_dim": "wide"}, "BF-ART-005", "makes no ControlNet"),
        ({"joint_attention_dim": 32}, "BF-ART-007", "context_embedder.weight is (128, 64), not (128, 32)"),
    ],
)
def test_a_controlnet_that_is_not_its_config_is_named(system, copy, tmp_path, changes, code, told):
    edit(copy, **changes)
    error = refused(system.recipe, copy, tmp_path)
    assert error.code == code and told in str(error)


def test_a_controlnet_of_another_flux_or_less_a_key(system, copy, tmp_path):
    file = copy / "flux_controlnet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: t for name, t in weights.items() if name != "up_sampling_block.bn2.running_mean"}, file)
    assert "missing up_sampling_block.bn2.running_mean" in refused(system.recipe, copy, tmp_path).at
    save_file({**weights, "context_embedder.weight": torch.zeros(128, 32)}, file)
    edit(copy, joint_attention_dim=32)
    error = refused(system.recipe, copy, tmp_path)
    assert error.code == "BF-ART-004" and "text width 32, not 64" in error.at


def test_a_base_that_is_not_here_says_so(system, checkpoint, tmp_path):
    models = system.recipe.models
    for name in ("mllm", "diffusion"):
        recipe = system.recipe.model_copy(update={"models": models.model_copy(update={name: "./nowhere"})})
        error = refused(recipe, checkpoint, tmp_path, EnvironmentProblem)
        assert "nowhere" in error.message and error.exit_code == 3
    assert "without flux_controlnet/" in error.fix


def test_other_families_of_models_are_refused(system, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(ModelLoader, "diffusion", lambda *a, **k: SimpleNamespace(family="SD3"))
    assert "not of FLUX" in refused(system.recipe, checkpoint, tmp_path).message
    other = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(model_type="qwen3_vl")))
    monkeypatch.setattr(ModelLoader, "mllm", lambda *a, **k: other)
    error = refused(system.recipe, checkpoint, tmp_path)
    assert "not of Qwen2.5-VL" in error.message and error.code == "BF-ART-009"


# ---- the published code's numbers, through an import -----------------------------------------------------------------


def base(folder: Path, config: dict, weights: dict, width: int) -> str:
    """The frozen MLLM of the vectors as a model folder, with a tokenizer that is not under test."""
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    assert model.config.text_config.hidden_size == width
    processor = tiny_models.image_processor()
    processor.patch_size = config["vision_config"]["patch_size"]
    parts = SimpleNamespace(model=model, tokenizer=tiny_models.qwen_tokenizer(["a"]), image_processor=processor)
    return str(save_mllm(parts, folder))


@pytest.mark.parametrize("name", ["branch_n16", "decode_n16"])
def test_parity_of_an_imported_branch(tmp_path, monkeypatch, name):
    config = json.loads((VECTORS / name / "config.json").read_text())
    weights = load_file(VECTORS / name / "model.safetensors")
    mllm = base(tmp_path / "mllm", config["qwen2_5_vl"], parity_mllm.split_published(weights)[1], 64)
    folder = published.save_shards(tmp_path / "published", weights)
    recipe = Recipe(models=Models(mllm=mllm, dtype="float32"), images=Images(input_size=112))
    (branch,) = import_checkpoint(recipe, folder, workspace=tmp_path / "runs")
    check = parity_mllm.check_branch if name == "branch_n16" else parity_mllm.check_decode
    before = check(VECTORS / name)
    imported = load_mllm(mllm, CPU), load_branch(branch, CPU).requires_grad_(True)
    monkeypatch.setattr(parity_mllm, "_models", lambda *a: imported)
    assert check(VECTORS / name) == before and all(error <= limit for _, error, limit in before)


def test_parity_of_an_imported_controlnet(tmp_path, monkeypatch):
    vectors = VECTORS / "flux_denoise"
    config, weights = json.loads((vectors / "config.json").read_text()), load_file(vectors / "model.safetensors")
    text = json.loads((VECTORS / "branch_n16" / "config.json").read_text())["qwen2_5_vl"]
    small = {**text, "hidden_size": 24, "num_attention_heads": 1, "num_key_value_heads": 1,
             "rope_scaling": {"mrope_section": [4, 4, 4], "type": "mrope"},
             "vision_config": {**text["vision_config"], "out_hidden_size": 24}}  # fmt: skip
    mllm = base(tmp_path / "mllm", small, {}, 24)
    diffusion = parity_flux._diffusion(config, weights)
    flux = replace(tiny_painter(), transformer=diffusion.transformer, scheduler=diffusion.scheduler)
    recipe = Recipe(models=Models(mllm=mllm, diffusion=str(save_painter(flux, tmp_path / "flux")), dtype="float32"),
                    images=Images(input_size=112), generate=Generate())  # fmt: skip
    part = parity_flux._part(weights, "controlnet.")
    stock = {key: value for key, value in config["controlnet"].items() if key != "control_width"}
    published.save_controlnet(tmp_path / "published" / "flux_controlnet", stock, part)
    (controlnet,) = import_checkpoint(recipe, tmp_path / "published", workspace=tmp_path / "runs")
    before = parity_flux.check_flux_denoise(vectors)
    monkeypatch.setattr(parity_flux, "_controlnet", lambda *a: load_controlnet(controlnet, CPU))
    assert parity_flux.check_flux_denoise(vectors) == before and all(error <= limit for _, error, limit in before)
    assert isinstance(controlnet, Artifact) and controlnet.identity["channels"] == 24
