"""Latents to look at: maps coloured by principal components, clouds of tokens, how tokens' lengths are spread.

Comes in: a latents store, or a samples artifact with its predicted latents. Goes out: PNG bytes and plots for a
report's JSON. Does not know pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bifrost_cli.artifacts import Artifact
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.data.png import png_bytes
from bifrost_cli.data.safetensors_io import load_tensors
from bifrost_cli.stats import as_colours, principal_axes

LOOKED_AT, DRAWN, BINS, MAP = 256, 600, 24, 128  # rows, tokens of a cloud, bars of a histogram, px of a map


def evenly(count: int, wanted: int) -> list[int]:
    """At most `wanted` of range(count), evenly spaced."""
    return list(range(0, count, -(-count // wanted))) if count else []


def maps(store: LatentsStore, rows: Sequence[int]) -> list[bytes]:
    """A PNG a row: each token in the colour of its first three principal components, whose axes are of LOOKED_AT rows
    of the whole store. StoreError: damage."""
    axes = _axes(_tokens(store))
    latents_BPC = torch.from_numpy(store.latents(rows)).double()
    pixels_BHW3 = as_colours(latents_BPC, *axes).unflatten(1, store.grid).numpy()
    size = max(1, MAP // max(store.grid))
    return [png_bytes(pixels.repeat(size, axis=0).repeat(size, axis=1)) for pixels in pixels_BHW3]


def clouds(true: LatentsStore, samples: Artifact) -> list[dict[str, Any]]:
    """True and predicted tokens along the true ones' first two components; [] where no latents were kept.

    Errors: StoreError or ArtifactError for damage.
    """
    names = sorted(name for name in samples.files if name.startswith("latents/"))
    if not names:
        return []
    made_BPC = torch.stack([load_tensors(samples.file(names[place]))[0]["latents"].double()
                            for place in evenly(len(names), LOOKED_AT)])  # fmt: skip
    if made_BPC.shape[-1] != true.channels:
        return []
    tokens_NC = _tokens(true)
    mean_C, axes_C2 = principal_axes(tokens_NC, 2)
    sides = {"true latents": tokens_NC, "predicted latents": made_BPC.flatten(0, 1)}
    series = {name: ((_some(side_NC) - mean_C) @ axes_C2).tolist() for name, side_NC in sides.items()}
    caption = "A token is a point. Predictions that lie together in the middle are means of many pictures."
    return [{"kind": "points", "title": "Principal components of the latents", "caption": caption, "series": series,
             "x": "first component", "y": "second component"}]  # fmt: skip


def histogram(store: LatentsStore) -> dict[str, Any]:
    """How long tokens are: a line through the share of tokens in each of BINS bins."""
    norms_N = _tokens(store).norm(dim=1).numpy()
    shares, edges = np.histogram(norms_N, BINS, weights=np.full(len(norms_N), 1 / len(norms_N)))
    middles = (edges[1:] + edges[:-1]) / 2
    return {"kind": "lines", "title": "Norms of tokens", "caption": f"Share of {len(norms_N)} tokens, in {BINS} bins.",
            "series": {"share": [[float(x), float(y)] for x, y in zip(middles, shares, strict=True)]},
            "x": "norm", "y": "share of tokens", "powers": ""}  # fmt: skip


def channels(store: LatentsStore) -> dict[str, Any]:
    """Mean and deviation of every channel, by number, from the store's attributes."""
    numbers = evenly(store.channels, 256)
    series = {name: [[place, float(values_C[place])] for place in numbers]
              for name, values_C in (("mean", store.mean_C), ("standard deviation", store.std_C))}  # fmt: skip
    return {"kind": "lines", "title": "Channels", "caption": "Over all tokens of the store.", "series": series,
            "x": "channel", "y": "value", "powers": ""}  # fmt: skip


def _tokens(store: LatentsStore) -> Tensor:
    """Tokens (N, C) float64 of evenly spaced rows."""
    return torch.from_numpy(store.latents(evenly(store.rows, LOOKED_AT))).double().flatten(0, 1)


def _some(tokens_NC: Tensor) -> Tensor:
    return tokens_NC[evenly(len(tokens_NC), DRAWN)]


def _axes(tokens_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean_C, axes_C3 = principal_axes(tokens_NC, 3)
    return mean_C, axes_C3, ((tokens_NC - mean_C) @ axes_C3).std(0)
