"""generate.offload: the same bytes, never both halves in memory, layers really elsewhere, no sketch made twice."""

from __future__ import annotations

import gc
import os
import signal
import weakref
from pathlib import Path

import pytest
import torch
from fixtures_flux import System, save_system

from bifrost_cli.errors import OutOfMemory, Stopped
from bifrost_cli.generation.generate import generate
from bifrost_cli.generation.reconstruct import reconstruct
from bifrost_cli.generation.stages import BifrostDecoder, BifrostPrior
from bifrost_cli.loading.loaders import ModelLoader

PROMPTS = ["a star", "a red circle"]
APART = ("model", "sequential")


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> System:
    return save_system(tmp_path_factory.mktemp("system"), plan=True, branch_guidance=2.0)


@pytest.fixture(scope="module")
def plain(system: System, tmp_path_factory: pytest.TempPathFactory):
    return render(system, tmp_path_factory.mktemp("plain") / "out")


def render(system: System, output: Path, offload: str = "none", prompts=PROMPTS, **options):
    parts = {"branch": system.branch.path, "controlnet": system.controlnet.path, "device": "cpu"}
    return generate(told(system, offload), prompts, output=output, save_latents=output.suffix == "", **parts, **options)


def told(system: System, offload: str):
    wanted = system.recipe.generate.model_copy(update={"offload": offload})
    return system.recipe.model_copy(update={"generate": wanted})


@pytest.mark.parametrize("offload", APART)
def test_the_same_pictures_and_the_same_artifact(system: System, plain, tmp_path: Path, offload: str) -> None:
    made = render(system, tmp_path / "out", offload)
    assert made.id == plain.id and made.files == plain.files
    assert not (made.path / "work").exists() and not made.strays()
    alone = render(system, tmp_path / "alone.png", offload, PROMPTS[0])
    assert alone.read_bytes() == plain.file("00000.png").read_bytes()


@pytest.mark.parametrize("offload", ["none", *APART])
def test_the_mllm_is_gone_before_the_painter_comes(system: System, tmp_path: Path, monkeypatch, offload: str) -> None:
    alive: list[weakref.ref] = []
    load_mllm, load_diffusion = ModelLoader.mllm, ModelLoader.diffusion

    def load_and_watch(*args, **options):
        mllm = load_mllm(*args, **options)
        alive.append(weakref.ref(mllm.model))
        return mllm

    def look_and_load(*args, **options):
        gc.collect()
        assert (alive[0]() is None) == (offload != "none")
        return load_diffusion(*args, **options)

    monkeypatch.setattr(ModelLoader, "mllm", load_and_watch)
    monkeypatch.setattr(ModelLoader, "diffusion", look_and_load)
    render(system, tmp_path / "out.png", offload, "a star")
    assert len(alive) == 1


def test_layers_are_nowhere_between_calls_and_the_rest_stays(system: System) -> None:
    recipe = told(system, "sequential")
    loader = ModelLoader(recipe.models, "cpu", "sequential")
    prior = BifrostPrior(recipe, system.branch, loader)
    decoder_half = BifrostDecoder(recipe, system.controlnet, loader)
    predict = prior.predict("a star", 0)
    decoder_half.render("a star", predict.latents_PC, 0)
    for module in (
        prior.mllm.decoder.layers, prior.branch.decoder.layers, decoder_half.diffusion.transformer.transformer_blocks,
        decoder_half.diffusion.text_encoder_2.encoder.block, decoder_half.controlnet.transformer_blocks,
    ):  # fmt: skip
        assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    for module in (
        prior.mllm.decoder.embed_tokens,
        prior.branch.vision_head,
        decoder_half.diffusion.transformer.proj_out,
    ):
        assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}


def test_an_interrupted_run_sketches_nothing_twice(system: System, plain, tmp_path: Path, monkeypatch) -> None:
    predict, sketched = BifrostPrior.predict_batch, []

    def sketch_and_stop(self, prompts, seeds, **options):
        sketched.extend(prompts)
        if len(sketched) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return predict(self, prompts, seeds, **options)

    monkeypatch.setattr(BifrostPrior, "predict_batch", sketch_and_stop)
    with pytest.raises(Stopped, match="0 of 2"):
        render(system, tmp_path / "out", "model")
    (kept,) = (tmp_path / "out" / "work" / "sketches").iterdir()
    assert render(system, tmp_path / "out", "model").files == plain.files
    assert sketched == PROMPTS and not kept.exists()


def test_a_lack_of_memory_names_the_next_offload(system: System, tmp_path: Path, monkeypatch) -> None:
    def hungry(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(BifrostDecoder, "denoise_batch", hungry)
    for offload, stronger in (("none", "model"), ("model", "sequential")):
        with pytest.raises(OutOfMemory) as found:
            render(system, tmp_path / "out.png", offload, "a star")
        assert f"generate.offload={stronger}" in found.value.fix


def test_reconstruct_offloads_too(system: System, plain, tmp_path: Path) -> None:
    options = {"controlnet": system.controlnet.path, "device": "cpu"}
    made = [reconstruct(told(system, offload), plain.file("00000.png"), output=tmp_path / f"{offload}.png", **options)
            for offload in ("none", "sequential")]  # fmt: skip
    assert made[0].read_bytes() == made[1].read_bytes()
