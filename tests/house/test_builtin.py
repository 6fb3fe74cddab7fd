"""The built-in system as it ships: its size, its cards, and what it can do. No training here; see test_chain."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_loading import load_mllm

from bifrost_cli import generate, load_recipe
from bifrost_cli.artifacts import Artifact
from bifrost_cli.config.schema import Train
from bifrost_cli.data.png import png_pixels
from bifrost_cli.generation.reconstruct import reconstruct
from bifrost_cli.shapes.captions import CATEGORIES, held_out, held_out_prompts, sample_prompt, sample_scene
from bifrost_cli.shapes.checker import check
from bifrost_cli.shapes.draw import draw

BUILTIN = Path(__file__).parents[2] / "bifrost_cli" / "builtin"
BASES = ("mllm", "open_clip", "flux/vae", "flux/transformer", "flux/text_encoder", "flux/text_encoder_2")
PROMPT = "a red circle above a blue square"


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """24 held-out prompts, four a category, one image each."""
    prompts = held_out_prompts(24, seed=11)
    folder = tmp_path_factory.mktemp("builtin")
    made = generate(load_recipe(), [prompt.text for prompt in prompts], output=folder / "samples", workspace=folder)
    return prompts, made


def test_weights_stay_under_25_megabytes():
    total = sum(path.stat().st_size for path in BUILTIN.rglob("*") if path.is_file())
    assert total < 25_000_000


def test_every_part_says_how_it_was_made():
    for base in BASES:
        card = json.loads((BUILTIN / base / "bifrost.json").read_text())
        assert len(card["made"]["commit"]) == 40 and card["made"]["when"] and card["made"]["device"] == "cpu"
        assert card["train"]["seed"] == 0 and card["cost"]["seconds"] > 0
    for kind in ("branch", "controlnet"):
        artifact = Artifact.open(BUILTIN / kind)
        artifact.check()
        assert len(artifact.manifest["made"]["commit"]) == 40
        assert artifact.info["recipe"]["name"] == "shapes"


def test_cards_name_the_weights_that_are_there():
    card = json.loads((BUILTIN / "mllm" / "bifrost.json").read_text())
    from bifrost_cli.data.safetensors_io import load_tensors, weights_hash

    weights, _ = load_tensors(BUILTIN / "open_clip" / "open_clip_model.safetensors")
    assert weights_hash(weights) == json.loads((BUILTIN / "open_clip" / "bifrost.json").read_text())["weights_sha256"]
    assert card["train"].pop("tensorboard") is False  # its name before report_to
    assert Train(**card["train"]) == load_recipe("shapes").shapes.mllm  # a key that came later is at its default


def test_held_out_pictures_are_right(samples):
    prompts, made = samples
    assert all(held_out(prompt.text) for prompt in prompts)
    assert {prompt.category for prompt in prompts} == set(CATEGORIES)
    verdicts = [check(p, png_pixels(made.file(f"{i:05d}.png").read_bytes())) for i, p in enumerate(prompts)]
    wrong = [f"{p.text}: {v.why}" for p, v in zip(prompts, verdicts, strict=True) if not v.right]
    assert len(wrong) <= 4, wrong  # 0.90 is shipped: 5 or more wrong of 24 happen once in 25 such draws


def test_alone_or_in_a_batch_the_same_bytes(samples, tmp_path):
    prompts, made = samples
    alone = generate(load_recipe(), prompts[5].text, output=tmp_path / "alone.png", workspace=tmp_path)
    assert alone.read_bytes() == made.file("00005.png").read_bytes()


def test_reconstruction_keeps_the_picture(tmp_path):
    from PIL import Image

    rng, right = np.random.default_rng(3), 0
    for i in range(10):
        prompt = sample_prompt(rng, split="held_out")
        Image.fromarray(draw(sample_scene(rng, prompt))).save(tmp_path / f"{i}.png")
        again = tmp_path / f"{i}-again.png"
        reconstruct(load_recipe(), tmp_path / f"{i}.png", output=again, workspace=tmp_path)
        right += check(prompt, png_pixels(again.read_bytes())).right
    assert right >= 8  # 0.95 is shipped: fewer happen once in a hundred such draws


def test_the_mllm_answers_about_pictures():
    mllm, rng, right = load_mllm("builtin:mllm", torch.device("cpu"), torch.float32), np.random.default_rng(5), 0
    for _ in range(12):
        scene = sample_scene(rng, sample_prompt(rng, split="held_out", category="colors"))
        right += mllm.answer(draw(scene), f"what colour is the {scene.things[0].shape}?").text == scene.things[0].colour
    assert right >= 10


def test_a_first_picture_from_a_cold_start_in_seconds(tmp_path):
    command = [sys.executable, "-m", "bifrost_cli", "generate", PROMPT, "-o", "out.png"]
    before = os.times()
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    used = os.times().children_user - before.children_user
    assert check(PROMPT, png_pixels((tmp_path / "out.png").read_bytes())).right
    assert used < 40  # CPU seconds, imports included; a bound against accidents, not a measurement


def test_the_same_seed_gives_the_same_picture_and_another_another(tmp_path):
    files = [generate(load_recipe(), PROMPT, output=tmp_path / f"{i}.png", seed=s) for i, s in enumerate((7, 7, 8))]
    one, two, three = (hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    assert one == two != three
