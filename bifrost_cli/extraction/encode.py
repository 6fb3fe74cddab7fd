"""From samples to the arrays of one shard: read ahead in threads, encode in batches.

In: samples and encoders. Out: float16 latents, VAE latents and index lines. Does not know the store, the recipe's file
or the workspace.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bifrost_cli.data.images import BadImage, DecodedImage, square
from bifrost_cli.data.latents.index import OK
from bifrost_cli.data.sources.scan import Sample
from bifrost_cli.errors import memory_errors
from bifrost_cli.models.encoders import Encoder, VaeEncoder
from bifrost_cli.runtime.ui import Counter

FAILED = "failed"


@dataclass(frozen=True)
class ShardRows:
    """One shard, ready to be written; a failed row's values mean nothing."""

    latents_NPC: np.ndarray
    vae_Nchw: np.ndarray | None
    lines: list[dict[str, Any]]

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["status"] != OK]


@dataclass(frozen=True)
class _Squares:
    """One image at the sizes the encoders read, and its index line."""

    encoder_SS3: np.ndarray
    output_SS3: np.ndarray | None
    line: dict[str, Any]


def encode_shard(
    samples: Sequence[Sample], encoder: Encoder, vae: VaeEncoder | None, batch_size: int, bar: Counter
) -> ShardRows:
    """Encode the samples, in order. An image that is gone or changed since the scan becomes a failed row.

    Batches begin at the shard's first row and a failed image is encoded as an empty one, so that a row's numbers
    depend on nothing but its shard. OutOfMemory names the smaller batch to try.
    """
    latents_NPC = np.empty((len(samples), encoder.grid[0] * encoder.grid[1], encoder.channels), np.float16)
    vae_Nchw = None if vae is None else np.empty((len(samples), *vae.shape), np.float16)
    lines: list[dict[str, Any]] = []
    for batch in _batches(samples, encoder.image_size, vae.image_size if vae else None, batch_size):
        rows = slice(len(lines), len(lines) + len(batch))
        smaller = f"--set latents.batch_size={max(1, len(batch) // 2)}"
        with memory_errors(f"encoding {len(batch)} images at once", smaller):
            latents_NPC[rows] = _half(encoder.encode(np.stack([item.encoder_SS3 for item in batch])))
            if vae is not None and vae_Nchw is not None:
                vae_Nchw[rows] = _half(
                    vae.encode(np.stack([item.output_SS3 for item in batch if item.output_SS3 is not None]))
                )
        lines += [item.line for item in batch]
        bar.advance(len(batch))
    return ShardRows(latents_NPC, vae_Nchw, lines)


def _half(values: torch.Tensor) -> np.ndarray:
    """float16; what does not fit becomes infinite, which the store's writer refuses by name."""
    return values.to("cpu", torch.float16).numpy()


def _batches(
    samples: Sequence[Sample], size: int, output_size: int | None, batch_size: int
) -> Iterator[list[_Squares]]:
    """Batches in order, the next one being read while this one is encoded; never more than two in memory."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        waiting: deque[list[Future[_Squares]]] = deque()
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            waiting.append([pool.submit(_squares, sample, size, output_size) for sample in batch])
            if len(waiting) == 2:
                yield [future.result() for future in waiting.popleft()]
        for futures in waiting:
            yield [future.result() for future in futures]


def _squares(sample: Sample, size: int, output_size: int | None) -> _Squares:
    try:
        image, status = sample.load(), OK
    except BadImage as error:
        image, status = DecodedImage(np.zeros((size, size, 3), np.uint8), (error.message,)), FAILED
    height, width = image.rgb.shape[:2]
    line = {
        "key": sample.key,
        "caption": sample.caption,
        "plan": sample.plan,
        "image": sample.sha256,
        "size": [width, height],
        "status": status,
        "notes": list(image.notes),
    }
    output_SS3 = square(image.rgb, output_size) if output_size else None
    return _Squares(square(image.rgb, size), output_SS3, line)
