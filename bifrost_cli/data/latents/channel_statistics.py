"""Mean, standard deviation and norm of latent channels, shard by shard.

In: float16 rows (n, P, C). Out: sums that go into a shard's commit line, and from these, combined in shard order, the
statistics of the whole store. The result does not depend on which process wrote which shard. Float64 throughout (Chan,
Golub and LeVeque 1979, for the combination of means and squared deviations).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

_BLOCK_ROWS = 16


def sums_of(rows_NPC: np.ndarray) -> dict[str, Any]:
    """Tokens counted, channel mean, sum of squared deviations, sum of token norms; JSON values."""
    blocks = (_block_sums(rows_NPC[i : i + _BLOCK_ROWS]) for i in range(0, len(rows_NPC), _BLOCK_ROWS))
    total = combine(blocks, rows_NPC.shape[-1])
    return {**total, "mean": total["mean"].tolist(), "m2": total["m2"].tolist()}


def _block_sums(rows_NPC: np.ndarray) -> dict[str, Any]:
    tokens_TC = rows_NPC.reshape(-1, rows_NPC.shape[-1]).astype(np.float64)
    mean_C = tokens_TC.mean(0)
    norms = np.sqrt((tokens_TC**2).sum(1))
    return {
        "tokens": len(tokens_TC),
        "mean": mean_C,
        "m2": ((tokens_TC - mean_C) ** 2).sum(0),
        "norm": float(norms.sum()),
    }


def combine(parts: Iterable[dict[str, Any]], channels: int) -> dict[str, Any]:
    """The sums of several parts together, taken in their order."""
    tokens, mean_C, m2_C, norm = 0, np.zeros(channels), np.zeros(channels), 0.0
    for part in parts:
        if not part["tokens"]:
            continue
        together = tokens + part["tokens"]
        delta_C = np.asarray(part["mean"]) - mean_C
        mean_C = mean_C + delta_C * (part["tokens"] / together)
        m2_C = m2_C + np.asarray(part["m2"]) + delta_C**2 * (tokens * part["tokens"] / together)
        tokens, norm = together, norm + part["norm"]
    return {"tokens": tokens, "mean": mean_C, "m2": m2_C, "norm": norm}


def statistics_of(parts: Iterable[dict[str, Any]], channels: int) -> dict[str, Any]:
    """Channel `mean` and `std` (population), and `norm`, the mean length of a token; JSON values."""
    total = combine(parts, channels)
    tokens = max(1, total["tokens"])
    return {
        "mean": total["mean"].tolist(),
        "std": np.sqrt(total["m2"] / tokens).tolist(),
        "norm": total["norm"] / tokens,
        "tokens": total["tokens"],
    }
