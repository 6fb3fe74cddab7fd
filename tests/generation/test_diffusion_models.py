"""Painters other than the built-in one, through every stage: SD3, and FLUX in the layouts of dev and schnell."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from fixtures_flux import PARTS as FLUX_PARTS
from fixtures_flux import save_mllm, save_part, save_system, tiny_painter
from fixtures_loading import load_controlnet, load_diffusion, load_mllm, load_vae
from fixtures_mllm import random_branch, random_mllm
from fixtures_plugins import install
from fixtures_sd3 import save_sd3, tiny_sd3
from fixtures_stage_training import mllm_store

from bifrost_cli import extract_latents, generate, train_controlnet
from bifrost_cli.artifacts import Artifact
from bifrost_cli.config.schema import Branch, ControlNet, Generate, Images, Latents, Models, Recipe, Train
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.data.png import png_bytes, png_pixels
from bifrost_cli.errors import ArtifactError, EnvironmentProblem, RecipeError, Stopped
from bifrost_cli.generation.reconstruct import reconstruct
from bifrost_cli.models.diffusion.flux import FluxModel
from bifrost_cli.models.diffusion.sd3 import Sd3Model
from bifrost_cli.models.encoders import MllmEncoder
from bifrost_cli.runtime.ui import Ui

CPU = torch.device("cpu")
GROUP = "bifrost.diffusion_models"
TRAIN = {"steps": 6, "batch_size": 4, "lr": 1e-3, "warmup": 1, "precision": "fp32", "checkpoint_every": 6,
         "validate_every": 3, "validation_rows": 2}  # fmt: skip


class Heard(Ui):
    """Keeps what is said, and asks for a stop at a line that begins with `stop_at`."""

    def __init__(self, stop_at: str | None = None) -> None:
        self.lines: list[str] = []
        self.stop_at = stop_at

    def say(self, line: str) -> None:
        self.lines.append(line)
        if self.stop_at and line.startswith(self.stop_at):
            os.kill(os.getpid(), signal.SIGTERM)


def recipe(folder: Path, diffusion: Path, single_blocks: int = 0, sample_every: int = 0, **settings: Any) -> Recipe:
    return Recipe(
        name="test",
        models=Models(mllm=str(folder / "mllm"), diffusion=str(diffusion), dtype="float32", diffusion_text_tokens=8),
        images=Images(input_size=64, output_size=64),
        latents=Latents(shard_rows=16, chunk_rows=8, batch_size=8),
        branch=Branch(max_text_tokens=40),
        controlnet=ControlNet(
            double_blocks=1, single_blocks=single_blocks, train=Train(**TRAIN, sample_every=sample_every)
        ),
        generate=Generate(**{"decode_steps": 2, "steps": 2, **settings}),
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mllm/, sd3/, a branch for that MLLM, and FLUX twice: dev/ (guidance, dynamic shift) and schnell/ (neither)."""
    folder = tmp_path_factory.mktemp("bases")
    mllm = random_mllm()
    save_mllm(mllm, folder / "mllm")
    save_sd3(tiny_sd3(), folder / "sd3")
    shared = {"encoder": MllmEncoder(mllm, 64).identity, "grid": [4, 4], "channels": mllm.width}
    branch = random_branch(mllm)
    save_part(folder / "branch", "branch", branch, branch.config, {**shared, "mllm": mllm.weights_hash()})
    for name, guided in (("dev", True), ("schnell", False)):
        save_flux(folder / name, guided)
    return folder


def save_flux(folder: Path, guided: bool) -> None:
    """The layout of the hub, by the stock pipeline; schnell's scheduler has shift 1 and no dynamic shift."""
    diffusion = tiny_painter()
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel.from_config({**diffusion.transformer.config, "guidance_embeds": guided})
    shift = FlowMatchEulerDiscreteScheduler(shift=3.0 if guided else 1.0, use_dynamic_shifting=guided)
    parts = {part: getattr(diffusion, part) for part in FLUX_PARTS} | {"transformer": transformer, "scheduler": shift}
    FluxPipeline(**parts).save_pretrained(folder)


