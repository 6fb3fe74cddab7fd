"""Random numbers for rows of a batch that several processes share: drawn for the whole batch, and cut, so that a row's
do not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class RowSlice(NamedTuple):
    """This process has the rows from `first` on of a batch of `total`; every process has an equal generator."""

    generator: torch.Generator
    first: int
    total: int


NoiseSource = torch.Generator | RowSlice


def normal(
    shape: tuple[int, ...] | torch.Size, source: NoiseSource, draw: Callable[..., Tensor] = torch.randn
) -> Tensor:
    """N(0, 1) float32 of `shape` on the generator's device; the first dimension counts rows."""
    generator, first, total = source if isinstance(source, RowSlice) else (source, 0, shape[0])
    drawn = draw((total, *shape[1:]), generator=generator, device=generator.device)
    return drawn[first : first + shape[0]]


def uniform(shape: tuple[int, ...] | torch.Size, source: NoiseSource) -> Tensor:
    """As `normal`, uniform on [0, 1)."""
    return normal(shape, source, torch.rand)
