"""The formulas of distances and scores, in float64 NumPy; they know no network and no file.

    FD = |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))                    Heusel et al. 2017, eq. 6
    KID = E k(x, x') + E k(y, y') - 2 E k(x, y),  k(x, y) = (x . y / D + 1)^3   Binkowski et al. 2018, eqs. 3 and 4
    IS = exp E_x KL(p(y|x) || p(y))                                             Salimans et al. 2016, section 4
    PSNR = 10 log10(255^2 / MSE)
    SSIM = mean over the image of (2 m1 m2 + C1)(2 s12 + C2) / ((m1^2 + m2^2 + C1)(s1^2 + s2^2 + C2)), Wang et al. 2004:
           Gaussian windows of 11x11 pixels and deviation 1.5, C1 = 0.01^2, C2 = 0.03^2 on [0, 1]

FD's last trace is a nuclear norm: for any factors S1 = A'A and S2 = B'B it is the sum of the singular values of A B'.
With A the centred features over sqrt(N-1) this is exact for fewer samples than dimensions; with A = S^(1/2) it is
tr(eigvalsh(S1^1/2 S2 S1^1/2)^1/2) without the squaring that costs half of the digits of singular covariances.
Shapes: N and M images, D features, R rank, K classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import correlate1d
from scipy.special import logsumexp

from bifrost_cli.errors import DataError

Array = np.ndarray
WINDOW, DEVIATION = 11, 1.5  # of SSIM
_BLOCK = 2048  # rows of a matrix of pairs held at once


@dataclass(frozen=True)
class Gaussian:
    """The moments of one set, and a factor F (R, D) with F'F = covariance."""

    mean_D: Array
    covariance_DD: Array
    factor_RD: Array
    count: int


def gaussian(features_ND: Array) -> Gaussian:
    """Moments of features (N, D), with the unbiased covariance. DataError: fewer than two rows, or not finite."""
    features_ND = np.asarray(features_ND, dtype=np.float64)
    if features_ND.ndim != 2:
        raise ValueError(f"features must be (N, D), not {features_ND.shape}")
    count, width = features_ND.shape
    if count < 2:
        raise DataError(f"a covariance needs at least 2 samples, got {count}", code="BF-DATA-008")
    _require_finite(features_ND, "feature matrix")
    mean_D = features_ND.mean(axis=0)
    centred_ND = (features_ND - mean_D) / np.sqrt(count - 1)
    with np.errstate(over="ignore", invalid="ignore"):
        covariance_DD = centred_ND.T @ centred_ND
    _require_finite(covariance_DD, "covariance")
    return Gaussian(mean_D, covariance_DD, centred_ND if count < width else _root(covariance_DD), count)


def from_moments(mean_D: Array, covariance_DD: Array, count: int) -> Gaussian:
    """Of saved moments. DataError: not finite, shapes that do not fit, not symmetric, or an eigenvalue below zero."""
    mean_D, covariance_DD = np.asarray(mean_D, dtype=np.float64), np.asarray(covariance_DD, dtype=np.float64)
    if mean_D.ndim != 1 or covariance_DD.shape != (mean_D.size, mean_D.size):
        raise DataError(f"mean {mean_D.shape} and covariance {covariance_DD.shape} do not fit", code="BF-DATA-009")
    _require_finite(mean_D, "mean")
    _require_finite(covariance_DD, "covariance")
    if np.abs(covariance_DD - covariance_DD.T).max(initial=0.0) > 1e-6 * np.abs(covariance_DD).max(initial=0.0):
        raise DataError("the covariance is not symmetric", code="BF-DATA-009")
    return Gaussian(mean_D, covariance_DD, _root(covariance_DD), count)


def _root(covariance_DD: Array) -> Array:
    """The symmetric root. Eigenvalues within rounding of zero count as zero: the root of 1e-16 would be 1e-8."""
    values_D, vectors_DD = np.linalg.eigh((covariance_DD + covariance_DD.T) / 2)
    largest = max(values_D[-1], 0.0)
    if values_D[0] < -1e-6 * largest or (largest == 0.0 and values_D[0] < 0.0):
        raise DataError(f"the covariance has a negative eigenvalue: {values_D[0]:g}", code="BF-DATA-009")
    values_D[values_D < values_D.size * np.finfo(np.float64).eps * largest] = 0.0
    return (vectors_DD * np.sqrt(values_D)) @ vectors_DD.T


def _require_finite(values: Array, what: str) -> None:
    if count := int(np.size(values) - np.isfinite(values).sum()):
        raise DataError(f"the {what} holds {count} values that are not finite (NaN or infinity)", code="BF-DATA-009")


