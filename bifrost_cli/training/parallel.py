"""A module that several processes train together: PyTorch's DDP or FSDP2 around it, batch statistics over all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.distributed.tensor import DTensor

from bifrost_cli.runtime import distributed


class Parallel:
    """`module` in all processes of the job; with `fsdp` each holds a part of every tensor, cut along its first
    dimension, and gathers a layer when it is needed (`sharded`), in float32 or, with `precision` bf16, in bfloat16:
    half of the traffic. Parts, gradients and their sums are float32. With one process nothing is wrapped."""

    def __init__(self, module: nn.Module, kind: str, device: torch.device, precision: str = "fp32") -> None:
        self._around: nn.Module | None = None
        self.sharded: list[Any] = []
        if distributed.world() == 1:
            return
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.__class__ = _SharedBatchNorm  # the same parameters and buffers, under the same names
        self._around = _Call(module)
        if kind != "fsdp":
            # A ControlNet without single blocks leaves some of its last block unused. Without the search for such
            # tensors DDP would sort its buckets anew after the first step: three processes would then sum in another
            # order after a resume than without one.
            self._around = nn.parallel.DistributedDataParallel(self._around, find_unused_parameters=True)
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(device.type, (distributed.world(),))
        with torch.no_grad():  # the first process's weights everywhere, as DDP does when it is made
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, 0)
        layers = [layer for layer in _layers(module) if any(True for _ in layer.parameters())]
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # autocast sees to them
        if precision == "bf16":
            policy = replace(policy, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(self._around, mesh=mesh, reshard_after_forward=True)
        self.sharded = [self._around, *layers]

    def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """`work(*arguments)`, which calls the module, inside the wrapper's forward pass."""
        return work(*arguments) if self._around is None else self._around(work, *arguments)

    def summing(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward: gradients are averaged over the processes only with the step's last."""
        if isinstance(self._around, nn.parallel.DistributedDataParallel) and not last:
            return self._around.no_sync()
        for module in self.sharded[:1]:
            module.set_requires_gradient_sync(last)
        return nullcontext()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Every process holds the whole module meanwhile: decoding uses parts of layers outside their forward pass."""
        for module in self.sharded:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in self.sharded:
                module.reshard()
                module.set_reshard_after_forward(True, recurse=False)


class _Call(nn.Module):
    """Its forward pass is any function that uses `module`: both wrappers act on forward passes alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The repeated layers: elements of the outermost lists."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _layers(child)


def local(tensor: Tensor) -> Tensor:
    """This process's part; the tensor itself when it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of it, in every process; all must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class _SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the rows of all processes, so that a batch means the same however many share it; PyTorch's own
    SyncBatchNorm needs a GPU. Two sums, not one of squares: a mean that is large beside the deviation would cancel."""

    def _check_input_dim(self, value: Tensor) -> None:
        pass

    def forward(self, value: Tensor) -> Tensor:
        if not self.training:
            return super().forward(value)
        along = [d for d in range(value.ndim) if d != 1]
        shape = [1, -1, *[1] * (value.ndim - 2)]
        wide = value.float()
        count = distributed.world() * value.numel() // value.shape[1]
        mean_C = all_reduce(wide.sum(along)) / count
        centred = wide - mean_C.view(shape)
        variance_C = all_reduce(centred.square().sum(along)) / count
        with torch.no_grad():
            assert self.num_batches_tracked is not None and self.momentum is not None
            assert self.running_mean is not None and self.running_var is not None
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean_C, self.momentum)
            self.running_var.lerp_(variance_C * count / (count - 1), self.momentum)
        scaled = centred * torch.rsqrt(variance_C + self.eps).view(shape)
        return (scaled * self.weight.view(shape) + self.bias.view(shape)).to(value.dtype)