@pytest.fixture(scope="module")
def chain(bases: Path) -> tuple[Recipe, Artifact, Artifact]:
    """Latents, and a ControlNet trained on them without interruption, of SD3."""
    told = recipe(bases, bases / "sd3", sample_every=6)
    latents = extract_latents(told, source="shapes:20:0", output=bases / "latents", device="cpu")
    options = {"latents": latents.path, "output": bases / "controlnet", "device": "cpu"}
    return told, latents, train_controlnet(told, **options)


# ---- the whole chain on SD3 ------------------------------------------------------------------------------------------


def test_sd3_latents_and_controlnet(chain: tuple[Recipe, Artifact, Artifact]) -> None:
    told, latents, made = chain
    store, vae = LatentsStore.open(latents), load_vae(told.models.diffusion, CPU)
    assert store.attributes["painter"]["shift_factor"] == vae.config.shift_factor == 0.06
    assert store.vae([0]).shape == (1, 16, 16, 16)
    assert made.identity["painter"] == tiny_sd3().weights_hash() and made.verify() == []
    assert "samples/step-0000006.png" in made.files and set(made.info["metrics"]) >= {"loss", "loss_shuffled"}
    assert load_controlnet(made, CPU).state_dict()["pos_embed_input.proj.weight"].abs().max() > 0


def test_an_interrupted_sd3_training_ends_in_the_same_bytes(chain, tmp_path: Path) -> None:
    told, latents, made = chain
    options = {"latents": latents.path, "output": tmp_path / "c", "device": "cpu"}
    with pytest.raises(Stopped):
        train_controlnet(told, **options, ui=Heard(stop_at="step 3/6  validation"))
    assert train_controlnet(told, **options).files == made.files


def test_sd3_paints_from_a_prompt_and_from_a_picture(chain, bases: Path, tmp_path: Path) -> None:
    told, _, made = chain
    parts = {"controlnet": made.path, "device": "cpu"}
    first, again = (
        generate(told, "a red circle", output=tmp_path / f"{name}.png", branch=bases / "branch", **parts).read_bytes()
        for name in "ab"
    )
    assert first == again and png_pixels(first).shape == (64, 64, 3)
    plain = told.model_copy(update={"generate": told.generate.model_copy(update={"guidance_scale": 1.0})})
    other = generate(plain, "a red circle", output=tmp_path / "c.png", branch=bases / "branch", **parts).read_bytes()
    assert (png_pixels(other) != png_pixels(first)).any()
    assert png_pixels(reconstruct(told, tmp_path / "a.png", output=tmp_path / "d.png", **parts).read_bytes()).any()


def test_single_blocks_of_sd3_are_refused(chain, tmp_path: Path) -> None:
    told, latents, _ = chain
    wrong = told.model_copy(update={"controlnet": told.controlnet.model_copy(update={"single_blocks": 1})})
    with pytest.raises(RecipeError, match="no single blocks"):
        train_controlnet(wrong, latents=latents.path, output=tmp_path / "c", device="cpu")
    assert not (tmp_path / "c").exists()


# ---- FLUX, dev and schnell -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_flux_trains_and_paints_in_both_layouts(bases: Path, tmp_path: Path, name: str) -> None:
    told = recipe(bases, bases / name, single_blocks=1, guidance_scale=2.5)
    latents = mllm_store(tmp_path / "latents")
    heard = Heard()
    made = train_controlnet(told, latents=latents.path, output=tmp_path / "c", device="cpu", ui=heard)
    ignored = [line for line in heard.lines if "guidance_scale 2.5 changes nothing" in line]
    assert len(ignored) == (name == "schnell")
    assert load_controlnet(made, CPU).config.guidance_embeds == (name == "dev")
    heard, parts = Heard(), {"branch": bases / "branch", "controlnet": made.path, "device": "cpu"}
    first = generate(told, "a star", output=tmp_path / "a.png", ui=heard, **parts).read_bytes()
    assert sum("guidance_scale" in line for line in heard.lines) == (name == "schnell")
    more = told.model_copy(update={"generate": told.generate.model_copy(update={"guidance_scale": 4.0})})
    other = generate(more, "a star", output=tmp_path / "b.png", **parts).read_bytes()
    assert (png_pixels(first) == png_pixels(other)).all() == (name == "schnell")


