"""Frozen weights in 8 or 4 bits: the linear layers of a stock model's blocks, replaced by those of bitsandbytes.

What is in no list of layers (embeddings, heads, norms) keeps its weights. The `quantization_config` of transformers and
diffusers does the same while loading, but diffusers refuses it without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from bifrost_cli.errors import EnvironmentProblem


def layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """The members of every list of layers that is in no other; diffusers keeps a None where there is nothing."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (layer for layer in child if layer is not None)
        else:
            yield from layers_of(child)


def quantize_layers(module: nn.Module, weights: str, device: torch.device) -> None:
    """Replace, in place, the linear layers of `layers_of(module)`; they go to the device. The rest stays where it is.

    weights: int8 (LLM.int8(), arXiv 2208.07339) or nf4 (QLoRA, arXiv 2305.14314; blocks of 64, scales in 8 bits).
    Gradients pass through to the inputs. What the model's class keeps in 32 bits is left alone. EnvironmentProblem
    BF-ENV-002 when bitsandbytes is not installed.
    """
    try:
        import bitsandbytes
    except ImportError:
        raise EnvironmentProblem(
            f"the recipe asks for {weights} weights, and bitsandbytes is not installed",
            code="BF-ENV-002",
            fix="pip install 'bifrost-cli[quant]', or --set models.weights=dtype",
        ) from None
    for owner, name, linear in list(_linear(module)):
        setattr(owner, name, _quantized(bitsandbytes.nn, linear, weights, device))


def bytes_of(module: nn.Module, weights: str, size: int) -> int:
    """Bytes of the module's weights when `quantize_layers` is done with it; `size` is that of one number otherwise."""
    total = size * sum(parameter.numel() for parameter in module.parameters())
    for _, _, linear in _linear(module) if weights != "dtype" else ():
        count = linear.weight.numel()
        scales = 4 * linear.out_features if weights == "int8" else count // 64 + 4 * count // (64 * 256)
        total += (count if weights == "int8" else count // 2) + scales - size * count
    return total


def _linear(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Owner, name and module of every linear layer in a list of layers, but for what the class keeps in 32 bits."""
    kept = tuple(getattr(module, "_keep_in_fp32_modules", None) or ())
    for layer in layers_of(module):
        for owner in layer.modules():
            for name, child in owner.named_children():
                if type(child) is nn.Linear and name not in kept:
                    yield owner, name, child


def _quantized(library: Any, linear: nn.Linear, weights: str, device: torch.device) -> nn.Module:
    form = (linear.in_features, linear.out_features, linear.bias is not None)
    if weights == "int8":
        layer = library.Linear8bitLt(*form, has_fp16_weights=False, threshold=6.0, device="meta")
        layer.weight = library.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False).to(device)
    else:
        layer = library.Linear4bit(*form, compute_dtype=linear.weight.dtype, quant_type="nf4", device="meta")
        # On some CPUs the first pass without a gradient would pack the weights anew, and lose later gradients with it.
        layer.support_avx512bf16_for_cpu = False
        options = {"requires_grad": False, "quant_type": "nf4", "module": layer}
        layer.weight = library.Params4bit(linear.weight.data, **options).to(device)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.data.to(device), requires_grad=False)
    return layer.eval()
