"""Training a branch in part: only its last layers, or low-rank additions (LoRA) to all of them.

The rest of the decoder is frozen and stays the MLLM's own tensors; the names here say which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bifrost_cli.errors import EnvironmentProblem

_BASE = ".base_layer."  # peft's name for the linear layer it adds to


def tune_decoder(decoder: Any, tune: Mapping[str, int]) -> None:
    """Freeze all of the decoder but what is trained.

    Args:
        decoder: a stock decoder.
        tune: {"layers": n} trains its last n layers, {"rank": r} trains LoRA of rank r.

    Raises:
        ValueError: it has fewer than n layers.
        EnvironmentProblem: BF-ENV-002, peft is not installed.
    """
    decoder.requires_grad_(False)
    if "rank" in tune:
        _add_low_rank(decoder, tune["rank"])
    elif tune["layers"] > len(decoder.layers):
        raise ValueError(f"the decoder has {len(decoder.layers)} layers, fewer than {tune['layers']}")
    else:
        decoder.layers[len(decoder.layers) - tune["layers"] :].requires_grad_(True)


def _add_low_rank(decoder: Any, rank: int) -> None:
    """LoRA (arXiv 2106.09685) at every linear layer, with alpha = rank, in float32."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise EnvironmentProblem(
            "the branch is trained with LoRA, and peft is not installed",
            code="BF-ENV-002",
            fix="pip install 'bifrost-cli[lora]', or train with branch.tune=full",
        ) from None
    linear = [f"layers.{name}" for name, module in decoder.layers.named_modules() if isinstance(module, nn.Linear)]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=linear, init_lora_weights=False)
    inject_adapter_in_model(config, decoder)
    for parameter in decoder.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@torch.no_grad()
def start_low_rank(decoder: nn.Module, generator: torch.Generator) -> None:
    """Draw LoRA's A as nn.Linear draws its weights, and set B to zero: the decoder computes what it did before."""
    for name, parameter in decoder.named_parameters():
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
        elif ".lora_B." in name:
            nn.init.zeros_(parameter)


def frozen_names(module: nn.Module) -> set[str]:
    """Names of the parameters that are frozen."""
    return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}


def stock_name(name: str) -> str:
    """A parameter's name in the stock decoder: `...q_proj.weight` for `...q_proj.base_layer.weight`."""
    return name.replace(_BASE, ".")