def frechet(first: Gaussian, second: Gaussian) -> float:
    """The distance as computed; rounding may leave it a little below zero, see `shown`."""
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


def jackknife_error(features_ND: Array, distance: Callable[[Array], float], *, blocks: int = 10) -> float:
    """Standard error of a distance by leaving out one of `blocks` disjoint blocks of features at a time; a bootstrap
    would add a second copy of the small-sample bias."""
    blocks = min(blocks, len(features_ND) // 2)
    if blocks < 2:
        raise DataError(f"a jackknife needs at least 4 samples, got {len(features_ND)}", code="BF-DATA-008")
    block_N = np.arange(len(features_ND)) % blocks
    return float(np.sqrt((blocks - 1) * np.var([distance(features_ND[block_N != block]) for block in range(blocks)])))


def frechet_at_infinity(features_ND: Array, reference: Gaussian, *, seed: int = 0, points: int = 15) -> float:
    """The limit for N -> infinity samples: a line in 1/N through `points` seeded subsets (Chong & Forsyth 2020). It
    removes the bias of the generated side only."""
    count = len(features_ND)
    sizes = np.unique(np.linspace(max(2, count // 4), count, points).astype(int))
    if len(sizes) < 2:
        raise DataError(f"the limit needs more than {count} samples", code="BF-DATA-008")
    generator = np.random.Generator(np.random.PCG64(seed))
    values = [frechet(gaussian(features_ND[np.sort(generator.permutation(count)[:size])]), reference) for size in sizes]
    return float(np.polyfit(1.0 / sizes, values, 1)[1])


def kernel_distance(first_ND: Array, second_MD: Array) -> float:
    """The unbiased estimate over all images, as often below zero as above for two equal distributions; memory does not
    grow with N * M. DataError: fewer than two images."""
    first_ND, second_MD = _checked(first_ND, 2, "kernel distances"), _checked(second_MD, 2, "kernel distances")
    distance = 0.0
    for side_ND in (first_ND, second_MD):  # the mean over pairs of different images
        count, width = side_ND.shape
        alone = float((((side_ND**2).sum(axis=1) / width + 1.0) ** 3).sum())
        distance += (_kernel_sum(side_ND, side_ND) - alone) / (count * (count - 1))
    return distance - 2.0 * (_kernel_sum(first_ND, second_MD) / (len(first_ND) * len(second_MD)))


def _kernel_sum(first_ND: Array, second_MD: Array) -> float:
    width = first_ND.shape[1]
    blocks = range(0, len(first_ND), _BLOCK)
    return float(sum(((first_ND[at : at + _BLOCK] @ second_MD.T / width + 1.0) ** 3).sum() for at in blocks))


def subset_distances(first_ND: Array, second_MD: Array, *, subsets: int = 100, size: int = 1000,
                     seed: int = 2020) -> Array:  # fmt: skip
    """The estimates of random subsets of `size` images of each side, drawn as torch-fidelity draws them. Their mean is
    the printed KID; their deviation says how subsets spread, not how sure the mean is."""
    draws, values = np.random.RandomState(seed), []
    first_ND, second_MD = (_checked(side, size, f"subsets of {size} images") for side in (first_ND, second_MD))
    for _ in range(subsets):
        chosen = (side_ND[draws.choice(len(side_ND), size, replace=False)] for side_ND in (first_ND, second_MD))
        values.append(kernel_distance(*chosen))
    return np.array(values)


def prdc(made_ND: Array, real_MD: Array, *, neighbours: int = 5) -> dict[str, float]:
    """The ball of a point reaches to its k-th nearest neighbour of its set.

    Precision is the share of generated points in any reference ball, recall that of reference points in any generated
    ball (Kynkaanniemi et al. 2019, eq. 2; ADM and torch-fidelity take 3 neighbours). Density is how many reference
    balls hold a generated point, over k; coverage the share of reference balls that hold one (Naeem et al. 2020)."""
    made_ND, real_MD = (_checked(side, neighbours + 1, f"{neighbours} neighbours") for side in (made_ND, real_MD))
    made_radius_N, real_radius_M = _radius(made_ND, neighbours), _radius(real_MD, neighbours)
    in_made_M, in_real_N = np.zeros(len(real_MD), bool), np.zeros(len(made_ND), int)
    covered_M = np.zeros(len(real_MD), bool)
    for start in range(0, len(made_ND), _BLOCK):
        rows = slice(start, start + _BLOCK)
        distance_nM = _distances(made_ND[rows], real_MD)
        in_made_M |= (distance_nM <= made_radius_N[rows, None]).any(axis=0)
        inside_nM = distance_nM <= real_radius_M
        in_real_N[rows] = inside_nM.sum(axis=1)
        covered_M |= inside_nM.any(axis=0)
    return {"precision": float((in_real_N > 0).mean()), "recall": float(in_made_M.mean()),
            "density": float(in_real_N.mean() / neighbours), "coverage": float(covered_M.mean())}  # fmt: skip


def _radius(points_ND: Array, neighbours: int) -> Array:
    """Distance to the k-th nearest other point; a point is its own nearest."""
    blocks = (points_ND[at : at + _BLOCK] for at in range(0, len(points_ND), _BLOCK))
    return np.concatenate([np.partition(_distances(block, points_ND), neighbours)[:, neighbours] for block in blocks])


def _distances(first_ND: Array, second_MD: Array) -> Array:
    squares_NM = (first_ND**2).sum(1)[:, None] + (second_MD**2).sum(1) - 2.0 * first_ND @ second_MD.T
    return np.sqrt(np.maximum(squares_NM, 0.0))


def inception_scores(logits_NK: Array, *, splits: int = 10, seed: int | None = 2020) -> Array:
    """The Inception score of each of `splits` parts of the images, shuffled by `seed` (None: as they come, as ADM); a
    split of n images cannot score above n."""
    logits_NK = _checked(logits_NK, splits, f"{splits} splits")
    if seed is not None:
        logits_NK = logits_NK[np.random.RandomState(seed).permutation(len(logits_NK))]
    edges = [index * len(logits_NK) // splits for index in range(splits + 1)]
    scores = []
    for low, high in zip(edges, edges[1:], strict=False):
        log_p_NK = logits_NK[low:high] - logsumexp(logits_NK[low:high], axis=1, keepdims=True)
        log_q_K = logsumexp(log_p_NK, axis=0) - np.log(len(log_p_NK))
        scores.append(np.exp((np.exp(log_p_NK) * (log_p_NK - log_q_K)).sum(axis=1).mean()))
    return np.array(scores)


def _checked(features_ND: Array, least: int, what: str) -> Array:
    """As float64. DataError: fewer rows than `least`, or a value that is not finite."""
    features_ND = np.asarray(features_ND, np.float64)
    if len(features_ND) < least:
        raise DataError(f"{what} need at least {least} images, got {len(features_ND)}", code="BF-DATA-008")
    if not np.isfinite(features_ND).all():
        raise DataError("the features hold values that are not finite (NaN or infinity)", code="BF-DATA-009")
    return features_ND


def psnr(first_HWc: Array, second_HWc: Array) -> float:
    """In dB; infinite for equal images. ValueError: not two uint8 images of one size."""
    first, second = _pair(first_HWc, second_HWc)
    error = float(np.mean((first - second) ** 2))
    return -10.0 * float(np.log10(error)) if error else float("inf")


def ssim(first_HWc: Array, second_HWc: Array) -> float:
    """The mean over channels. ValueError as `psnr`, or a side below the window's 11 pixels."""
    first, second = _pair(first_HWc, second_HWc)
    if min(first.shape[:2]) < WINDOW:
        raise ValueError(f"SSIM needs at least {WINDOW} pixels a side, not {first.shape[:2]}")
    mean_1, mean_2 = _blur(first), _blur(second)
    variance_1, variance_2 = _blur(first**2) - mean_1**2, _blur(second**2) - mean_2**2
    covariance = _blur(first * second) - mean_1 * mean_2
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_1 * mean_2 + c1) * (2 * covariance + c2)
    return float((top / ((mean_1**2 + mean_2**2 + c1) * (variance_1 + variance_2 + c2))).mean())


def _pair(*images_HWc: Array) -> list[Array]:
    (kind, shape), (other, size) = ((image.dtype, image.shape) for image in images_HWc)
    if kind != np.uint8 or other != np.uint8 or shape != size:
        raise ValueError(f"two uint8 images of one size, not {kind} {shape} and {other} {size}")
    return [image.astype(np.float64) / 255.0 for image in images_HWc]


def _blur(values_HWc: Array) -> Array:
    """Gaussian means of whole windows: (H - 10, W - 10, c)."""
    half = WINDOW // 2
    weights = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * DEVIATION**2))
    for axis in (0, 1):
        values_HWc = correlate1d(values_HWc, weights / weights.sum(), axis=axis)
    return values_HWc[half:-half, half:-half]
