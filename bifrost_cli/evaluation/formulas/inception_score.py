"""The Inception score: how sure a classifier is of each image, and how varied its answers are over all.

Comes in: logits (N, K). Goes out: the score of each split. Does not know which classifier.

    IS = exp E_x KL(p(y|x) || p(y))                                          Salimans et al. 2016, section 4

Shapes: N images, K classes.
"""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp

from bifrost_cli.errors import DataError


def inception_scores(logits_NK: np.ndarray, *, splits: int = 10, seed: int | None = 2020) -> np.ndarray:
    """The score of each of `splits` parts of the images, shuffled by `seed` (None: as they come, ADM's way).

    The mean over the splits is what papers print. A split of n images cannot score above n: few images, low score.
    DataError: fewer images than splits, or logits that are not finite.
    """
    logits_NK = np.asarray(logits_NK, np.float64)
    if len(logits_NK) < splits:
        raise DataError(f"{splits} splits need at least as many images, not {len(logits_NK)}", code="BF-DATA-008")
    if not np.isfinite(logits_NK).all():
        raise DataError("the logits hold values that are not finite (NaN or infinity)", code="BF-DATA-009")
    if seed is not None:
        logits_NK = logits_NK[np.random.RandomState(seed).permutation(len(logits_NK))]
    edges = [index * len(logits_NK) // splits for index in range(splits + 1)]
    return np.array([_score(logits_NK[low:high]) for low, high in zip(edges, edges[1:], strict=False)])


def _score(logits_NK: np.ndarray) -> float:
    log_p_NK = logits_NK - logsumexp(logits_NK, axis=1, keepdims=True)
    log_q_K = logsumexp(log_p_NK, axis=0) - np.log(len(log_p_NK))
    divergence_N = (np.exp(log_p_NK) * (log_p_NK - log_q_K)).sum(axis=1)
    return float(np.exp(divergence_N.mean()))
