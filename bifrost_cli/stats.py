"""How sure a share or a mean is: Wilson's interval for k right out of n, and the standard error of clustered values.

Comes in: counts or values. Goes out: bounds, or an error. Does not know what was counted.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import sqrt

import numpy as np
import torch
from scipy.stats import t
from torch import Tensor

Z95 = 1.959963984540054  # 97.5 % point of the normal distribution


def wilson(right: int, count: int, *, z: float = Z95) -> tuple[float, float]:
    """Bounds of Wilson's score interval for a share (Wilson 1927); inside [0, 1] also for 0 or n right.

        (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)

    ValueError: no trials, or `right` outside 0..count.
    """
    if count < 1 or not 0 <= right <= count:
        raise ValueError(f"{right} right out of {count} is not a share")
    share, weight = right / count, z * z / count
    centre = share + weight / 2
    spread = sqrt(weight * (share * (1 - share) + weight / 4))
    low = 0.0 if right == 0 else (centre - spread) / (1 + weight)
    high = 1.0 if right == count else (centre + spread) / (1 + weight)
    return low, high


def clustered_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Standard error of a mean whose values belong together in clusters, such as the images of one prompt.

        sqrt(G/(G-1) sum_g (sum_{i in g} (x_i - mean))^2) / n                  Miller 2024, section 2.2 (G clusters)

    With one value a cluster it is the ordinary standard error; 0.0 for a single cluster. ValueError: no values.
    """
    if not values or len(values) != len(clusters):
        raise ValueError(f"{len(values)} values in {len(clusters)} clusters have no mean")
    mean, sums = sum(values) / len(values), {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    if len(sums) < 2:
        return 0.0
    return sqrt(len(sums) / (len(sums) - 1) * sum(total**2 for total in sums.values())) / len(values)


def seed_interval(values: Sequence[float], *, low: float = -np.inf, high: float = np.inf) -> tuple[float, float]:
    """Student's interval over seeds, mean -+ t(0.975, k - 1) s / sqrt(k), cut to what is possible (`low`, `high`).

    It is wide for three seeds, as it should be. ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} seeds say nothing about how seeds differ")
    half = float(t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / np.sqrt(len(values))
    mean = float(np.mean(values))
    return max(low, mean - half), min(high, mean + half)


def principal_axes(tokens_NC: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean (C,) and unit axes (C, K), the widest first, float64; K is `count`, or fewer for fewer tokens or channels.

    From the Gram matrix or the covariance, whichever is smaller. An axis points where its entries sum to more than 0.
    """
    tokens_NC = tokens_NC.double()
    mean_C = tokens_NC.mean(0)
    centred_NC = tokens_NC - mean_C
    tokens, channels = centred_NC.shape
    if tokens <= channels:
        vectors = torch.linalg.eigh(centred_NC @ centred_NC.T).eigenvectors[:, -count:]
        axes_CK = torch.nn.functional.normalize(centred_NC.T @ vectors, dim=0)
    else:
        axes_CK = torch.linalg.eigh(centred_NC.T @ centred_NC).eigenvectors[:, -count:]
    axes_CK = axes_CK.flip(1)
    return mean_C, axes_CK * torch.where(axes_CK.sum(0) < 0, -1.0, 1.0)


def as_colours(latents_BPC: Tensor, mean_C: Tensor, axes_CK: Tensor, scale_K: Tensor) -> Tensor:
    """uint8 (B, P, 3): the first three components as red, green and blue, two of `scale` from grey to either end."""
    parts_BPK = (latents_BPC.double() - mean_C) @ axes_CK / scale_K.clamp_min(1e-12) / 4 + 0.5
    colours_BPK = (parts_BPK.clamp(0, 1) * 255).round().byte()
    return torch.nn.functional.pad(colours_BPK, (0, 3 - colours_BPK.shape[-1]), value=127)
