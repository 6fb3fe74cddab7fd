"""Where models are while they work and while they wait: on the device, or in main memory until they are needed.

What they compute does not depend on it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakSet

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

from bifrost_cli.errors import UsageError
from bifrost_cli.loading.quantize import layers_of, quantize_layers

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
        """Make freshly loaded parts ready; `frozen` ones (parts, or inside parts) get the recipe's weights.

        What was loaded can be hashed or copied before, not afterwards.
        """
        quantized = {id(module) for module in frozen} if self.weights != "dtype" else set()
        for module in frozen if quantized else ():
            quantize_layers(module, self.weights, self.device)
        for part in parts:
            stays = not quantized.isdisjoint(map(id, part.modules()))
            if stays or self.offload == "none":
                nn.Module.to(part, self.device)  # diffusers' own `to` warns of what it takes for a mistake
                self._staying.add(part)
            elif self.offload == "sequential":
                _stream(part, self.device)

    def change(self, *parts: nn.Module, device: torch.device | None = None, offload: str | None = None) -> None:
        """Take settled parts to another device, or under another `offload`.

        Raises:
            UsageError: their weights have 8 or 4 bits, which stay where they were made.
        """
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
        for part in moved:
            nn.Module.to(part, self.device)
        try:
            yield
        finally:
            for part in moved:
                nn.Module.to(part, CPU)


def forget() -> None:
    """Give back the memory of models that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _stream(module: nn.Module, device: torch.device) -> None:
    layers = list(layers_of(module))
    streamed = {id(tensor) for layer in layers for tensor in (*layer.parameters(), *layer.buffers())}
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in streamed:
            tensor.data = tensor.data.to(device)
    for layer in layers:
        cpu_offload(layer, execution_device=device)
