"""Latents in 8 bits: signed codes, a scale for every channel of an image, and one for every 64 channels of a token. The
code -128 means that nothing was written and comes back as NaN, as the float16 store's fill value does. N rows, P
patches, C channels, K = ceil(C / 64) blocks; S = P * K + C scales of a row.

Tokens keep their direction with a scale for each block of a token; channels that are small beside others keep their
shape, which a training on normalised latents sees, with a scale for each channel. The first alone lost such channels
(an error of their own deviation), the second alone 0.4 % of the cosine of tokens with heavy tails. A channel's scale is
its root mean square to the power 2/3: with 1 heavy tails suffer (cosine 0.997), with 1/2 small channels do (an error of
0.24 deviations). Subtracting a channel's mean would turn the small tokens of an image (cosine 0.965)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK, MISSING = 64, -128
_TOP, _POWER = 127, 2 / 3
_ROWS = 16  # encoded at once: a shard of the paper's latents in float32 would be 3.8 GB
_AT_ONCE = 1 << 15  # values decoded at once: torch gives so few to one thread
_LARGEST = np.finfo(np.float16).max


def scales_of_row(patches: int, channels: int) -> int:
    """S."""
    return patches * -(-channels // BLOCK) + channels


def encode_int8(half_NPC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes (N, P, C) int8 and scales (N, S) float16. A row of NaN becomes codes of -128 and scales of NaN."""
    count, patches, channels = half_NPC.shape
    codes_NPC = np.empty(half_NPC.shape, np.int8)
    scales_NS = np.empty((count, scales_of_row(patches, channels)), np.float16)
    for rows in _slices(count, _ROWS):
        values = half_NPC[rows].astype(np.float32)
        channel_NC = (np.sqrt(np.square(values).mean(1)) ** _POWER).astype(np.float16)
        values /= _safe(channel_NC)[:, None]
        largest_NPK = np.stack([np.abs(values[..., part]).max(-1) for part in _slices(channels, BLOCK)], -1)
        largest_NPK = largest_NPK.astype(np.float16)
        for k, part in enumerate(_slices(channels, BLOCK)):
            scaled = values[..., part] * (_TOP / _safe(largest_NPK[..., k]))[..., None]
            rounded = np.clip(np.rint(scaled), -_TOP, _TOP)
            codes_NPC[rows, :, part] = np.where(np.isnan(rounded), MISSING, rounded).astype(np.int8)
        scales_NS[rows] = np.concatenate([largest_NPK.reshape(len(values), -1), channel_NC], 1)
    return codes_NPC, scales_NS


def decode_int8(codes_NPC: np.ndarray, scales_NS: np.ndarray) -> np.ndarray:
    """Latents (N, P, C) float16; NaN where nothing was written: code * largest / 127 * channel, in float32.

    In blocks of tokens that stay in the processor's cache, and by torch, whose casts to float16 take a tenth of
    numpy's time."""
    import torch  # what reads float16 stores needs none

    count, patches, channels = codes_NPC.shape
    half_NPC = torch.empty(codes_NPC.shape, dtype=torch.float16)
    whole, step = channels // BLOCK * BLOCK, max(1, _AT_ONCE // channels)
    for codes_PC, scales_S, half_PC in zip(torch.from_numpy(codes_NPC), scales_NS, half_NPC, strict=True):
        largest_PK = torch.from_numpy(scales_S[:-channels].astype(np.float32).reshape(patches, -1) / _TOP)
        channel_C = torch.from_numpy(_safe(scales_S[-channels:]))
        for rows in _slices(patches, step):
            values_TC = codes_PC[rows].float()
            values_TC[:, :whole].unflatten(1, (whole // BLOCK, BLOCK)).mul_(largest_PK[rows, : whole // BLOCK, None])
            values_TC[:, whole:] *= largest_PK[rows, -1:]
            half_PC[rows] = values_TC.mul_(channel_C).clamp_(-float(_LARGEST), float(_LARGEST))
    decoded = half_NPC.numpy()
    if codes_NPC.min(initial=0) == MISSING:
        decoded[codes_NPC == MISSING] = np.nan
    return decoded


def _safe(scale: np.ndarray) -> np.ndarray:
    """float32, with 1 for 0; NaN stays."""
    return np.where(scale == 0, 1, scale).astype(np.float32)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, length, step))
