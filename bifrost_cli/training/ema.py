"""Averaged weights (EMA) of what is trained, also where it is in parts.

In: a module, a decay. Out: averages by name, that can change places with the weights. Knows no optimizer and no files.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from bifrost_cli.runtime import distributed
from bifrost_cli.training.parallel import full_tensor, local


class EMA:
    """`tensors` are the averages, by the parameter's name; there are none when the decay is 0."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self._decay = module, decay
        self.tensors = {name: parameter.detach().clone() for name, parameter in self._trained() if decay}

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self._module.named_parameters() if parameter.requires_grad]

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        trained = self._trained() if self.tensors else []
        return [(local(self.tensors[name]), local(parameter.detach())) for name, parameter in trained]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average = decay * average + (1 - decay) * weight; the weights after the first step (0) begin it."""
        if not self.tensors:
            return
        ema_weights, weights = map(list, zip(*self._pairs(), strict=True))
        if step == 0:
            torch._foreach_copy_(ema_weights, weights)
        else:
            get_ema_multi_avg_fn(self._decay)(ema_weights, weights, step)

    @torch.no_grad()
    def exchange(self) -> None:
        """Weights and averages change places, by value: where they lie is known to optimizers and wrappers."""
        for average, weight in self._pairs():
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take them from a checkpoint."""
        for name, average in self.tensors.items():
            local(average).copy_(local(tensors[name]))

    def whole(self) -> dict[str, Tensor]:
        """The module's state dict, without what is frozen and with averages where there are any; its tensors are whole,
        in the first process ({} in the others)."""
        names = {id(parameter): name for name, parameter in self._trained()}
        frozen = {name for name, parameter in self._module.named_parameters() if not parameter.requires_grad}
        weights = {}
        for name, tensor in self._module.state_dict(keep_vars=True).items():
            if name in frozen:
                continue
            whole = full_tensor(self.tensors.get(names.get(id(tensor), ""), tensor).detach())
            if distributed.rank() == 0:
                weights[name] = whole.clone()
        return weights
