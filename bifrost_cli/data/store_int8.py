"""Latents in 8 bits: signed codes, and one scale for every 64 channels of a token.

In: float16 latents. Out: codes in -127..127 and scales, and from these float16 latents again. The code -128 means that
nothing was written and comes back as NaN, as the float16 store's fill value does. Does not know Zarr.
N rows, P patches, C channels, K = ceil(C / 64) blocks.

One scale for each token lost up to 0.2 % of the cosine where a few channels are a hundred times the others, and one for
each channel lost 5 % where tokens differ; short blocks of a token kept 0.9998 in every case that was tried.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK = 64
MISSING = -128
_TOP = 127
_ROWS = 16  # worked on at once: a shard of the paper's latents in float32 would be 3.8 GB


def blocks(channels: int) -> int:
    """K: scales of one token."""
    return -(-channels // BLOCK)


def encode_int8(half_NPC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes (N, P, C) int8 and scales (N, P, K) float16: each block's largest magnitude, which float16 holds exactly.

    A row of NaN becomes codes of -128 and scales of NaN.
    """
    codes_NPC = np.empty(half_NPC.shape, np.int8)
    scales_NPK = np.empty((*half_NPC.shape[:2], blocks(half_NPC.shape[2])), np.float16)
    for rows in _parts(len(half_NPC)):
        for k, channels in enumerate(_channels(half_NPC.shape[2])):
            values = half_NPC[rows, :, channels].astype(np.float32)
            largest = np.abs(values).max(-1)
            scaled = values * (_TOP / np.where(largest > 0, largest, 1))[..., None]
            codes_NPC[rows, :, channels] = np.where(np.isnan(scaled), MISSING, np.rint(scaled)).astype(np.int8)
            scales_NPK[rows, :, k] = largest
    return codes_NPC, scales_NPK


def decode_int8(codes_NPC: np.ndarray, scales_NPK: np.ndarray) -> np.ndarray:
    """Latents (N, P, C) float16; NaN where nothing was written."""
    half_NPC = np.empty(codes_NPC.shape, np.float16)
    for rows in _parts(len(codes_NPC)):
        for k, channels in enumerate(_channels(codes_NPC.shape[2])):
            codes = codes_NPC[rows, :, channels]
            values = codes * (scales_NPK[rows, :, k].astype(np.float32) / _TOP)[..., None]
            half_NPC[rows, :, channels] = np.where(codes == MISSING, np.nan, values)
    return half_NPC


def _parts(rows: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, rows, _ROWS))


def _channels(channels: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, channels, BLOCK))
