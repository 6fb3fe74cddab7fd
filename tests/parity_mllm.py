"""Reference vectors of prompt layout, branch, decode and visual encoder, run through the public functions.

In: a folder with config.json, inputs, outputs and, mostly, model (safetensors). Out: (name, largest error, tolerance)
rows. Takes every size, head count, step count and guidance weight from the folder; knows no particular vector.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from bifrost_cli.interop.published_names import branch_name, sort_names
from bifrost_cli.models.branch.masking import sample_masked
from bifrost_cli.models.branch.visual_branch import VisualBranch
from bifrost_cli.models.mllm.adapters import encode_patches
from bifrost_cli.models.mllm.chat_template import TokenizedPrompts, image_mask, text_mask, tokenize_prompts
from bifrost_cli.models.mllm.frozen_mllm import Mllm, PromptCache

Row = tuple[str, float, float]
BRANCH = VISUAL = 1e-4
DECODE = 2e-4
RELATIVE = 1e-4
CLOSING_TOKENS = 6
NO_LABEL = -100


def check_layout(folder: str | Path) -> list[Row]:
    """Ids, padding, truncation, positions, labels and masks of every case, exact."""
    config, inputs, expected = _config(folder), _tensors(folder, "inputs"), _tensors(folder, "outputs")
    rows = []
    for name, case in config["cases"].items():
        ids = inputs[f"{name}.text_ids_flat"].split(inputs[f"{name}.text_lengths"].tolist())
        closing = ids[0][-CLOSING_TOKENS:].tolist()
        text = tokenize_prompts([row.tolist() for row in ids], case["max_seq_length"], closing, config["pad_id"])
        ours = _sequence(text, case["num_visual_gen_tokens"], config["image_pad_id"])
        wanted = {key.removeprefix(name + "."): value for key, value in expected.items() if key.startswith(name + ".")}
        rows += [(f"{name}.{key}", error, 0.0) for key, error in _errors(ours, wanted).items()]
    return rows


def check_branch(folder: str | Path) -> list[Row]:
    """One pass of MLLM and branch: what enters each layer, predictions, loss and every gradient."""
    config, inputs, expected = _config(folder), _tensors(folder, "inputs"), _tensors(folder, "outputs")
    mllm, branch = _models(config, folder)
    text = _layout(inputs["input_ids"], inputs["attention_mask_text"])
    masked_BP, latents_BPC = inputs["ar_mask"].bool(), inputs["clip_latents"]
    seen = _watch(mllm.model.model.language_model), _watch(branch.decoder)
    prefix = mllm.encode_prompts(text)
    ours = {"vision_pred": branch(latents_BPC, masked_BP, prefix)}
    real_BS = torch.cat([text.attention_BT, torch.ones_like(inputs["ar_mask"])], dim=1).bool()
    ours |= {name: torch.cat([part[name] for part in seen], dim=1) for name in seen[0]}
    ours["vision_pred_all_masked"] = branch(latents_BPC, torch.ones_like(masked_BP), prefix)
    loss, _ = branch.loss(latents_BPC, prefix, masked_BP)
    loss.backward()
    # Rows of padding are meaningless; text_param_grad_norm belongs to weights that are frozen here.
    hidden = [name for name in expected if name == "hidden_states" or name.startswith("layer_inputs.")]
    ours |= {name: ours[name] * real_BS[..., None] for name in hidden}
    expected |= {name: expected[name] * real_BS[..., None] for name in hidden}
    wanted = {name: value for name, value in expected.items() if "grad" not in name and name != "loss"}
    rows = [(name, error, BRANCH) for name, error in _errors(ours, wanted).items()]
    return rows + _gradient_rows(branch, loss, config, expected)


def check_decode(folder: str | Path) -> list[Row]:
    """The decode loop for every (steps, guidance) in the outputs: latents, trajectory, schedule."""
    config, inputs, expected = _config(folder), _tensors(folder, "inputs"), _tensors(folder, "outputs")
    mllm, branch = _models(config, folder)
    prefixes = [
        mllm.encode_prompts(_layout(ids, attention))
        for ids, attention in zip(inputs["input_ids"].chunk(2), inputs["attention_mask_text"].chunk(2), strict=True)
    ]
    ours: dict[str, Tensor] = {}
    for suffix in sorted({name.split(".", 1)[1] for name in expected}):
        steps, guidance = re.fullmatch(r"iter(\d+)\.cfg([\d.]+)", suffix).groups()
        ours |= _decoded(branch, prefixes, int(steps), float(guidance), inputs["orders"], suffix)
    return [
        (name, error, DECODE if expected[name].is_floating_point() else 0.0)
        for name, error in _errors(ours, expected).items()
    ]


def check_visual(folder: str | Path) -> list[Row]:
    """Patch latents of images of any sizes packed one after the other, and how many each has."""
    config, inputs, expected = _config(folder), _tensors(folder, "inputs"), _tensors(folder, "outputs")
    vision = config["vision_config"]
    text = {"hidden_size": vision["out_hidden_size"], "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8,
            "num_attention_heads": 1, "num_key_value_heads": 1}  # fmt: skip
    weights = {f"model.visual.{name}": value for name, value in _tensors(folder, "model").items()}
    mllm = _mllm({**text, "vision_config": vision}, weights)
    grid_N3 = inputs["grid_thw"]
    ours = {
        "image_embeds": encode_patches(mllm.model, inputs["pixel_values"], grid_N3),
        "per_image_tokens": grid_N3.prod(dim=1) // vision["spatial_merge_size"] ** 2,
    }
    return [(name, error, VISUAL) for name, error in _errors(ours, expected).items()]


# ---- pieces ---------------------------------------------------------------------------------------------------------


def _sequence(text: TokenizedPrompts, patches: int, image_id: int) -> dict[str, Tensor]:
    """The layout with its image tokens, in the form of the vectors."""
    ids_BT, real_BT = text.input_ids_BT, text.attention_BT.bool()
    image_BP = torch.ones(len(ids_BT), patches, dtype=torch.long)
    text_BTS = nn.functional.pad(text_mask(text.attention_BT), (0, patches))
    return {
        "input_ids": torch.cat([ids_BT, image_id * image_BP], dim=1),
        "position_ids": nn.functional.pad(text.position_ids_BT, (0, patches))[:, None].expand(-1, 3, -1),
        "image_position_mask": nn.functional.pad(image_BP, (ids_BT.shape[1], 0)),
        "labels": torch.cat([ids_BT.where(real_BT, NO_LABEL), NO_LABEL * image_BP], dim=1),
        "attention_mask_text": text.attention_BT,
        "allowed": torch.cat([text_BTS, image_mask(text.attention_BT, patches)], dim=1),
    }


def _decoded(
    branch: VisualBranch, prefixes: Sequence[PromptCache], steps: int, guidance: float, orders_BP: Tensor, suffix: str
) -> dict[str, Tensor]:
    """One run, with the trajectory (mask token where masked) and the schedule as the published loop counts it."""
    trajectory, kept = [], []

    def record(_step: int, latents_BPC: Tensor, masked_BP: Tensor) -> None:
        trajectory.append(torch.where(masked_BP[..., None], branch.mask_token.detach(), latents_BPC))
        kept.append(int(masked_BP[0].sum()))

    unconditional, conditional = prefixes
    latents_BPC = sample_masked(
        branch, conditional, unconditional, steps=steps, guidance=guidance, orders_BP=orders_BP, callback=record
    )
    masked = torch.tensor([branch.patches, *kept])
    return {
        f"latents.{suffix}": latents_BPC,
        f"traj.{suffix}": torch.stack(trajectory),
        f"mask_lens.{suffix}": masked[1:].clamp(min=1),
        f"revealed.{suffix}": masked[:-1] - masked[1:],
    }


def _gradient_rows(
    branch: VisualBranch, loss: Tensor, config: dict[str, Any], expected: dict[str, Tensor]
) -> list[Row]:
    gradients = {name: parameter.grad for name, parameter in branch.named_parameters()}
    norms = [gradients[branch_name(name)].norm() for name in config.get("grad_names", ())]
    ours = {"loss": loss.detach()[None], "grad_norms": torch.stack(norms) if norms else torch.zeros(0)}
    ours["grad_norm"] = torch.stack([value.norm() for value in gradients.values()]).norm()[None]
    ours |= {name: gradients[branch_name(name[5:])] for name in expected if name.startswith("grad.")}
    wanted = {name: expected[name] for name in ours if name in expected}
    size = {
        name: (value.abs() if name == "grad_norms" else value.abs().max()).clamp_min(1e-12)
        for name, value in wanted.items()
    }
    relative = {name: ours[name] / size[name] for name in wanted}
    errors = _errors(relative, {name: value / size[name] for name, value in wanted.items()})
    return [(name, error, RELATIVE) for name, error in errors.items()]


def _watch(decoder: nn.Module) -> dict[str, Tensor]:
    """Keeps what enters every layer of a stock decoder (layer 0: inputs_embeds) and what leaves its norm."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Tensor | None = None) -> None:
            seen.setdefault(name, (args[0] if output is None else output).detach())

        return hook

    for index, layer in enumerate(decoder.layers):
        layer.register_forward_pre_hook(keep(f"layer_inputs.{index}"))
    decoder.norm.register_forward_hook(keep("hidden_states"))
    return seen


