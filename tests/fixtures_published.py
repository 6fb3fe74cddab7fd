"""A small random system in the layout of the published checkpoint, renamed here by hand: not by the product's table."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from fixtures_flux import System
from fixtures_mllm import random_mllm
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
VLM = "vision_language_model."
PLAIN = {
    "decoder.norm.weight": VLM + "model.vision_branch_norm.weight",
    "position_embedding": "learnable_pos_emb",
    "mask_token": "mask_token",
    "vision_head.weight": "vision_head.weight",
    "vision_head.bias": "vision_head.bias",
}
STRANGE = {
    "vision_gen_vae_model.encoder.conv_in.weight": torch.ones(2),
    "diffusion_decoder.blocks.0.weight": torch.ones(2),
    "something_else": torch.ones(1),
}


def renamed_branch(weights: Tensors) -> Tensors:
    layers = {
        name: re.sub(r"^decoder\.layers\.(\d+)\.(self_attn\.)?", rf"{VLM}model.layers.\1.\2vision_branch_", name)
        for name in weights
    }
    return {PLAIN.get(name, layers[name]): tensor for name, tensor in weights.items()}


def renamed_mllm(weights: Tensors) -> Tensors:
    places = {"model.visual.": "visual.", "model.language_model.": "model.", "lm_head.": "lm_head."}
    return {
        VLM + new + name.removeprefix(old): tensor
        for name, tensor in weights.items()
        for old, new in places.items()
        if name.startswith(old)
    }


def renamed_controlnet(weights: Tensors) -> Tensors:
    new = {name: re.sub(r"^controlnet_x_embedder\.(?!proj)", "up_sampling_block.", name) for name in weights}
    return {new[name].replace("embedder.proj.", "embedder."): tensor for name, tensor in weights.items()}


def save_shards(folder: Path, weights: Tensors, count: int = 3) -> Path:
    """`model-0000i-of-0000n.safetensors` and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {name: weights[name].clone() for name in sorted(weights)[i::count]}  # tied weights would share memory
        save_file(part, folder / file, metadata={"format": "pt"})
        listed |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return folder


def save_controlnet(folder: Path, config: dict, weights: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in config.items() if key != "control_channels"}
    text = {"_class_name": "FluxControlNetModel", "_diffusers_version": "0.33.1", "a_key_of_theirs": 3, **config}
    (folder / "config.json").write_text(json.dumps(text))
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


def publish(system: System, folder: Path, change: Callable[[Tensors], object] = lambda weights: None) -> Path:
    """The system's pair, with the frozen weights and keys of parts that are not used; `change` edits the root's."""
    branch, controlnet = (load_file(part.file("model.safetensors")) for part in (system.branch, system.controlnet))
    frozen = random_mllm().model.state_dict()  # of save_system; the file of a folder has names of its own
    del frozen["lm_head.weight"]  # tied
    weights = renamed_branch(branch) | renamed_mllm(frozen) | STRANGE
    change(weights)
    config = json.loads(system.controlnet.file("config.json").read_text())
    save_controlnet(folder / "flux_controlnet", config, renamed_controlnet(controlnet))
    return save_shards(folder, weights)


def save_recipe(system: System, path: Path) -> Path:
    path.write_text(yaml.safe_dump(system.recipe.model_dump(mode="json")))
    return path
