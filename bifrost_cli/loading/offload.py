"""Where the parts of a chain are while they work: on the device, or in main memory until they are needed.

In: loaded modules, a device, the recipe's `generate.offload` and `models.weights`. Out: modules that compute on the
device. What they compute does not depend on where they wait. Does not know what they are for.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import cpu_offload
from torch import nn

from bifrost_cli.config.schema import Recipe, identity_of
from bifrost_cli.loading.quantize import layers_of, quantize_layers

CPU = torch.device("cpu")


def deciding(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe decides a generated image beside weights, prompt and seed, as JSON values."""
    return {**identity_of(recipe.generate), "painter_tokens": recipe.models.diffusion_text_tokens}


class OffloadPolicy:
    """`none`: everything stays on the device. `model`: a part is there while it works (`on`). `sequential`: the layers
    of a part come one by one, by accelerate's hooks, and only what is in no layer stays. Parts with weights of 8 or 4
    bits stay in any case: they are made on the device."""

    def __init__(self, device: torch.device, offload: str = "none", weights: str = "dtype") -> None:
        self.device, self.offload, self.weights = device, offload, weights
        self.home = device if (offload, weights) == ("none", "dtype") else CPU  # where weights are loaded to
        self._staying: set[int] = set()

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
                self._staying.add(id(part))
            elif self.offload == "sequential":
                _stream(part, self.device)

    @contextmanager
    def on(self, *parts: nn.Module) -> Iterator[None]:
        """The parts work inside."""
        moved = [part for part in parts if self.offload == "model" and id(part) not in self._staying]
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
