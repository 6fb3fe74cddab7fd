"""The Frechet distance between two Gaussians, in float64.

Comes in: features (N, D) of two sets of images, or the moments of a set. Goes out: the distance, its standard error
and its limit for N -> infinity. Does not know what an image, a network or a file is.

    FD = |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))          Heusel et al. 2017, eq. 6

The last trace is a nuclear norm: for any factors S1 = A'A and S2 = B'B it is the sum of the singular values of A B'.
With A the centred features over sqrt(N-1) this is exact for fewer samples than dimensions; with A = S^(1/2) it is
tr(eigvalsh(S1^1/2 S2 S1^1/2)^1/2) without the squaring that costs half of the digits of singular covariances.

Shapes: N samples, D features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bifrost_cli.errors import DataError

Array = np.ndarray


@dataclass(frozen=True)
class Gaussian:
    """The moments of one set, and a factor F (R, D) with F'F = covariance."""

    mean_D: Array
    covariance_DD: Array
    factor_RD: Array
    count: int


def gaussian(features_ND: Array) -> Gaussian:
    """Moments of features (N, D); the unbiased covariance (N - 1).

    DataError: fewer than two rows, or a value that is not finite.
    """
    features_ND = np.asarray(features_ND, dtype=np.float64)
    if features_ND.ndim != 2:
        raise ValueError(f"features must be (N, D), not {features_ND.shape}")
    count, width = features_ND.shape
    if count < 2:
        raise DataError(f"a covariance needs at least 2 samples, got {count}", code="BF-DATA-008")
    _finite(features_ND, "feature matrix")
    mean_D = features_ND.mean(axis=0)
    centred_ND = (features_ND - mean_D) / np.sqrt(count - 1)
    with np.errstate(over="ignore", invalid="ignore"):
        covariance_DD = centred_ND.T @ centred_ND
    _finite(covariance_DD, "covariance")
    factor_RD = centred_ND if count < width else square_root(covariance_DD)
    return Gaussian(mean_D, covariance_DD, factor_RD, count)


def from_moments(mean_D: Array, covariance_DD: Array, count: int) -> Gaussian:
    """A Gaussian of saved moments: mean (D,), covariance (D, D).

    DataError: not finite, shapes that do not fit, not symmetric, or an eigenvalue below -1e-6 of the largest.
    """
    mean_D, covariance_DD = np.asarray(mean_D, dtype=np.float64), np.asarray(covariance_DD, dtype=np.float64)
    if mean_D.ndim != 1 or covariance_DD.shape != (mean_D.size, mean_D.size):
        raise DataError(f"mean {mean_D.shape} and covariance {covariance_DD.shape} do not fit", code="BF-DATA-009")
    _finite(mean_D, "mean")
    _finite(covariance_DD, "covariance")
    scale = np.abs(covariance_DD).max(initial=0.0)
    if np.abs(covariance_DD - covariance_DD.T).max(initial=0.0) > 1e-6 * scale:
        raise DataError("the covariance is not symmetric", code="BF-DATA-009")
    return Gaussian(mean_D, covariance_DD, square_root(covariance_DD), count)


def square_root(covariance_DD: Array) -> Array:
    """The symmetric root of a covariance (D, D).

    Eigenvalues within rounding of zero count as zero: the root of a rounding error of 1e-16 would be 1e-8.
    """
    values_D, vectors_DD = np.linalg.eigh((covariance_DD + covariance_DD.T) / 2)
    largest = max(values_D[-1], 0.0)
    if values_D[0] < -1e-6 * largest or (largest == 0.0 and values_D[0] < 0.0):
        raise DataError(f"the covariance has a negative eigenvalue: {values_D[0]:g}", code="BF-DATA-009")
    values_D[values_D < values_D.size * np.finfo(np.float64).eps * largest] = 0.0
    return (vectors_DD * np.sqrt(values_D)) @ vectors_DD.T


def frechet(first: Gaussian, second: Gaussian) -> float:
    """The distance as computed; rounding may leave it a little below zero, see `shown`.

    Errors: ValueError when the widths differ; DataError when the result is not finite.
    """
    if first.mean_D.size != second.mean_D.size:
        raise ValueError(f"features of different widths: {first.mean_D.size} and {second.mean_D.size}")
    with np.errstate(over="ignore"):
        shift = float(np.sum((first.mean_D - second.mean_D) ** 2))
    overlap = float(np.linalg.svd(first.factor_RD @ second.factor_RD.T, compute_uv=False).sum())
    distance = shift + float(np.trace(first.covariance_DD) + np.trace(second.covariance_DD)) - 2.0 * overlap
    if not np.isfinite(distance):
        raise DataError("the Frechet distance overflowed: the features are too large", code="BF-DATA-009")
    return distance


def shown(raw: float) -> float:
    """The value to print: a distance is never negative, nor minus zero."""
    return max(raw, 0.0) + 0.0


def jackknife_error(features_ND: Array, reference: Gaussian, *, blocks: int = 10) -> float:
    """Standard error of the distance by leaving out one of `blocks` disjoint blocks at a time.

    A bootstrap would not do: it adds a second copy of the small-sample bias, so that its interval misses the value.
    """
    blocks = min(blocks, len(features_ND) // 2)
    if blocks < 2:
        raise DataError(f"a jackknife needs at least 4 samples, got {len(features_ND)}", code="BF-DATA-008")
    block_N = np.arange(len(features_ND)) % blocks
    values = [frechet(gaussian(features_ND[block_N != block]), reference) for block in range(blocks)]
    return float(np.sqrt((blocks - 1) * np.var(values)))


def frechet_at_infinity(features_ND: Array, reference: Gaussian, *, seed: int = 0, points: int = 15) -> float:
    """The limit for N -> infinity samples: a line in 1/N through `points` seeded subsets (Chong & Forsyth 2020).

    Removes the bias of the generated side only; the reference's own share stays.
    """
    count = len(features_ND)
    sizes = np.unique(np.linspace(max(2, count // 4), count, points).astype(int))
    if len(sizes) < 2:
        raise DataError(f"the limit needs more than {count} samples", code="BF-DATA-008")
    generator = np.random.Generator(np.random.PCG64(seed))
    values = [frechet(gaussian(features_ND[np.sort(generator.permutation(count)[:size])]), reference) for size in sizes]
    slope, limit = np.polyfit(1.0 / sizes, values, 1)
    return float(limit)


def _finite(values: Array, what: str) -> None:
    if not np.isfinite(values).all():
        count = int(np.size(values) - np.isfinite(values).sum())
        raise DataError(f"the {what} holds {count} values that are not finite (NaN or infinity)", code="BF-DATA-009")
