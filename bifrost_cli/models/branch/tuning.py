"""Which part of a branch is trained: all of it, its last layers, or low-rank additions to all of them.

In: a branch whose decoder is the MLLM's. Out: the same branch, the rest of its decoder frozen; the names under which
the MLLM holds what is frozen. Knows no training and no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from bifrost_cli.errors import EnvironmentProblem

_BASE = ".base_layer."  # peft's name for the linear layer it adds to


def tune_decoder(decoder: nn.Module, tune: Mapping[str, int]) -> None:
    """Freeze the decoder but for its last layers ({"layers": n}), or but for additions of low rank ({"rank": r}).

    ValueError when it has not so many layers; EnvironmentProblem BF-ENV-002 when peft is not installed.
    """
    decoder.requires_grad_(False)
    if "rank" in tune:
        _add_low_rank(decoder, tune["rank"])
    elif tune["layers"] > len(decoder.layers):
        raise ValueError(f"the decoder has {len(decoder.layers)} layers, fewer than {tune['layers']}")
    else:
        decoder.layers[len(decoder.layers) - tune["layers"] :].requires_grad_(True)


def _add_low_rank(decoder: nn.Module, rank: int) -> None:
    """B A of `rank` beside every linear layer (LoRA, arXiv 2106.09685), not scaled (alpha = rank), in float32."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise EnvironmentProblem(
            "the branch is one of LoRA, and peft is not installed",
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
    """A uniform as nn.Linear draws its own weights, B zero: the decoder computes what it did before."""
    for name, parameter in decoder.named_parameters():
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
        elif ".lora_B." in name:
            nn.init.zeros_(parameter)


def frozen_names(module: nn.Module) -> set[str]:
    """Names of the parameters that are not trained."""
    return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}


def stock_name(name: str) -> str:
    """The stock decoder's name of one of ours: `...q_proj.base_layer.weight` is `...q_proj.weight` there."""
    return name.replace(_BASE, ".")
