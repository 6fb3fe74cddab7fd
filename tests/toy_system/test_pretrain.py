"""`shapes pretrain` with a handful of steps: every folder is what its library reads, and every part is made once."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_plans import read_plan

from bifrost_cli import load_recipe
from bifrost_cli.artifacts import Artifact
from bifrost_cli.errors import UsageError
from bifrost_cli.shapes.captions import held_out, sample_prompt, sample_scene
from bifrost_cli.shapes.words import cell_classes
from bifrost_cli.toy_system.curricula import CURRICULA
from bifrost_cli.toy_system.pretrain import PARTS, pretrain
from bifrost_cli.toy_system.tasks import MllmTask

FEW = {"steps": 3, "batch_size": 8, "warmup": 1, "checkpoint_every": 2}
SETS = [
    f"{part}.{key}={value}"
    for part in ("shapes.vae", "shapes.mllm", "shapes.open_clip", "shapes.flux")
    for key, value in FEW.items()
]
SETS += [f"{part}.train.{key}={value}" for part in ("branch", "controlnet") for key, value in FEW.items()]
SETS += [f"{part}.train.{key}=0" for part in ("branch", "controlnet") for key in ("validate_every", "sample_every")]
SETS += ["shapes.rows=64", "latents.shard_rows=64", "latents.chunk_rows=16"]


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    return pretrain(load_recipe("shapes", SETS), output=tmp_path_factory.mktemp("pretrain") / "system")


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_libraries_read_every_folder(system):
    import open_clip
    from diffusers import FluxPipeline
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    pipeline = FluxPipeline.from_pretrained(system / "flux", torch_dtype=torch.float32)
    image = pipeline(
        "a red circle", height=64, width=64, num_inference_steps=1, max_sequence_length=24, output_type="np"
    ).images[0]
    assert image.shape == (64, 64, 3) and np.isfinite(image).all()
    assert AutoModelForImageTextToText.from_pretrained(system / "mllm").config.model_type == "qwen2_5_vl"
    assert len(AutoTokenizer.from_pretrained(system / "mllm")("redcircle ab", add_special_tokens=False).input_ids) == 2
    assert open_clip.create_model(f"local-dir:{system / 'open_clip'}").visual.image_size in (64, (64, 64))


def test_weights_are_half_precision_and_carry_a_card(system):
    from safetensors.torch import load_file

    for file in [*system.glob("mllm/*.safetensors"), *system.glob("flux/*/*.safetensors")]:
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
        card = json.loads((file.parent / "bifrost.json").read_text())
        assert card["train"]["steps"] == 3 and card["cost"]["samples"] == 24 and len(card["weights_sha256"]) == 64


def test_branch_and_controlnet_are_artifacts(system):
    for kind in ("branch", "controlnet"):
        artifact = Artifact.open(system / kind)
        artifact.check()
        assert artifact.kind == kind and artifact.info["recipe"]["name"] == "shapes"


def test_what_is_finished_is_not_made_again(system):
    before = stamps(system)
    pretrain(load_recipe("shapes", SETS), output=system)
    assert stamps(system) == before


def test_unknown_and_unready_parts_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no such part: vea"):
        pretrain(load_recipe("shapes", SETS), parts=["vea"], output=tmp_path)
    with pytest.raises(UsageError, match="no finished vae"):
        pretrain(load_recipe("shapes", SETS), parts=["flux"], output=tmp_path)
    assert next(iter(PARTS)) == "vae" and list(tmp_path.iterdir()) == []


def test_rows_of_the_mllm_never_show_a_held_out_prompt(system):
    from transformers import AutoImageProcessor, AutoTokenizer

    from bifrost_cli.toy_system import tiny_models

    tokenizer = AutoTokenizer.from_pretrained(system / "mllm")
    task = MllmTask(
        tiny_models.mllm(tokenizer),
        tokenizer,
        AutoImageProcessor.from_pretrained(system / "mllm"),
        CURRICULA["shapes"],
        "Plan a picture of {prompt}",
        0,
        64,
    )
    for step in range(20):
        rows = task.batch(step, 0)["plan"]
        for ids, learnt in zip(rows["ids"], rows["learnt"], strict=True):
            asked = tokenizer.decode(ids[~learnt]).split("Plan a picture of ")[1].split("<|im_end|>")[0]
            assert not held_out(asked)
            read_plan(tokenizer.decode(ids[learnt]).split("<|im_end|>")[0].strip())


def test_filled_cells_hold_every_thing():
    from bifrost_cli.toy_system.curricula import filled

    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = sample_scene(rng, sample_prompt(rng))
        words = filled(rng, scene).split()
        assert len(words) == 16 and sum(word != "none" for word in words[1::2]) == (cell_classes(scene) > 0).sum()


def test_the_second_world_is_made_the_same_way(tmp_path):
    few = [value for value in SETS if not value.startswith(("shapes.open_clip", "shapes.rows"))]
    sets = [*few, "shapes.rows=32", "branch.codes=8", "branch.code_levels=2", "controlnet.train.batch_size=4"]
    parts = ["vae", "mllm", "flux", "latents", "branch", "controlnet"]
    folder = pretrain(load_recipe("shapes-2", sets), parts=parts, output=tmp_path / "system")
    branch = Artifact.open(folder / "branch")
    config = json.loads((branch.path / "config.json").read_text())
    assert (config["patches"], config["channels"], config["codes"], config["code_levels"]) == (64, 160, 8, 2)
    assert Artifact.open(folder / "controlnet").kind == "controlnet"
