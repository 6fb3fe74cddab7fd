"""Frozen and whole: surplus tensors, adapters beside the weights, quantized weights, configs that cannot be built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from fixtures_loading import load_diffusion, load_mllm, load_vae
from safetensors.torch import load_file, save_file

from bifrost_cli.errors import BifrostError
from bifrost_cli.loading.resolve import BUILTIN

CPU = torch.device("cpu")
QUANTIZED = [
    {"quant_method": "awq", "bits": 4},
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "compressed-tensors", "format": "int-quantized"},
    {"quant_method": "bitsandbytes", "load_in_8bit": True},
    {"quant_method": "fp8"},
]


@pytest.fixture
def mllm(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUILTIN / "mllm", tmp_path / "mllm"))


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUILTIN / "flux", tmp_path / "flux"))


def refused(load, folder: Path) -> BifrostError:
    with pytest.raises(BifrostError) as caught:
        load(str(folder), CPU)
    assert caught.value.fix
    return caught.value


def change(config: Path, **values) -> None:
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}))


def add(folder: Path, **tensors: torch.Tensor) -> None:
    """Put tensors in the folder's one file, or other ones in their place."""
    (file,) = folder.glob("*.safetensors")
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})


# ---- every tensor is used or named -----------------------------------------------------------------------------------


def test_a_flux_of_one_block_fewer_is_refused(flux):
    config = flux / "transformer" / "config.json"
    change(config, num_layers=json.loads(config.read_text())["num_layers"] - 1)
    error = refused(load_diffusion, flux)
    assert error.code == "BF-ART-007" and "no place for" in error.message and "transformer_blocks." in error.at


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2", "transformer"])
def test_a_tensor_that_no_part_has_is_refused(flux, part):
    add(flux / part, **{"scaled.weight_scale": torch.ones(1)})
    error = refused(load_diffusion, flux)
    assert error.code == "BF-ART-007" and part in error.message and error.at == "scaled.weight_scale"


def test_an_mllm_of_one_layer_fewer_and_one_with_scales_are_refused(mllm):
    add(mllm, **{"model.language_model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)})
    assert refused(load_mllm, mllm).at.endswith("weight_scale")


def test_what_the_libraries_compute_themselves_may_lie_in_the_file(mllm, flux):
    add(flux / "text_encoder", **{"text_model.embeddings.position_ids": torch.arange(77)[None]})
    add(mllm, **{"model.language_model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    assert load_diffusion(str(flux), CPU).weights_hash() == load_diffusion("builtin:flux", CPU).weights_hash()
    assert load_mllm(str(mllm), CPU).weights_hash() == load_mllm("builtin:mllm", CPU).weights_hash()


# ---- nothing changes the weights on the way --------------------------------------------------------------------------


def test_an_adapter_beside_the_weights_is_never_applied(mllm, flux, monkeypatch):
    for load, folder in ((load_mllm, mllm), (load_diffusion, flux / "text_encoder"), (load_vae, flux / "vae")):
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}))
        error = refused(load, folder if load is load_mllm else flux)
        assert error.code == "BF-ART-007" and "adapter" in error.message and "merge" in error.fix


@pytest.mark.parametrize("settings", QUANTIZED, ids=lambda settings: settings["quant_method"])
def test_a_quantized_checkpoint_is_refused_before_anything_is_loaded(mllm, flux, settings, monkeypatch):
    monkeypatch.setattr("bifrost_cli.loading.loaders.load_whole", lambda *a, **k: pytest.fail("weights were loaded"))
    change(mllm / "config.json", quantization_config=settings)
    change(flux / "transformer" / "config.json", quantization_config=settings)
    for load, folder in ((load_mllm, mllm), (load_diffusion, flux)):
        error = refused(load, folder)
        assert error.code == "BF-ART-007" and settings["quant_method"] in error.at and "models.weights" in error.fix


def test_a_quantization_of_the_text_model_alone_is_refused(mllm):
    text = json.loads((mllm / "config.json").read_text())["text_config"]
    change(mllm / "config.json", text_config={**text, "quantization_config": QUANTIZED[0]})
    assert "quantized" in refused(load_mllm, mllm).message


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8])
def test_codes_are_not_weights(mllm, flux, kind):
    for load, folder, place in ((load_mllm, mllm, mllm), (load_vae, flux, flux / "vae")):
        weights = load_file(next(place.glob("*.safetensors")))
        name = next(name for name, value in weights.items() if name.endswith(".weight") and value.ndim >= 2)
        add(place, **{name: torch.ones(weights[name].shape, dtype=kind)})
        error = refused(load, folder)
        assert error.code == "BF-ART-007" and "quantized" in error.message and name in error.at


# ---- configs ---------------------------------------------------------------------------------------------------------


def test_flash_attention_in_a_config_is_not_used(mllm, flux):
    change(mllm / "config.json", attn_implementation="flash_attention_2", _attn_implementation="flash_attention_2")
    change(flux / "text_encoder" / "config.json", attn_implementation="flash_attention_2")
    assert load_mllm(str(mllm), CPU).model.config._attn_implementation == "sdpa"
    assert load_diffusion(str(flux), CPU).text_encoder.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 7), ("num_attention_heads", 0), ("hidden_size", "x"),
                                            ("layer_types", ["no such attention"])])  # fmt: skip
def test_a_text_model_that_cannot_be_built_is_the_models_fault(mllm, key, value):
    text = json.loads((mllm / "config.json").read_text())["text_config"]
    change(mllm / "config.json", text_config={**text, key: value})
    error = refused(load_mllm, mllm)
    assert error.code in ("BF-ENV-020", "BF-ART-007") and str(mllm) in error.message


@pytest.mark.parametrize(("part", "key", "value"), [
    ("transformer", "num_attention_heads", 0), ("transformer", "in_channels", "x"),
    ("vae", "block_out_channels", []), ("text_encoder", "num_attention_heads", 0), ("text_encoder_2", "d_kv", "x"),
])  # fmt: skip
def test_a_part_that_cannot_be_built_is_the_models_fault(flux, part, key, value):
    change(flux / part / "config.json", **{key: value})
    error = refused(load_diffusion, flux)
    assert error.code in ("BF-ENV-020", "BF-ART-007") and part in error.message
