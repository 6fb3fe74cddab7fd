"""A number measured under several seeds: its mean and a 95 % interval for the mean of all seeds.

Comes in: one value a seed. Goes out: bounds. Does not know what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import t


def seed_interval(values: Sequence[float], *, low: float = -np.inf, high: float = np.inf) -> tuple[float, float]:
    """Student's interval over seeds, mean -+ t(0.975, k - 1) s / sqrt(k), cut to what is possible (`low`, `high`).

    It is wide for three seeds, as it should be. ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} seeds say nothing about how seeds differ")
    half = float(t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / np.sqrt(len(values))
    mean = float(np.mean(values))
    return max(low, mean - half), min(high, mean + half)
