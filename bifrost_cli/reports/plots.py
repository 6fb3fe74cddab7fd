"""The plots of a training, of a latents store and of predicted latents, as a report's JSON (`charts` draws them).

A plot has `kind` (dots, lines or points), `title`, `caption`, the names of its axes and its series.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bifrost_cli.artifacts import Artifact
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.data.png import png_bytes
from bifrost_cli.errors import ArtifactError
from bifrost_cli.stats import as_colours, principal_axes

if TYPE_CHECKING:
    from torch import Tensor

DRAWN = 1e12  # numbers from here on are in no plot
CURVE = 120  # points of a curve; each is the mean of the steps it stands for
LOSSES = ("loss", "loss_caption", "loss_no_text", "loss_shuffled")
UNUSED = 0.9  # a loss above this share of the loss with another row's text: the text is hardly used
SAMPLED, CLOUD, BINS, MAP = 256, 600, 24, 128  # rows of a store, tokens of a cloud, bars of a histogram, px of a map
MEANING = {
    "cosine": "Mean over tokens of the cosine between predicted and true latents; 1 is the same direction.",
    "variance": "Variance of predicted to that of true latents; well below 1: predictions are means of many images.",
}


def _lines(title: str, caption: str, series: Mapping[str, Any], x: str, y: str, powers: str = "") -> dict[str, Any]:
    return {"kind": "lines", "title": title, "caption": caption, "series": series, "x": x, "y": y, "powers": powers}


def training_plots(folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Losses of trainings by name, their validation losses, and the other numbers of their validations.

    A table of a single line is no plot: its numbers are `health`'s.
    """
    steps = {name: _curve(read_table(path / "losses.csv"), "loss") for name, path in folders.items()}
    tables = {name: read_table(path / "validation.csv") for name, path in folders.items()}
    held = {f"{name}: {column}" if len(folders) > 1 else column: _curve(table, column)
            for name, table in tables.items() for column in LOSSES if column in table}  # fmt: skip
    drawn = [
        ("Loss while training", "Means of neighbouring steps.", steps, "loss"),
        ("Loss on held-out rows", "With another row's text or latents (shuffled) it should be far higher.", held,
         "loss"),
    ]  # fmt: skip
    for column in sorted({column for table in tables.values() for column in table} - {*LOSSES, "step"}):
        curves = {name: _curve(table, column) for name, table in tables.items() if column in table}
        drawn.append((f"{column.capitalize()} on held-out rows", MEANING.get(column, ""), curves, column))
    return [
        _lines(title, caption, {name: points for name, points in curves.items() if points}, "step", y,
               "y" if y == "loss" else "")
        for title, caption, curves, y in drawn
        if any(len(points) > 1 for points in curves.values())
    ]  # fmt: skip


def health(folder: Path) -> tuple[dict[str, float], list[str]]:
    """The numbers of the last validation, and what they warn of."""
    last = {name: values[-1] for name, values in read_table(folder / "validation.csv").items() if values}
    warnings = []
    if {"loss", "loss_shuffled"} <= last.keys() and last["loss"] > UNUSED * last["loss_shuffled"]:
        warnings.append(
            f"The loss with another row's input ({last['loss_shuffled']:.4g}) is hardly above the loss "
            f"({last['loss']:.4g}): what is given is not used yet."
        )
    return last, warnings


def read_table(path: Path) -> dict[str, list[float]]:
    """The columns of a table that a training wrote; {} when it is not there. Its last line may be half written.
    ArtifactError: it is no such table."""
    if not path.is_file():
        return {}
    try:
        rows = list(csv.reader(path.read_text("utf-8").rpartition("\n")[0].splitlines()))
        if rows and "step" not in rows[0]:
            raise ValueError("it has no column step")
        whole = [row for row in rows[1:] if len(row) == len(rows[0])]
        return {name: [float(row[place]) for row in whole] for place, name in enumerate(rows[0])} if rows else {}
    except (ValueError, csv.Error) as error:
        raise ArtifactError(f"{path} is no table of a training: {error}", code="BF-ART-005") from error


