"""Plans: a scene as one line of words, `"white ab redcircle cd bluesquare"`.

The tone, then for each thing its cell word (row letter, column letter) and its thing word (colour and
shape as one word). A plan does not hold the pixel shifts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bifrost_cli.shapes.captions import Prompt
from bifrost_cli.shapes.scene import COLOURS, GRID, SHAPES, Scene

EMPTY = "none"
CELL_WORDS = tuple(row + col for row in "abcd" for col in "abcd")  # in reading order: aa, ab, ... dd
THING_WORDS = tuple(colour + shape for colour in COLOURS for shape in SHAPES)  # redcircle, redsquare, ... orangestar


def write_plan(scene: Scene, prompt: Prompt | None = None) -> str:
    """The plan of `scene`; with the prompt it shows, things come in the prompt's order instead of reading order."""
    left, ordered = list(scene.things), []
    for wanted in prompt.spec.things if prompt else ():
        ordered.append(next(t for t in left if t.shape == wanted.shape and wanted.colour in (None, t.colour)))
        left.remove(ordered[-1])
    return " ".join([scene.tone, *(f"{CELL_WORDS[t.cell]} {t.colour}{t.shape}" for t in ordered + left)])


def fill_cells(scene: Scene, order: Sequence[int]) -> str:
    """All cells of `scene` in the given order (cell numbers 0 to 15): `"cc none ab redcircle ..."`."""
    held = {thing.cell: thing.colour + thing.shape for thing in scene.things}
    return " ".join(f"{CELL_WORDS[cell]} {held.get(cell, EMPTY)}" for cell in order)


def cell_classes(scene: Scene) -> np.ndarray:
    """What stands in each cell, (16,) int64: 0 for nothing, else 1 + the index of its thing word."""
    classes = np.zeros(GRID**2, np.int64)
    for thing in scene.things:
        classes[thing.cell] = 1 + THING_WORDS.index(thing.colour + thing.shape)
    return classes
