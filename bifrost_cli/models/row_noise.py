"""Random numbers for rows of a batch that is spread over several processes.

They are drawn for the whole batch and cut, so that a row's do not depend on the number of processes.
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


def normal(shape: tuple[int, ...] | torch.Size, source: NoiseSource) -> Tensor:
    """N(0, 1) float32 of `shape` on the generator's device; the first dimension counts rows.

    A `RowSlice` costs the draw of the whole batch: 0.01 s for a million numbers.
    """
    return _cut(torch.randn, shape, source)


def uniform(shape: tuple[int, ...] | torch.Size, source: NoiseSource) -> Tensor:
    """As `normal`, uniform on [0, 1)."""
    return _cut(torch.rand, shape, source)


def _cut(draw: Callable[..., Tensor], shape: tuple[int, ...] | torch.Size, source: NoiseSource) -> Tensor:
    generator, first, total = source if isinstance(source, RowSlice) else (source, 0, shape[0])
    drawn = draw((total, *shape[1:]), generator=generator, device=generator.device)
    return drawn[first : first + shape[0]]
