"""Where the parts of a chain are while they work: on the device, or in main memory until they are needed.

In: loaded modules, a device, the recipe's `generate.offload`. Out: modules that compute on the device. What is computed
does not depend on it. Does not know what the modules are for.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import cpu_offload
from torch import nn

CPU = torch.device("cpu")
RUN_ONLY = {"offload"}  # keys of the recipe's generate that change no byte of a picture


class Placement:
    """`none`: everything stays on the device. `model`: a part is there while it works (`on`). `sequential`: the layers
    of a part come one by one, by accelerate's hooks, and only what is in no layer stays."""

    def __init__(self, device: torch.device, offload: str) -> None:
        self.device, self.offload = device, offload
        self.home = device if offload == "none" else CPU  # where weights are loaded to

    def settle(self, *modules: nn.Module) -> None:
        """Make freshly loaded modules ready; their weights cannot be read as a whole afterwards."""
        if self.offload == "sequential":
            for module in modules:
                _stream(module, self.device)

    @contextmanager
    def on(self, *modules: nn.Module) -> Iterator[None]:
        """The modules work inside."""
        moved = modules if self.offload == "model" else ()
        for module in moved:
            nn.Module.to(module, self.device)  # diffusers' own `to` warns of what it takes for a mistake
        try:
            yield
        finally:
            for module in moved:
                nn.Module.to(module, CPU)


def forget() -> None:
    """Give back the memory of models that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _stream(module: nn.Module, device: torch.device) -> None:
    layers = list(_layers(module))
    streamed = {id(tensor) for layer in layers for tensor in (*layer.parameters(), *layer.buffers())}
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in streamed:
            tensor.data = tensor.data.to(device)
    for layer in layers:
        cpu_offload(layer, execution_device=device)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The members of every list of layers that is in no other."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from filter(None.__ne__, child)  # diffusers keeps a None where a block has no attention
        else:
            yield from _layers(child)
