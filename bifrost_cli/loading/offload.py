"""Models that share a device: where they are while they work and while they wait, and their weights in 8 or 4 bits.

The linear layers of a quantized model's blocks are those of bitsandbytes; embeddings, heads and norms keep theirs. The
libraries' own `quantization_config` does the same while loading, but diffusers refuses it without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

from bifrost_cli.errors import EnvironmentProblem, UsageError

CPU = torch.device("cpu")


class OffloadPolicy:
    """How parts of a pipeline share a device.

    Args:
        device: where they compute.
        offload: `none`: everything stays on the device. `model`: a part is there while it works (`on`). `sequential`:
            the layers of a part come one by one, by accelerate's hooks, and only what is in no layer stays.
        weights: `models.weights`. Parts in 8 or 4 bits stay on the device in any case: they are made there.
    """

    def __init__(self, device: torch.device, offload: str = "none", weights: str = "dtype") -> None:
        self.device, self.offload, self.weights = device, offload, weights
        self._staying: WeakSet[nn.Module] = WeakSet()

    @property
    def home(self) -> torch.device:
        """Where weights are loaded to."""
        return self.device if (self.offload, self.weights) == ("none", "dtype") else CPU

    def needs_less(self) -> str:
        """The setting to try next when memory runs out."""
        stronger = {"none": "model", "model": "sequential"}.get(self.offload) if self.weights == "dtype" else None
        if stronger or self.offload == "none":
            return f"--set generate.offload={stronger or 'model'} (the same bytes)"
        return "--set models.weights=nf4 --set generate.offload=model, or a GPU with more memory"

    def settle(self, *parts: nn.Module, frozen: Sequence[nn.Module] = ()) -> None:
        """Make freshly loaded parts ready; `frozen` ones (parts, or inside parts) get the recipe's weights. What was
        loaded can be hashed or copied before, not afterwards."""
        quantized = {id(module) for module in frozen} if self.weights != "dtype" else set()
        for module in frozen if quantized else ():
            quantize_layers(module, self.weights, self.device)
        for part in parts:
            stays = not quantized.isdisjoint(map(id, part.modules()))
            if stays or self.offload == "none":
                nn.Module.to(part, self.device)  # diffusers' own `to` warns of what it takes for a mistake
                self._staying.add(part)
            elif self.offload == "model" and self.device.type == "cuda":
                for tensor in (*part.parameters(), *part.buffers()):
                    tensor.data = _pinned(tensor.data)
            elif self.offload == "sequential":
                layers = list(layers_of(part))
                streamed = {id(tensor) for layer in layers for tensor in (*layer.parameters(), *layer.buffers())}
                for tensor in (*part.parameters(), *part.buffers()):
                    if id(tensor) not in streamed:
                        tensor.data = tensor.data.to(self.device)
                for layer in layers:
                    cpu_offload(layer, execution_device=self.device)

    def change(self, *parts: nn.Module, device: torch.device | None = None, offload: str | None = None) -> None:
        """Take settled parts to another device, or under another `offload`; UsageError for weights in 8 or 4 bits."""
        if self.weights != "dtype":
            raise UsageError(f"weights in {self.weights} stay on the device that they were made on",
                             fix="load again, with device=... and --set generate.offload=...")  # fmt: skip
        for part in parts:
            if self.offload == "sequential":
                remove_hook_from_submodules(part)
            nn.Module.to(part, CPU)
        self.device, self.offload = device or self.device, offload or self.offload
        self._staying = WeakSet()
        self.settle(*parts)

    @contextmanager
    def on(self, *parts: nn.Module) -> Iterator[None]:
        """The parts work inside."""
        moved = [part for part in parts if self.offload == "model" and part not in self._staying]
        tensors = [tensor for part in moved for tensor in (*part.parameters(), *part.buffers())]
        homes = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(self.device, non_blocking=True)
            yield
        finally:
            for tensor, home in zip(tensors, homes, strict=True):  # frozen: what lies at home is what there was
                tensor.data = home


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """In pages that the GPU copies from by itself, at twice the speed; where the system gives none, as it was."""
    try:
        return tensor.pin_memory()
    except RuntimeError:
        return tensor


def layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """The members of every list of layers that is in no other; diffusers keeps a None where there is nothing."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (layer for layer in child if layer is not None)
        else:
            yield from layers_of(child)


def quantize_layers(module: nn.Module, weights: str, device: torch.device) -> None:
    """Replace, in place, the linear layers of `layers_of(module)`, but for what its class keeps in 32 bits. They go to
    the device; gradients pass through to the inputs.

    weights: int8 (LLM.int8(), arXiv 2208.07339) or nf4 (QLoRA, arXiv 2305.14314; blocks of 64, scales in 8 bits).
    EnvironmentProblem BF-ENV-002 when bitsandbytes is not installed.
    """
    try:
        import bitsandbytes
    except ImportError:
        said = f"the recipe asks for {weights} weights, and bitsandbytes is not installed"
        fix = "pip install 'bifrost-cli[quant]', or --set models.weights=dtype"
        raise EnvironmentProblem(said, code="BF-ENV-002", fix=fix) from None
    for owner, name, linear in list(_linear(module)):
        form = (linear.in_features, linear.out_features, linear.bias is not None)
        kept: dict[str, Any] = {"requires_grad": False}
        layer: Any
        kind: Any
        if weights == "int8":
            layer = bitsandbytes.nn.Linear8bitLt(*form, has_fp16_weights=False, threshold=6.0, device="meta")
            kind, kept["has_fp16_weights"] = bitsandbytes.nn.Int8Params, False
        else:
            dtype = linear.weight.dtype
            layer = bitsandbytes.nn.Linear4bit(*form, compute_dtype=dtype, quant_type="nf4", device="meta")
            # On some CPUs the first pass without a gradient would pack the weights anew, and lose later gradients.
            layer.support_avx512bf16_for_cpu = False
            kind, kept = bitsandbytes.nn.Params4bit, {**kept, "quant_type": "nf4", "module": layer}
        layer.weight = kind(linear.weight.data, **kept).to(device)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.data.to(device), requires_grad=False)
        setattr(owner, name, layer.eval())


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