def _models(config: dict[str, Any], folder: str | Path) -> tuple[Mllm, VisualBranch]:
    branch_weights, mllm_weights, unknown = split_published(_tensors(folder, "model"))
    if unknown:
        raise ValueError(f"weights that belong nowhere: {', '.join(unknown)}")
    mllm = _mllm(config["qwen2_5_vl"], mllm_weights)
    branch = VisualBranch.from_mllm(mllm, config["num_visual_gen_tokens"])
    branch.load_state_dict(branch_weights, strict=True)
    return mllm, branch


def split_published(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """A published state dict as the branch's, the MLLM's, and the names that belong to neither."""
    names = sort_names(weights)
    branch, mllm = ({ours: weights[name] for name, ours in part.items()} for part in (names.branch, names.mllm))
    return branch, mllm, [*names.unknown, *names.unexpected]


def _mllm(config: dict[str, Any], weights: dict[str, Tensor]) -> Mllm:
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
    unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"unexpected weights: {', '.join(unexpected)}")
    return Mllm(model, SimpleNamespace(), SimpleNamespace())


def _layout(input_ids_BS: Tensor, attention_BT: Tensor) -> TokenizedPrompts:
    length = attention_BT.shape[1]
    rows = [ids[:length][real.bool()].tolist() for ids, real in zip(input_ids_BS, attention_BT, strict=True)]
    return tokenize_prompts(rows, length, (), pad_id=0)


def _config(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "config.json").read_text())


def _tensors(folder: str | Path, name: str) -> dict[str, Tensor]:
    return load_file(Path(folder) / f"{name}.safetensors")


def _errors(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute difference by name; infinite where ours is missing or of another shape."""
    errors = {}
    for name, value in expected.items():
        same = name in ours and ours[name].shape == value.shape
        errors[name] = float((ours[name].detach().double() - value.double()).abs().max()) if same else float("inf")
    return errors
