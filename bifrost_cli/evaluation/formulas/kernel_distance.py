"""The kernel distance (KID): squared maximum mean discrepancy under a cubic polynomial kernel, without bias.

Comes in: features (N, D) of two sets of images. Goes out: the estimate over all images, and the mean and spread
over random subsets that papers print. Does not know what an image, a network or a file is.

    k(x, y) = (x . y / D + 1)^3,   KID = E k(x, x') + E k(y, y') - 2 E k(x, y)     Binkowski et al. 2018, eqs. 3 and 4

Unlike the Frechet distance it has no small-sample bias; of two equal distributions it is as often below zero as above.

Shapes: N M images, D features.
"""

from __future__ import annotations

import numpy as np

from bifrost_cli.errors import DataError

_BLOCK = 2048  # rows of a kernel matrix held at once


def kernel_distance(first_ND: np.ndarray, second_MD: np.ndarray) -> float:
    """The unbiased estimate over all images; memory does not grow with N * M. DataError: fewer than two pictures."""
    first_ND, second_MD = _checked(first_ND), _checked(second_MD)
    return (
        _mean_within(first_ND)
        + _mean_within(second_MD)
        - 2.0 * _kernel_sum(first_ND, second_MD) / (len(first_ND) * len(second_MD))
    )


def subset_distances(
    first_ND: np.ndarray, second_MD: np.ndarray, *, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> np.ndarray:
    """The estimates of `subsets` random subsets of `size` images of each side, drawn as torch-fidelity draws them.

    Their mean is the printed KID; their deviation says how subsets spread, not how sure the mean is.
    DataError: fewer images than `size`.
    """
    if min(len(first_ND), len(second_MD)) < size:
        raise DataError(
            f"subsets of {size} images need as many on both sides, not {len(first_ND)} and {len(second_MD)}",
            code="BF-DATA-008",
        )
    draws = np.random.RandomState(seed)
    values = np.empty(subsets)
    for index in range(subsets):
        chosen = draws.choice(len(first_ND), size, replace=False), draws.choice(len(second_MD), size, replace=False)
        values[index] = kernel_distance(first_ND[chosen[0]], second_MD[chosen[1]])
    return values


def jackknife_error(first_ND: np.ndarray, second_MD: np.ndarray, *, blocks: int = 10) -> float:
    """Standard error of `kernel_distance` for its first side: leaving out one of `blocks` disjoint blocks at a time."""
    blocks = min(blocks, len(first_ND) // 2)
    if blocks < 2:
        raise DataError(f"a jackknife needs at least 4 samples, got {len(first_ND)}", code="BF-DATA-008")
    block_N = np.arange(len(first_ND)) % blocks
    values = [kernel_distance(first_ND[block_N != block], second_MD) for block in range(blocks)]
    return float(np.sqrt((blocks - 1) * np.var(values)))


def _checked(features_ND: np.ndarray) -> np.ndarray:
    features_ND = np.asarray(features_ND, np.float64)
    if len(features_ND) < 2:
        raise DataError(f"a kernel distance needs at least 2 images, got {len(features_ND)}", code="BF-DATA-008")
    if not np.isfinite(features_ND).all():
        raise DataError("the features hold values that are not finite (NaN or infinity)", code="BF-DATA-009")
    return features_ND


def _kernel_sum(first_ND: np.ndarray, second_MD: np.ndarray) -> float:
    width = first_ND.shape[1]
    blocks = range(0, len(first_ND), _BLOCK)
    return float(sum(((first_ND[at : at + _BLOCK] @ second_MD.T / width + 1.0) ** 3).sum() for at in blocks))


def _mean_within(features_ND: np.ndarray) -> float:
    """Mean of k over pairs of different pictures."""
    count, width = features_ND.shape
    alone = float((((features_ND**2).sum(axis=1) / width + 1.0) ** 3).sum())
    return (_kernel_sum(features_ND, features_ND) - alone) / (count * (count - 1))
