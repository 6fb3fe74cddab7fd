"""Which rows a training step sees, and which random numbers: pure functions of (seed, step, ...). The order comes from
our own integer hash, not from a library's generator, and so does not change with their versions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def derive(*parts: int | str) -> int:
    """A 63-bit seed from any integers and words: the same parts always give the same seed."""
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def micro_seed(seed: int, step: int, micro: int) -> int:
    """The seed of everything random in one micro-batch of a step."""
    return derive(seed, step, micro)


def uniform(*parts: int | str) -> float:
    """A number in [0, 1) from any integers and words, for one-off draws such as "does this row lose its prompt"."""
    return (derive(*parts) >> 10) / float(1 << 53)


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, rows: int) -> np.ndarray:
    """The order of `rows` rows in one epoch: int64 (rows,), each row once (ranks of a splitmix64 hash)."""
    with np.errstate(over="ignore"):
        z = np.uint64(derive(seed, "epoch", epoch)) + np.arange(1, rows + 1, dtype=np.uint64) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")


def batch_indices(seed: int, step: int, batch_size: int, rows: int) -> list[int]:
    """Row numbers of batch `step`: positions [step * batch_size, +batch_size) of the endless sequence of epochs."""
    if rows < 1:
        raise ValueError("batch_indices needs at least one row")
    first = step * batch_size
    return [int(permutation(seed, p // rows, rows)[p % rows]) for p in range(first, first + batch_size)]


def held_out(keys: Sequence[str], count: int) -> tuple[list[int], list[int]]:
    """(rows to train on, rows to validate on): the `count` rows whose keys have the smallest hash are held out, so that
    a row keeps its side when seeds or settings change. At most a tenth of the rows, and at least one if `count` is not
    0; one more where an image's other row would else be trained on."""
    count = min(count, max(1, len(keys) // 10))
    ranked = sorted(range(len(keys)), key=lambda row: (derive("held out", image_of(keys[row])), keys[row]))
    while 0 < count < len(keys) and image_of(keys[ranked[count - 1]]) == image_of(keys[ranked[count]]):
        count += 1
    if len(keys) <= count:
        raise ValueError(f"{len(keys)} rows are too few to train on and validate")
    # Validation gives each row the next one's text: an image's two rows, which share theirs, must not be neighbours.
    return sorted(ranked[count:]), sorted(ranked[:count], key=lambda row: ("#" in keys[row], row))


def image_of(key: str) -> str:
    """The key of the image that a row shows: `a#flip` is another row of the image `a`."""
    return key.partition("#")[0]
