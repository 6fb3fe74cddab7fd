"""AdamW, stock or with 8-bit moments (bitsandbytes), and its state as the flat tensors that a checkpoint holds."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from bifrost_cli.config.schema import Train
from bifrost_cli.errors import EnvironmentProblem


def make_optimizer(module: nn.Module, train: Train) -> torch.optim.Optimizer:
    """AdamW on what requires a gradient; weight decay on what `decays` says.

    adamw8bit keeps both moments in 8 bits with a scale for each block of 256 (arXiv 2110.02861); tensors of fewer than
    4096 numbers stay in 32 bits.

    Raises:
        EnvironmentProblem: bitsandbytes is not installed (BF-ENV-002).
    """
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    groups = [{"params": [p for name, p in trained if decays(name, p)], "weight_decay": train.weight_decay},
              {"params": [p for name, p in trained if not decays(name, p)], "weight_decay": 0.0}]  # fmt: skip
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": train.lr, "betas": tuple(train.betas)}
    if train.optimizer == "adamw8bit":
        return _eight_bit()(groups, **options)
    return torch.optim.AdamW(groups, **options, fused=True)


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to the matrices of layers, not to norms, biases, mask tokens and positions."""
    return parameter.ndim > 1 and name.endswith("weight") and not re.search("position|pos_embed", name)


def _eight_bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise EnvironmentProblem(
            "the recipe asks for adamw8bit, and bitsandbytes is not installed",
            code="BF-ENV-002",
            fix="pip install 'bifrost-cli[quant]', or set optimizer: adamw",
        ) from None
    return AdamW8bit


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Optimizer state as flat `parameter/key` names; a count that is a Python number becomes an int64 tensor."""
    return {f"{name}/{key}": torch.as_tensor(value) for name, parameter in module.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()}  # fmt: skip


def restore_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put flat `parameter/key` tensors back; each on its parameter's device (a fused AdamW wants `step` there too)."""
    parameters = dict(module.named_parameters())
    for flat, tensor in tensors.items():
        name, key = flat.rsplit("/", 1)
        counted = tensor.dtype == torch.int64 and tensor.ndim == 0  # bitsandbytes counts its steps in Python
        value = tensor.item() if counted else tensor.to(parameters[name].device, copy=True)
        optimizer.state[parameters[name]][key] = value
