"""Orders, mask ratios and the cosine schedule of masked autoregression (MAR, arXiv 2406.11838).

The Bifrost-1 paper masks as MAR does; the module that did it is missing from the published code, so this is MAR's.
Legend: B batch, P patches. In a mask, True is to be predicted.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def sample_mask_ratio(
    n: int, generator: torch.Generator, mean: float = 1.0, sd: float = 0.25, low: float = 0.7, high: float = 1.0
) -> Tensor:
    """Mask ratios from a normal distribution truncated to [low, high] (MAR, section 4.2).

    Returns:
        n ratios, float64 on the CPU; one uniform number is drawn from the generator for each.

    Raises:
        ValueError: ends out of order or outside [0, 1], or sd not above 0.
    """
    if not (0.0 <= low <= high <= 1.0 and sd > 0):
        raise ValueError(f"mask ratios need 0 <= low <= high <= 1 and sd > 0, not low={low}, high={high}, sd={sd}")
    below, above = (_normal_cdf((edge - mean) / sd) for edge in (low, high))
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    ratio = mean + sd * math.sqrt(2) * torch.erfinv(2 * (below + uniform * (above - below)) - 1)
    return ratio.clamp(low, high)


def random_orders(batch: int, patches: int, generator: torch.Generator) -> Tensor:
    """A random order of the patches for each image, orders_BP int64; decoding reveals it from its end to its start."""
    return torch.stack([torch.randperm(patches, generator=generator) for _ in range(batch)])


def raster_orders(batch: int, patches: int) -> Tensor:
    """Reading order for every image, orders_BP int64: decoding reveals the top left patch first."""
    return torch.arange(patches - 1, -1, -1).expand(batch, -1)


def mask_from_orders(orders_BP: Tensor, masked_count_B: Tensor) -> Tensor:
    """masked_BP bool: the first masked_count entries of each order are masked."""
    rank_P = torch.arange(orders_BP.shape[1], device=orders_BP.device)
    first_BP = rank_P < masked_count_B.to(orders_BP.device)[:, None]
    return torch.zeros_like(first_BP).scatter(1, orders_BP, first_BP)


def draw_masks(
    batch: int,
    patches: int,
    generator: torch.Generator,
    mean: float = 1.0,
    sd: float = 0.25,
    low: float = 0.7,
    high: float = 1.0,
) -> Tensor:
    """Training masks, masked_BP bool: in each image ceil(P * ratio) random patches, at least one.

    The other arguments are those of `sample_mask_ratio`.
    """
    ratio_B = sample_mask_ratio(batch, generator, mean, sd, low, high)
    count_B = (ratio_B * patches).ceil().long().clamp(1, patches)
    return mask_from_orders(random_orders(batch, patches, generator), count_B)


def mask_schedule(patches: int, steps: int) -> list[int]:
    """How many patches are still masked after each decode step: MaskGIT's cosine schedule, as MAR uses it.

    After step s (from 0) of K it is max(1, min(previous - 1, floor(P * cos(pi/2 * (s+1)/K)))), but 0 after the last.
    With more steps than patches, some steps reveal nothing.

    Raises:
        ValueError: fewer than one patch or step.
    """
    if patches < 1 or steps < 1:
        raise ValueError(f"a schedule needs at least one patch and one step, not {patches} and {steps}")
    masked, previous = [], patches
    for step in range(steps - 1):
        # The expression and its rounding are the published ones: a floor can hang on the last bit of the cosine.
        cosine = int(np.floor(patches * np.cos(math.pi / 2.0 * (step + 1) / steps)))
        previous = max(1, min(previous - 1, cosine))
        masked.append(previous)
    return [*masked, 0]


def _normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))
