"""Confidence intervals of shares and means, and the principal axes of latents.

Suffixes: N tokens, B images, P patches, C channels, K components.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Z95 = 1.959963984540054  # 97.5 % point of the normal distribution


def wilson(right: int, count: int, *, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval for a share (Wilson 1927); inside [0, 1] for 0 or n right, too.

        (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)

    ValueError: no trials, or `right` outside 0..count.
    """
    if count < 1 or not 0 <= right <= count:
        raise ValueError(f"{right} of {count} is not a share")
    low, high = _score_interval(right / count, count, z)
    return 0.0 if right == 0 else low, 1.0 if right == count else high


def _score_interval(share: float, trials: float, z: float) -> tuple[float, float]:
    weight = z * z / trials
    centre, spread = share + weight / 2, sqrt(weight * (share * (1 - share) + weight / 4))
    return (centre - spread) / (1 + weight), (centre + spread) / (1 + weight)


def clustered_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Standard error of a mean of values that depend on each other within clusters, such as the images of a prompt.

        sqrt(G/(G-1) sum_g (sum_{i in g} (x_i - mean))^2) / n                  Miller 2024, section 2.2 (G clusters)

    `clusters` holds that of each of the n values; with one value a cluster the result is the ordinary standard error,
    for a single cluster 0.0. ValueError: no values, or another number of clusters."""
    if not values or len(values) != len(clusters):
        raise ValueError(f"{len(values)} values in {len(clusters)} clusters have no mean")
    mean = sum(values) / len(values)
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    if len(sums) < 2:
        return 0.0
    return sqrt(len(sums) / (len(sums) - 1) * sum(total**2 for total in sums.values())) / len(values)


def clustered_interval(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float]:
    """95 % interval of a mean of values in [0, 1] that belong together in clusters, such as the images of one prompt.

    Wilson's interval for as many independent trials as would have the clustered error, p (1 - p) / error^2 (Dean and
    Pagano 2015, "effective sample size"). Where all clusters agree, each counts as one trial: never of width zero.

    `values` are right (1) or wrong (0), or scores between; with one value a cluster and right or wrong it is Wilson's.
    """
    binary, groups = set(values) <= {0, 1}, len(set(clusters))
    if binary and groups == len(values):
        return wilson(int(sum(values)), groups)
    error, mean = clustered_error(values, clusters), sum(values) / len(values)
    trials = mean * (1 - mean) / error**2 if error > 1e-9 else groups
    low, high = _score_interval(mean, min(trials, len(values)) if binary else trials, Z95)
    return max(0.0, min(low, mean)), min(1.0, max(high, mean))


def seed_interval(values: Sequence[float], *, low: float = -np.inf, high: float = np.inf) -> tuple[float, float]:
    """Student's 95 % interval over k seeds, mean -+ t(0.975, k - 1) s / sqrt(k); wide for three seeds.

    It is cut at the smallest and largest possible values `low` and `high`. ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs at least 2 values; here are {len(values)}")
    from scipy.special import stdtrit

    half = float(stdtrit(len(values) - 1, 0.975)) * float(np.std(values, ddof=1)) / np.sqrt(len(values))
    mean = float(np.mean(values))
    return max(low, mean - half), min(high, mean + half)


def share_interval(shares: Sequence[float], trials: int) -> tuple[float, float]:
    """`seed_interval` of shares, but never of width zero: that all seeds agree is no certainty.

    Where all shares are 0 (or 1) it is the exact one-sided 95 % bound of Clopper and Pearson 1934: 0 to
    1 - 0.05^(1/n); where they agree in between, Wilson's interval.

    Args:
        shares: share of successes of each seed, in [0, 1].
        trials: n, the independent trials of one seed; the seeds may share their prompts, so they do not add up.
    """
    if len(set(shares)) > 1:
        return seed_interval(shares, low=0.0, high=1.0)
    bound = 1 - 0.05 ** (1 / trials)
    if shares[0] in (0.0, 1.0):
        return (0.0, bound) if shares[0] == 0.0 else (1 - bound, 1.0)
    return wilson(round(shares[0] * trials), trials)


def principal_axes(tokens_NC: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean (C,) and `count` unit axes (C, K) of tokens (N, C), the widest first, float64.

    Fewer axes come back for fewer tokens or channels; the entries of an axis sum to more than 0.
    """
    import torch  # 2 s that intervals do without

    mean_C = tokens_NC.double().mean(0)
    centred_NC = tokens_NC.double() - mean_C
    if centred_NC.shape[0] <= centred_NC.shape[1]:  # the Gram matrix or the covariance, whichever is smaller
        vectors = torch.linalg.eigh(centred_NC @ centred_NC.T).eigenvectors[:, -count:]
        axes_CK = torch.nn.functional.normalize(centred_NC.T @ vectors, dim=0).flip(1)
    else:
        axes_CK = torch.linalg.eigh(centred_NC.T @ centred_NC).eigenvectors[:, -count:].flip(1)
    return mean_C, axes_CK * torch.where(axes_CK.sum(0) < 0, -1.0, 1.0)


def as_colours(latents_BPC: Tensor, mean_C: Tensor, axes_CK: Tensor, scale_K: Tensor) -> Tensor:
    """The first three principal components as red, green and blue, uint8 (B, P, 3).

    Of K unit axes, at most 3, `scale_K` is the standard deviation along each; two of them lead from grey to either end.
    """
    import torch

    parts_BPK = (latents_BPC.double() - mean_C) @ axes_CK / scale_K.clamp_min(1e-12) / 4 + 0.5
    colours_BPK = (parts_BPK.clamp(0, 1) * 255).round().byte()
    return torch.nn.functional.pad(colours_BPK, (0, 3 - colours_BPK.shape[-1]), value=127)
