"""Averaged weights (EMA) of what is trained, also where it is in parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from bifrost_cli.runtime import distributed
from bifrost_cli.training.parallel import full_tensor, local


class EMA:
    """Exponential moving averages of a module's trained weights.

    `tensors` maps a parameter's name to its average; it is empty when the decay is 0. With `warmup` the decay of step
    t is min(decay, (1 + t) / (10 + t)), so that the first weights are soon forgotten (with a decay of 0.997 alone they
    are still 64 % of the average after 150 steps), and BatchNorm's running statistics are averaged too.
    """

    def __init__(self, module: nn.Module, decay: float, warmup: bool = False) -> None:
        self._module, self._decay, self._warmup = module, decay, warmup
        self.tensors = {name: tensor.detach().clone() for name, tensor in self._averaged() if decay}

    def _averaged(self) -> list[tuple[str, Tensor]]:
        """What is averaged, by name."""
        trained = [(name, parameter) for name, parameter in self._module.named_parameters() if parameter.requires_grad]
        if not self._warmup:
            return [*trained]
        saved = self._module.state_dict().keys()
        buffers = [(name, x) for name, x in self._module.named_buffers() if name in saved and x.is_floating_point()]
        return [*trained, *buffers]

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        tensors = self._averaged() if self.tensors else []
        return [(local(self.tensors[name]), local(tensor.detach())) for name, tensor in tensors]

    def decay(self, step: int) -> float:
        """The decay after step 0, 1, ..."""
        return min(self._decay, (1 + step) / (10 + step)) if self._warmup else self._decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average = decay * average + (1 - decay) * weight; the weights after the first step (0) begin it."""
        if not self.tensors:
            return
        averages, weights = map(list, zip(*self._pairs(), strict=True))
        if step == 0:
            torch._foreach_copy_(averages, weights)
        else:
            get_ema_multi_avg_fn(self.decay(step))(averages, weights, step)

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap live weights and averages in place; optimizers and wrappers hold references to the storage."""
        for average, weight in self._pairs():
            live = weight.clone()
            weight.copy_(average)
            average.copy_(live)

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take the averages from a checkpoint."""
        for name, average in self.tensors.items():
            local(average).copy_(local(tensors[name]))

    def whole(self, raw: bool = False) -> dict[str, Tensor]:
        """The module's state dict without what is frozen: averages where there are any, or with `raw` live weights.

        Its tensors are whole, in the first process; {} in the others. All processes call it.
        """
        names = {} if raw else {id(tensor): name for name, tensor in self._averaged()}
        frozen = {name for name, parameter in self._module.named_parameters() if not parameter.requires_grad}
        weights = {}
        for name, tensor in self._module.state_dict(keep_vars=True).items():
            if name in frozen:
                continue
            whole = full_tensor(self.tensors.get(names.get(id(tensor), ""), tensor).detach())
            if distributed.rank() == 0:
                weights[name] = whole.clone()
        return weights