def test_guidance_is_only_spoken_of_when_it_is_given(bases: Path, tmp_path: Path) -> None:
    system, heard = save_system(tmp_path), Heard()
    parts = {"branch": system.branch.path, "controlnet": system.controlnet.path, "device": "cpu"}
    generate(system.recipe, "a star", output=tmp_path / "a.png", ui=heard, **parts)
    assert not any("guidance_scale" in line for line in heard.lines)


@pytest.mark.parametrize("name", ["schnell", "sd3"])
def test_more_tokens_than_the_painter_knows_are_refused(bases: Path, tmp_path: Path, name: str) -> None:
    models = recipe(bases, bases / name).models.model_copy(update={"diffusion_text_tokens": 257})
    told = recipe(bases, bases / name).model_copy(update={"models": models})
    with pytest.raises(RecipeError, match="257") as caught:
        generate(told, "a star", output=tmp_path / "a.png", branch=bases / "branch", device="cpu",
                 controlnet=save_system(tmp_path / "system").controlnet.path)  # fmt: skip
    assert caught.value.code == "BF-RECIPE-005" and "diffusion_text_tokens=256" in caught.value.fix


# ---- what does not fit -----------------------------------------------------------------------------------------------


def test_a_controlnet_of_flux_is_refused_by_sd3_and_the_other_way_round(chain, bases: Path, tmp_path: Path) -> None:
    told, _, of_sd3 = chain
    of_flux = save_system(tmp_path / "system").controlnet
    both = ((told, of_flux, "is for FLUX", "is SD3"), (recipe(bases, bases / "dev"), of_sd3, "is for SD3", "is FLUX"))
    for one, controlnet, theirs, ours in both:
        parts = {"controlnet": controlnet.path, "device": "cpu"}
        with pytest.raises(ArtifactError) as caught:
            generate(one, "a star", output=tmp_path / "a.png", branch=bases / "branch", **parts)
        text = str(caught.value)
        assert caught.value.code == "BF-ART-004" and theirs in text and ours in text
        assert controlnet.id in text and one.models.diffusion in text
    (tmp_path / "a.png").write_bytes(png_bytes(np.zeros((64, 64, 3), np.uint8)))
    with pytest.raises(ArtifactError, match="is for FLUX"):
        reconstruct(told, tmp_path / "a.png", output=tmp_path / "b.png", controlnet=of_flux.path, device="cpu")


def test_the_class_decides_the_family(bases: Path) -> None:
    assert isinstance(load_diffusion(str(bases / "sd3"), CPU), Sd3Model)
    assert isinstance(load_diffusion(str(bases / "schnell"), CPU), FluxModel)
    assert (bases / "sd3" / "transformer" / "diffusion_pytorch_model.safetensors.index.json").exists()


def _rename(folder: Path) -> None:
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "UNet2DConditionModel"}))


def _cut(folder: Path) -> None:
    shard = sorted((folder / "transformer").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-200])


