"""The optimizer of a training, and its state as named tensors.

In: a module and the training settings of a recipe. Out: AdamW, stock or with 8-bit averages (bitsandbytes), and its
state as flat `parameter/key` tensors that a checkpoint holds. Knows no loop and no files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bifrost_cli.errors import EnvironmentProblem


def make_optimizer(module: nn.Module, train: Any) -> torch.optim.Optimizer:
    """AdamW on what requires a gradient; vectors and scalars get no weight decay.

    adamw8bit keeps both averages in 8 bits with a scale for each block of 256 (arXiv 2110.02861); tensors of fewer than
    4096 numbers stay in 32 bits. EnvironmentProblem BF-ENV-002 when bitsandbytes is not installed.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": train.weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]  # fmt: skip
    groups = [group for group in groups if group["params"]]
    options = {"lr": train.lr, "betas": tuple(train.betas)}
    if train.optimizer == "adamw8bit":
        return _eight_bit()(groups, **options)
    return torch.optim.AdamW(groups, **options, fused=True)


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
