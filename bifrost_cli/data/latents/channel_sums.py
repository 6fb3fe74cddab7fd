"""Mean and deviation of each channel, and the mean length of a token, of a store: sums of each shard, combined in shard
order (Chan, Golub and LeVeque 1979), whichever process wrote which shard.

Within a shard plain float64 sums of the values and of their squares are enough: a float16 has 11 bits, so the sum of
values is exact and that of squares nearly so. N rows, P patches, C channels, T tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

_AT_ONCE = 1 << 17  # values in float64: 1 MB, which stays in the processor's cache


class ChannelSums:
    """The sums of one shard. They do not depend on how its rows are cut into batches."""

    def __init__(self, channels: int) -> None:
        self._sum_C, self._squares_C = np.zeros(channels), np.zeros(channels)
        self._tokens, self._norm = 0, 0.0
        rows = max(1, _AT_ONCE // channels)
        self._values_TC = np.empty((rows + 1, channels))  # the first row carries the sum: always the same order

    def add(self, rows_NPC: np.ndarray) -> None:
        """Count rows in float16."""
        for tokens_PC in rows_NPC:
            self._norm += math.fsum(self._add(part) for part in _parts(tokens_PC, len(self._values_TC) - 1))
            self._tokens += len(tokens_PC)

    def _add(self, tokens_TC: np.ndarray) -> float:
        """The sum of the tokens' lengths."""
        carried_TC = self._values_TC[: len(tokens_TC) + 1]
        values_TC = carried_TC[1:]
        values_TC[:] = tokens_TC
        carried_TC[0] = self._sum_C
        np.add.reduce(carried_TC, 0, out=self._sum_C)
        np.multiply(values_TC, values_TC, out=values_TC)
        carried_TC[0] = self._squares_C
        np.add.reduce(carried_TC, 0, out=self._squares_C)
        return float(np.sqrt(values_TC.sum(1)).sum())

    def json(self) -> dict[str, Any]:
        """Tokens counted, channel mean, sum of squared deviations, sum of token norms; JSON values."""
        mean_C = self._sum_C / max(1, self._tokens)
        m2_C = np.maximum(self._squares_C - self._sum_C * mean_C, 0)
        return {"tokens": self._tokens, "mean": mean_C.tolist(), "m2": m2_C.tolist(), "norm": self._norm}


def statistics_of(parts: Iterable[dict[str, Any]], channels: int) -> dict[str, Any]:
    """Channel `mean` and `std` (population), and `norm`, the mean length of a token; JSON values."""
    tokens, mean_C, m2_C, norm = 0, np.zeros(channels), np.zeros(channels), 0.0
    for part in parts:
        if not part["tokens"]:
            continue
        together = tokens + part["tokens"]
        delta_C = np.asarray(part["mean"]) - mean_C
        mean_C = mean_C + delta_C * (part["tokens"] / together)
        m2_C = m2_C + np.asarray(part["m2"]) + delta_C**2 * (tokens * part["tokens"] / together)
        tokens, norm = together, norm + part["norm"]
    counted = max(1, tokens)
    std_C = np.sqrt(m2_C / counted)
    return {"mean": mean_C.tolist(), "std": std_C.tolist(), "norm": norm / counted, "tokens": tokens}


def _parts(tokens_PC: np.ndarray, size: int) -> Iterable[np.ndarray]:
    return (tokens_PC[start : start + size] for start in range(0, len(tokens_PC), size))
