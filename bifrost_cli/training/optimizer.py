"""AdamW, stock or with 8-bit moments (bitsandbytes), its state as flat tensors, and averaged weights (EMA)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from bifrost_cli.config.schema import Train
from bifrost_cli.errors import ArtifactError, EnvironmentProblem
from bifrost_cli.runtime import distributed
from bifrost_cli.training.parallel import full_tensor, local


def make_optimizer(module: nn.Module, train: Train) -> torch.optim.Optimizer:
    """AdamW; weight decay on the matrices of layers, not on norms, biases, mask tokens and positions. adamw8bit keeps
    both moments in 8 bits with a scale for each block of 256 (arXiv 2110.02861), of tensors of 4096 numbers or more."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            position = re.search("position|pos_embed", name)
            groups[parameter.ndim > 1 and name.endswith("weight") and not position].append(parameter)
    params = [{"params": parameters, "weight_decay": train.weight_decay if decays else 0.0}
              for decays, parameters in groups.items() if parameters]  # fmt: skip
    options: dict[str, Any] = {"lr": train.lr, "betas": tuple(train.betas)}
    if train.optimizer != "adamw8bit":
        return torch.optim.AdamW(params, **options, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise EnvironmentProblem("the recipe asks for adamw8bit, and bitsandbytes is not installed", code="BF-ENV-002",
                                 fix="pip install 'bifrost-cli[quant]', or set optimizer: adamw") from None  # fmt: skip
    return AdamW8bit(params, **options)


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Optimizer state as flat `parameter/key` names; a count that is a Python number becomes an int64 tensor."""
    return {f"{name}/{key}": torch.as_tensor(value) for name, parameter in module.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()}  # fmt: skip


def restore_optimizer(
    optimizer: torch.optim.Optimizer, module: nn.Module, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Put flat `parameter/key` tensors back; each on its parameter's device (a fused AdamW wants `step` there too)."""
    parameters = dict(module.named_parameters())
    for flat, tensor in tensors:
        name, key = flat.rsplit("/", 1)
        counted = tensor.dtype == torch.int64 and tensor.ndim == 0  # bitsandbytes counts its steps in Python
        value = tensor.item() if counted else tensor.to(parameters[name].device, copy=True)
        optimizer.state[parameters[name]][key] = value


class EMA:
    """Exponential moving averages of a module's trained weights by name, in `tensors`; none when the decay is 0. With
    `warmup` the decay of step t is min(decay, (1 + t) / (10 + t)), so that the first weights are soon forgotten (with
    0.997 alone they are still 64 % after 150 steps), and BatchNorm's running statistics are averaged too."""

    def __init__(self, module: nn.Module, decay: float, warmup: bool = False, every: int = 1) -> None:
        self._module, self._decay, self._warmup, self._every = module, decay, warmup, every
        self.tensors = {name: tensor.detach().clone() for name, tensor in self._averaged() if decay}

    def _averaged(self) -> list[tuple[str, Tensor]]:
        saved = self._module.state_dict().keys() if self._warmup else ()
        buffers = [(name, x) for name, x in self._module.named_buffers() if name in saved and x.is_floating_point()]
        return [*((name, x) for name, x in self._module.named_parameters() if x.requires_grad), *buffers]

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        tensors = self._averaged() if self.tensors else []
        return [(local(self.tensors[name]), local(tensor.detach())) for name, tensor in tensors]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average = decay * average + (1 - decay) * weight; the weights after the first step (0) begin it. With
        `every` n it is done each n-th step, with the n-th power of the decay: the others save the pass."""
        if not self.tensors or step % self._every:
            return
        averages, weights = map(list, zip(*self._pairs(), strict=True))
        if step == 0:
            torch._foreach_copy_(averages, weights)
        else:
            decay = min(self._decay, (1 + step) / (10 + step)) if self._warmup else self._decay
            get_ema_multi_avg_fn(decay**self._every)(averages, weights, step)

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap live weights and averages in place; optimizers and wrappers hold references to the storage."""
        for average, weight in self._pairs():
            live = weight.clone()
            weight.copy_(average)
            average.copy_(live)

    @torch.no_grad()
    def restore(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Averages by name. ArtifactError: some are missing."""
        missing = set(self.tensors)
        for name, tensor in tensors:
            if name in self.tensors:
                local(self.tensors[name]).copy_(local(tensor))
                missing.remove(name)
        if missing:
            at = ", ".join(sorted(missing)[:5])
            raise ArtifactError(f"the checkpoint lacks averages of {len(missing)} tensors", at=at,
                                fix="train into a new folder", code="BF-ART-007")  # fmt: skip

    def whole(self, raw: bool = False) -> dict[str, Tensor]:
        """The module's state dict without what is frozen: averages where there are any, or with `raw` live weights.
        All processes call it; its tensors are whole in the first, and {} in the others."""
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
