"""Tensors from main memory to the device, without waiting for what the device still has to do.

A plain `.to("cuda")` from pageable memory waits for everything that is queued on the stream; from pinned memory it need
not, and the copy runs beside the computation.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in memory that is locked for transfers to `device`, where that is a GPU; else itself."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor.to(device)`, which the host does not wait for where both are known."""
    return pinned(tensor, device).to(device, non_blocking=device.type == "cuda" and tensor.device.type == "cpu")
