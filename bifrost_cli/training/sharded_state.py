"""Named tensors that are in parts, one for each process: written, read by any number of processes, spread from one.

They are safetensors files, one a process, written by torch.distributed.checkpoint. Its default storage writes a pickle
(`.metadata`), which may not be read from a shared place; its Hugging Face storage keeps the offsets in the safetensors
headers, and is what is used here. Needs torch 2.8. The caller checks the bytes.
"""

from __future__ import annotations

import errno
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor, distribute_tensor

from bifrost_cli.artifacts.files import disk_errors
from bifrost_cli.runtime import distributed

Groups = dict[str, dict[str, Tensor]]


def sharded(module: nn.Module) -> bool:
    """True when the module's parameters are in parts."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def write_shards(folder: Path, groups: Groups) -> None:
    """Each process writes its parts into `folder`; all must call. DiskFull in all when it does not fit for one."""
    flat = {
        f"{group}/{name}": tensor if isinstance(tensor, DTensor) else tensor.clone()  # two groups may share a buffer
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }
    try:
        dcp.save(flat, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except dcp.CheckpointException as error:
        with disk_errors(folder):
            raise _cause(error) from error


def read_shards(folder: Path, module: nn.Module, group: str) -> dict[str, Tensor]:
    """A group of what `write_shards` wrote, by however many processes: whole tensors, or this process's parts when
    `module` is sharded, of which each then reads no more than it holds."""
    metadata: dict[str, Any] = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    like = _like(module)
    flat = {name: like(name, about.size, about.properties.dtype)
            for name, about in metadata.items() if name.startswith(f"{group}/")}  # fmt: skip
    if not flat:
        return {}
    reader = dcp.HuggingFaceStorageReader(str(folder))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is no mistake
        dcp.load(flat, storage_reader=reader, no_dist=not sharded(module))
    return _grouped(flat).get(group, {})


def spread(groups: Groups | None, module: nn.Module) -> Groups:
    """The first process's groups (the others give None) in all: whole, or in parts when `module` is sharded.

    One tensor at a time, so that no other process ever holds them whole beside its parts.
    """
    if distributed.world() == 1:
        return groups or {}
    flat = {f"{group}/{name}": tensor for group, tensors in (groups or {}).items() for name, tensor in tensors.items()}
    about = distributed.run_on_main(lambda: [(name, tensor.shape, tensor.dtype) for name, tensor in flat.items()])
    like = _like(module)
    parts: dict[str, Tensor] = {}
    for name, shape, dtype in about:
        whole = flat[name] if name in flat else torch.empty(shape, dtype=dtype)
        part = like(name, shape, dtype)
        if isinstance(part, DTensor):
            parts[name] = distribute_tensor(whole.to(part.device), part.device_mesh, part.placements)
        else:
            dist.broadcast(whole, 0)
            parts[name] = whole
    return _grouped(parts)


def _like(module: nn.Module) -> Callable[..., Tensor]:
    """A tensor to fill for `group/parameter` or `group/parameter/key`: in parts where its parameter is."""
    parameters = dict(module.named_parameters())

    def make(flat: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        parts = flat.split("/")
        owner = parameters.get(parts[1])
        if isinstance(owner, DTensor) and owner.shape == shape:
            return torch.zeros_like(owner, dtype=dtype).detach()
        return torch.zeros(shape, dtype=dtype)

    return make


def _grouped(flat: dict[str, Tensor]) -> Groups:
    groups: Groups = {}
    for name, tensor in flat.items():
        group, _, rest = name.partition("/")
        groups.setdefault(group, {})[rest] = tensor
    return groups


def _cause(error: Any) -> BaseException:
    """The first process's own exception; an OSError is rebuilt, so that its number is understood."""
    cause = next(iter(error.failures.values()))[0]
    while not isinstance(cause, OSError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if "No space left" in str(cause) and not isinstance(cause, OSError):
        return OSError(errno.ENOSPC, "No space left on device")
    return cause
