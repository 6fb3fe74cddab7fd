"""8- and 4-bit weights: really smaller, near the full model, and what cannot be done with them is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_flux import System, save_system, tiny_controlnet, tiny_painter
from fixtures_mllm import PATCHES, normal, random_mllm
from fixtures_stage_training import mllm_store, recipe
from torch import nn

from bifrost_cli.data.safetensors_io import load_tensors
from bifrost_cli.errors import EnvironmentProblem, RecipeError
from bifrost_cli.generation.generate import generate
from bifrost_cli.generation.stages import BifrostPrior
from bifrost_cli.loading.loaders import ModelLoader
from bifrost_cli.loading.offload import bytes_of, layers_of, quantize_layers
from bifrost_cli.training.train_branch import train_branch
from bifrost_cli.training.train_controlnet import train_controlnet

KINDS = ("int8", "nf4")
# Cosine to the full output that is asked for: random weights of 128 numbers a row are harder than trained ones.
NEAR = {"int8": 0.999, "nf4": 0.95}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> System:
    return save_system(tmp_path_factory.mktemp("system"))


def with_weights(wanted, weights: str, **settings):
    models = wanted.models.model_copy(update={"weights": weights})
    return wanted.model_copy(update={"models": models, "generate": wanted.generate.model_copy(update=settings)})


def linear_bytes(module: nn.Module) -> int:
    """Bytes of all matrices in layers, and of the scales that belong to them."""
    names = ("weight", "SCB", "absmax", "nested_absmax")
    return sum(value.nbytes for layer in layers_of(module) for name, value in layer.state_dict().items()
               if name.split(".")[-1] in names and (value.ndim == 2 or name.split(".")[-1] != "weight"))  # fmt: skip


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0).item()


@pytest.mark.parametrize(("weights", "share"), [("int8", 0.27), ("nf4", 0.15)])
def test_layers_shrink_and_compute_nearly_the_same(weights: str, share: float) -> None:
    full, small = random_mllm(), random_mllm()
    quantize_layers(small.decoder, weights, CPU)
    assert linear_bytes(small.decoder) < share * linear_bytes(full.decoder)
    planned = bytes_of(full.decoder, weights, 4) - bytes_of(full.decoder, "dtype", 4)
    assert planned == pytest.approx(linear_bytes(small.decoder) - linear_bytes(full.decoder), rel=0.01)
    assert torch.equal(small.decoder.embed_tokens.weight, full.decoder.embed_tokens.weight)
    prefixes = [mllm.encode_prompts(mllm.tokenize_prompts(["a red circle"], 100)) for mllm in (full, small)]
    assert 0.9 < NEAR[weights] - 0.02 < cosine(prefixes[0].keys[1], prefixes[1].keys[1]) < 1.0


@pytest.mark.parametrize("weights", KINDS)
def test_the_painter_shrinks_and_t5_keeps_what_it_must(weights: str) -> None:
    full, small = tiny_painter(), tiny_painter()
    for part in small.frozen_modules(but=("vae",)):
        quantize_layers(part, weights, CPU)
    kinds = {type(m).__name__ for m in small.text_encoder_2.modules() if isinstance(m, nn.Linear)}
    assert kinds == {"Linear", "Linear8bitLt" if weights == "int8" else "Linear4bit"}
    assert type(small.text_encoder_2.encoder.block[0].layer[1].DenseReluDense.wo) is nn.Linear
    with torch.no_grad():
        texts = [diffusion.embed(["a red circle"], 8) for diffusion in (full, small)]
    assert cosine(texts[0].sequence_BTD, texts[1].sequence_BTD) > NEAR[weights]
    noise = full.noise(64, torch.Generator().manual_seed(0))
    made = [diffusion.denoise(noise, texts[0], steps=2) for diffusion in (full, small)]
    assert made[1].isfinite().all() and NEAR[weights] < cosine(*made) < 1.0


@pytest.mark.parametrize(("weights", "offload"), [("int8", "none"), ("nf4", "model")])
def test_generate_paints_with_them_and_says_so(system: System, tmp_path: Path, weights: str, offload: str) -> None:
    parts = {"branch": system.branch.path, "controlnet": system.controlnet.path, "device": "cpu", "save_latents": True}
    full = generate(system.recipe, ["a star"], output=tmp_path / "full", **parts)
    small = generate(with_weights(system.recipe, weights, offload=offload), ["a star"], output=tmp_path / "s", **parts)
    assert small.id != full.id and small.info["settings"]["weights"] == weights
    latents = [load_tensors(made.file("latents/00000.safetensors"))[0]["latents"] for made in (full, small)]
    assert latents[1].isfinite().all() and NEAR[weights] - 0.02 < cosine(*latents) < 1.0


def test_the_branch_of_a_quantized_mllm_is_what_it_was(system: System) -> None:
    recipe = with_weights(system.recipe, "nf4")
    prior = BifrostPrior(recipe, system.branch, ModelLoader(recipe.models, "cpu"))
    assert {type(m).__name__ for m in prior.branch.modules() if isinstance(m, nn.Linear)} == {"Linear", "LinearHead"}
    assert any(type(m).__name__ == "Linear4bit" for m in prior.mllm.decoder.modules())


@pytest.mark.parametrize("weights", KINDS)
def test_a_controlnet_trains_on_a_quantized_painter(system: System, tmp_path: Path, weights: str) -> None:
    mllm_store(tmp_path / "runs" / "latents-a")
    wanted = recipe(Path(system.recipe.models.mllm), Path(system.recipe.models.diffusion), steps=8, ema=0.0, lr=3e-3)
    options = {"workspace": tmp_path / "runs", "device": "cpu"}
    made = train_controlnet(with_weights(wanted, weights), **options)
    full = train_controlnet(wanted, **options)
    assert made.identity["weights"] == weights and made.identity["painter"] == full.identity["painter"]
    loss = [float((part.path / "losses.csv").read_text().splitlines()[1].split(",")[1]) for part in (made, full)]
    assert 0 < abs(loss[0] - loss[1]) < 0.1 * loss[1]
    names = load_tensors(made.file("model.safetensors"))[0]
    assert names.keys() == load_tensors(full.file("model.safetensors"))[0].keys()


def test_gradients_pass_through_quantized_layers() -> None:
    diffusion, controlnet = tiny_painter(), tiny_controlnet(tiny_painter(), channels=128).requires_grad_(True)
    text = diffusion.embed(["a star"], 8)
    for part in diffusion.frozen_modules(but=("vae",)):
        quantize_layers(part, "nf4", CPU)
    vae, latents = normal(1, 16, 16, 16), normal(1, PATCHES, 128)
    loss = diffusion.control_loss(controlnet, vae, latents, text, torch.Generator().manual_seed(0))
    loss.backward()
    assert all(np.isfinite(p.grad.abs().max().item()) for p in controlnet.parameters() if p.grad is not None)
    assert controlnet.controlnet_x_embedder.proj.weight.grad.abs().max() > 0


def test_what_cannot_be_is_refused(system: System, tmp_path: Path, monkeypatch) -> None:
    mllm_store(tmp_path / "runs" / "latents-a")
    with pytest.raises(RecipeError, match="MLLM's own weights") as found:
        train_branch(with_weights(system.recipe, "nf4"), workspace=tmp_path / "runs", device="cpu")
    assert found.value.fix.startswith("--set models.weights=dtype")
    with pytest.raises(ValueError, match="cannot move"):
        type(system.recipe).model_validate({"models": {"weights": "int8"}, "generate": {"offload": "sequential"}})
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(EnvironmentProblem, match="bitsandbytes") as missing:
        quantize_layers(random_mllm().decoder, "nf4", CPU)
    assert "bifrost-cli[quant]" in missing.value.fix