def _curve(table: Mapping[str, list[float]], column: str) -> list[list[float]]:
    """Means of neighbouring points; those that no axis can show (NaN, infinity) are left out."""
    pairs = zip(table.get("step", []), table.get(column, []), strict=False)
    points = [pair for pair in pairs if all(abs(number) < DRAWN for number in pair)]
    size = max(1, math.ceil(len(points) / CURVE))
    spans = [points[start : start + size] for start in range(0, len(points), size)]
    return [[span[-1][0], sum(value for _, value in span) / len(span)] for span in spans]


def evenly(count: int, limit: int) -> list[int]:
    """At most `limit` of range(count), evenly spaced."""
    return list(range(0, count, -(-count // limit))) if count else []


def maps(store: LatentsStore, rows: Sequence[int]) -> list[bytes]:
    """A PNG a row: each token in the colour of its first three principal components, whose axes are of SAMPLED rows
    of the whole store. StoreError: damage."""
    import torch  # 2 s that curves do without

    tokens_NC = _tokens(store)
    mean_C, axes_C3 = principal_axes(tokens_NC, 3)
    spread_3 = ((tokens_NC - mean_C) @ axes_C3).std(0)
    latents_BPC = torch.from_numpy(store.latents(rows)).double()
    pixels_BHW3 = as_colours(latents_BPC, mean_C, axes_C3, spread_3).unflatten(1, store.grid).numpy()
    size = max(1, MAP // max(store.grid))
    return [png_bytes(pixels.repeat(size, axis=0).repeat(size, axis=1)) for pixels in pixels_BHW3]


def clouds(true: LatentsStore, samples: Artifact) -> list[dict[str, Any]]:
    """True and predicted tokens along the true ones' first two components; [] where no latents were kept.

    Errors: StoreError or ArtifactError for damage.
    """
    names = sorted(name for name in samples.files if name.startswith("latents/"))
    if not names:
        return []
    import torch

    from bifrost_cli.data.safetensors_io import load_tensors

    try:
        predicted_BPC = torch.stack([load_tensors(samples.file(names[place]))[0]["latents"].double()
                                     for place in evenly(len(names), SAMPLED)])  # fmt: skip
    except (KeyError, RuntimeError) as error:
        raise ArtifactError(f"{samples.path} holds latents that do not fit: {error}", code="BF-ART-005") from error
    if predicted_BPC.shape[-1] != true.channels or not predicted_BPC.isfinite().all():
        return []
    sides = {"true latents": _tokens(true), "predicted latents": predicted_BPC.flatten(0, 1)}
    mean_C, axes_C2 = principal_axes(sides["true latents"], 2)
    series = {name: ((side_NC[evenly(len(side_NC), CLOUD)] - mean_C) @ axes_C2).tolist()
              for name, side_NC in sides.items()}  # fmt: skip
    caption = "A token is a point. Predictions that lie together in the middle are means of many images."
    return [{"kind": "points", "title": "Principal components of the latents", "caption": caption, "series": series,
             "x": "first component", "y": "second component"}]  # fmt: skip


def histogram(store: LatentsStore) -> dict[str, Any]:
    """How long tokens are: a line through the share of tokens in each of BINS bins."""
    norms_N = _tokens(store).norm(dim=1).numpy()
    shares, edges = np.histogram(norms_N, BINS, weights=np.full(len(norms_N), 1 / len(norms_N)))
    line = np.stack([(edges[1:] + edges[:-1]) / 2, shares], axis=1).tolist()
    caption = f"Share of {len(norms_N)} tokens, in {BINS} bins."
    return _lines("Norms of tokens", caption, {"share": line}, "norm", "share of tokens")


def channels(store: LatentsStore) -> dict[str, Any]:
    """Mean and deviation of every channel, by number, from the store's attributes."""
    numbers = evenly(store.channels, 256)
    series = {name: [[place, float(values_C[place])] for place in numbers]
              for name, values_C in (("mean", store.mean_C), ("standard deviation", store.std_C))}  # fmt: skip
    return _lines("Channels", "Over all tokens of the store.", series, "channel", "value")


def _tokens(store: LatentsStore) -> Tensor:
    """Tokens (N, C) float64 of evenly spaced rows."""
    import torch

    return torch.from_numpy(store.latents(evenly(store.rows, SAMPLED))).double().flatten(0, 1)
