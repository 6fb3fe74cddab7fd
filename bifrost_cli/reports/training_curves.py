"""What a training wrote down, as plots: its losses, and its health on held-out rows.

Comes in: the folder of a training, finished or not. Goes out: plots for a report's JSON (see `report.plots`), and the
last validation. Does not know which model is trained.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DRAWN = 120  # points of a curve; each is the mean of the steps it stands for
LOSSES = ("loss", "loss_caption", "loss_no_text", "loss_shuffled")
HEARD = 0.9  # a loss above this share of the loss with another row's text: the text is hardly used


def training_plots(folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Losses of trainings by name, their validation losses, and the other numbers of their validations.

    A table of a single line is no plot: its numbers are `health`'s.
    """
    steps = {name: _curve(read_table(path / "losses.csv"), "loss") for name, path in folders.items()}
    tables = {name: read_table(path / "validation.csv") for name, path in folders.items()}
    held = {_name(name, column, folders): _curve(table, column) for name, table in tables.items()
            for column in LOSSES if column in table}  # fmt: skip
    other = sorted({column for table in tables.values() for column in table} - {*LOSSES, "step"})
    found = [
        _plot("Loss while training", "Means of neighbouring steps.", steps, "loss"),
        _plot("Loss on held-out rows", "With another row's text or latents (shuffled) it should be far higher.", held,
              "loss"),
    ]  # fmt: skip
    for column in other:
        curves = {name: _curve(table, column) for name, table in tables.items() if column in table}
        found.append(_plot(f"{column.capitalize()} on held-out rows", _MEANING.get(column, ""), curves, column))
    return [plot for plot in found if any(len(points) > 1 for points in plot["series"].values())]


_MEANING = {
    "cosine": "Mean over tokens of the cosine between predicted and true latents; 1 is the same direction.",
    "variance": "Variance of predicted to that of true latents; well below 1 means that the mean of many images is "
    "painted.",
}


def health(folder: Path) -> tuple[dict[str, float], list[str]]:
    """The numbers of the last validation, and what they warn of."""
    table = read_table(folder / "validation.csv")
    last = {name: values[-1] for name, values in table.items() if values}
    warned = []
    if "loss_shuffled" in last and last["loss"] > HEARD * last["loss_shuffled"]:
        warned.append(
            f"The loss with another row's input ({last['loss_shuffled']:.4g}) is hardly above the loss "
            f"({last['loss']:.4g}): what is given is not used yet."
        )
    return last, warned


def read_table(path: Path) -> dict[str, list[float]]:
    """The columns of a table that a training wrote; {} when it is not there. Its last line may be half written."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    whole = [row for row in rows[1:] if len(row) == len(rows[0])]
    return {name: [float(row[place]) for row in whole] for place, name in enumerate(rows[0])} if rows else {}


def _curve(table: Mapping[str, list[float]], column: str) -> list[list[float]]:
    steps, values = table.get("step", []), table.get(column, [])
    size = max(1, math.ceil(len(steps) / DRAWN))
    spans = [slice(start, start + size) for start in range(0, len(steps), size)]
    return [[steps[span][-1], sum(values[span]) / len(values[span])] for span in spans]


def _name(training: str, column: str, folders: Mapping[str, Path]) -> str:
    return f"{training}: {column}" if len(folders) > 1 else column


def _plot(title: str, caption: str, curves: Mapping[str, list[list[float]]], y: str) -> dict[str, Any]:
    series = {name: points for name, points in curves.items() if points}
    powers = "y" if y == "loss" else ""
    return {"kind": "lines", "title": title, "caption": caption, "series": series, "x": "step", "y": y,
            "powers": powers}  # fmt: skip