DAMAGE = {
    "a part": (lambda f: shutil.rmtree(f / "text_encoder_3"), "BF-ART-010", "text_encoder_3"),
    "a tokenizer": (lambda f: shutil.rmtree(f / "tokenizer_2"), "BF-ART-010", "tokenizer_2"),
    "a shard": (lambda f: sorted((f / "transformer").glob("*.safetensors"))[1].unlink(), "BF-ART-010", "-00002-of-"),
    "all weights": (lambda f: [path.unlink() for path in (f / "vae").glob("*.safetensors*")], "BF-ART-010", "vae"),
    "half a shard": (_cut, "BF-ART-008", "transformer"),
    "another class": (_rename, "BF-ART-009", "UNet2DConditionModel"),
    "another encoder": (
        lambda f: shutil.copy(f / "text_encoder_3" / "config.json", f / "text_encoder_2"), "BF-ART-009", "T5Encoder",
    ),
    "everything": (lambda f: [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in f.iterdir()], "BF-ART-009",
                   "no diffusion model"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_named_with_what_it_lacks(bases: Path, tmp_path: Path, kind: str) -> None:
    damage, code, named = DAMAGE[kind]
    damage(shutil.copytree(bases / "sd3", tmp_path / "sd3"))
    with pytest.raises(ArtifactError) as caught:
        load_diffusion(str(tmp_path / "sd3"), CPU)
    assert caught.value.code == code and named in str(caught.value) and caught.value.fix


# ---- families of other packages --------------------------------------------------------------------------------------

PLUGIN = """
from diffusers import FluxTransformer2DModel
from bifrost_cli.models.diffusion.flux import FluxModel


class OtherTransformer(FluxTransformer2DModel):
    pass


class OtherModel(FluxModel):
    family = "Other"
    parts = {**FluxModel.parts, "transformer": "added_diffusion:OtherTransformer"}

    def controlnet_config(self, controlnet):
        return {"family": "Other", **super().controlnet_config(controlnet)}

    @classmethod
    def controlnet_from_config(cls, config):
        return FluxModel.controlnet_from_config({**config, "family": "FLUX"})
"""


@pytest.fixture
def other(bases: Path, tmp_path: Path, monkeypatch) -> Path:
    """A pipeline's folder whose transformer only a package knows that is not installed yet."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    (tmp_path / "site").mkdir()
    folder = Path(shutil.copytree(bases / "dev", tmp_path / "other"))
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "OtherTransformer"}))
    yield folder
    sys.modules.pop("added_diffusion", None)


def test_a_package_adds_a_family(bases: Path, other: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no diffusion model of a known family"):
        load_diffusion(str(other), CPU)
    install(tmp_path / "site", "added_diffusion", {"Other": "added_diffusion:OtherModel"}, PLUGIN, GROUP)
    diffusion = load_diffusion(str(other), CPU)
    assert diffusion.family == "Other" and type(diffusion.transformer).__name__ == "OtherTransformer"
    assert type(load_diffusion(str(bases / "dev"), CPU)) is FluxModel
    told, options = recipe(bases, other), {"workspace": tmp_path / "runs", "device": "cpu"}
    extract_latents(told, source="shapes:24", output=tmp_path / "runs" / "latents", **options)
    made = train_controlnet(told, output=tmp_path / "runs" / "controlnet", **options)
    assert json.loads(made.file("config.json").read_text())["family"] == "Other"
    parts = {"branch": bases / "branch", "controlnet": made.path, "device": "cpu"}
    assert generate(told, "a star", output=tmp_path / "a.png", **parts).exists()
    with pytest.raises(ArtifactError, match="is for Other, and .* is FLUX"):
        generate(recipe(bases, bases / "dev"), "a star", output=tmp_path / "b.png", **parts)


def test_a_package_that_does_not_load_fails_the_models_that_need_it(bases: Path, other: Path, tmp_path: Path) -> None:
    install(tmp_path / "site", "added_diffusion", {"Other": "added_diffusion:OtherModel"}, "1/0", GROUP)
    with pytest.raises(EnvironmentProblem, match="plug-in Other of added_diffusion") as caught:
        load_diffusion(str(other), CPU)
    assert caught.value.code == "BF-ENV-004" and caught.value.exit_code == 3 and caught.value.fix
    assert load_diffusion(str(bases / "dev"), CPU).family == "FLUX"


def test_a_config_does_not_choose_the_attention(bases: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bases / "mllm", tmp_path / "mllm"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "eager"}))
    assert load_mllm(str(folder), CPU).model.config._attn_implementation == "sdpa"
