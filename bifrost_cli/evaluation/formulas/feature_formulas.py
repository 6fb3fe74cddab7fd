"""Kernel distance (KID), precision and recall, density and coverage, and the Inception score, in float64 NumPy.

    KID = E k(x, x') + E k(y, y') - 2 E k(x, y),  k(x, y) = (x . y / D + 1)^3      Binkowski et al. 2018, eqs. 3 and 4
    IS = exp E_x KL(p(y|x) || p(y))                                                Salimans et al. 2016, section 4

KID has no small-sample bias: of two equal distributions it is as often below zero as above.
Shapes: N and M images, D features, K classes.
"""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp

from bifrost_cli.errors import DataError

_BLOCK = 2048  # rows of a matrix of pairs held at once


def kernel_distance(first_ND: np.ndarray, second_MD: np.ndarray) -> float:
    """The unbiased estimate over all images; memory does not grow with N * M. DataError: fewer than two images."""
    first_ND, second_MD = _checked(first_ND, 2, "kernel distances"), _checked(second_MD, 2, "kernel distances")
    between = _kernel_sum(first_ND, second_MD) / (len(first_ND) * len(second_MD))
    return _mean_within(first_ND) + _mean_within(second_MD) - 2.0 * between


def subset_distances(
    first_ND: np.ndarray, second_MD: np.ndarray, *, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> np.ndarray:
    """The estimates of `subsets` random subsets of `size` images of each side, drawn as torch-fidelity draws them.

    Their mean is the printed KID; their deviation says how subsets spread, not how sure the mean is.
    DataError: fewer images than `size`.
    """
    for side in (first_ND, second_MD):
        _checked(side, size, f"subsets of {size} images")
    draws = np.random.RandomState(seed)
    values = np.empty(subsets)
    for index in range(subsets):
        chosen = draws.choice(len(first_ND), size, replace=False), draws.choice(len(second_MD), size, replace=False)
        values[index] = kernel_distance(first_ND[chosen[0]], second_MD[chosen[1]])
    return values


def kernel_error(first_ND: np.ndarray, second_MD: np.ndarray, *, blocks: int = 10) -> float:
    """Standard error of `kernel_distance` for its first side: leaving out one of `blocks` disjoint blocks at a time."""
    blocks = min(blocks, len(_checked(first_ND, 4, "jackknife errors")) // 2)
    block_N = np.arange(len(first_ND)) % blocks
    values = [kernel_distance(first_ND[block_N != block], second_MD) for block in range(blocks)]
    return float(np.sqrt((blocks - 1) * np.var(values)))


def _kernel_sum(first_ND: np.ndarray, second_MD: np.ndarray) -> float:
    width = first_ND.shape[1]
    blocks = range(0, len(first_ND), _BLOCK)
    return float(sum(((first_ND[at : at + _BLOCK] @ second_MD.T / width + 1.0) ** 3).sum() for at in blocks))


def _mean_within(features_ND: np.ndarray) -> float:
    """Mean of k over pairs of different images."""
    count, width = features_ND.shape
    alone = float((((features_ND**2).sum(axis=1) / width + 1.0) ** 3).sum())
    return (_kernel_sum(features_ND, features_ND) - alone) / (count * (count - 1))


def prdc(made_ND: np.ndarray, real_MD: np.ndarray, *, neighbours: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage; the ball of a point reaches to its k-th nearest neighbour of its set.

    Precision is the share of generated points in any reference ball, recall that of reference points in any generated
    ball (Kynkaanniemi et al. 2019, eq. 2; ADM and torch-fidelity take 3 neighbours). Density is how many reference
    balls hold a generated point, over k; coverage the share of reference balls that hold one (Naeem et al. 2020, eqs. 6
    and 7). DataError: not more images than neighbours on a side.
    """
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


def _radius(points_ND: np.ndarray, neighbours: int) -> np.ndarray:
    """Distance to the k-th nearest other point; a point is its own nearest."""
    blocks = (points_ND[at : at + _BLOCK] for at in range(0, len(points_ND), _BLOCK))
    return np.concatenate([np.partition(_distances(block, points_ND), neighbours)[:, neighbours] for block in blocks])


def _distances(first_ND: np.ndarray, second_MD: np.ndarray) -> np.ndarray:
    squares_NM = (first_ND**2).sum(1)[:, None] + (second_MD**2).sum(1) - 2.0 * first_ND @ second_MD.T
    return np.sqrt(np.maximum(squares_NM, 0.0))


def inception_scores(logits_NK: np.ndarray, *, splits: int = 10, seed: int | None = 2020) -> np.ndarray:
    """The Inception score of each of `splits` parts of the images, shuffled by `seed` (None: as they come, as ADM).

    The mean over the splits is what papers print. A split of n images cannot score above n: few images, low score.
    DataError: fewer images than splits.
    """
    logits_NK = _checked(logits_NK, splits, f"{splits} splits")
    if seed is not None:
        logits_NK = logits_NK[np.random.RandomState(seed).permutation(len(logits_NK))]
    edges = [index * len(logits_NK) // splits for index in range(splits + 1)]
    return np.array([_inception_score(logits_NK[low:high]) for low, high in zip(edges, edges[1:], strict=False)])


def _inception_score(logits_NK: np.ndarray) -> float:
    log_p_NK = logits_NK - logsumexp(logits_NK, axis=1, keepdims=True)
    log_q_K = logsumexp(log_p_NK, axis=0) - np.log(len(log_p_NK))
    divergence_N = (np.exp(log_p_NK) * (log_p_NK - log_q_K)).sum(axis=1)
    return float(np.exp(divergence_N.mean()))


def _checked(features_ND: np.ndarray, least: int, what: str) -> np.ndarray:
    """As float64. DataError: fewer rows than `least`, or a value that is not finite."""
    features_ND = np.asarray(features_ND, np.float64)
    if len(features_ND) < least:
        raise DataError(f"{what} need at least {least} images, got {len(features_ND)}", code="BF-DATA-008")
    if not np.isfinite(features_ND).all():
        raise DataError("the features hold values that are not finite (NaN or infinity)", code="BF-DATA-009")
    return features_ND
