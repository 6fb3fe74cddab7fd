"""Plans: a scene as one line of words, `"white ab redcircle cd bluesquare"`.

The tone, then for each thing its cell word (row letter, column letter) and its thing word (colour and
shape as one word). A plan does not hold the pixel shifts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from bifrost_cli.shapes.captions import Prompt
from bifrost_cli.shapes.scene import COLOURS, GRID, SHAPES, Scene, Thing

EMPTY = "none"
_LETTERS = "abcd"


@lru_cache(maxsize=1)
def cell_words() -> tuple[str, ...]:
    """The 16 cell words in reading order: aa, ab, ... dd."""
    return tuple(row + col for row in _LETTERS[:GRID] for col in _LETTERS[:GRID])


@lru_cache(maxsize=1)
def thing_words() -> tuple[str, ...]:
    """The 30 thing words, colour by colour: redcircle, redsquare, ... orangestar."""
    return tuple(colour + shape for colour in COLOURS for shape in SHAPES)


def write_plan(scene: Scene, prompt: Prompt | None = None) -> str:
    """The plan of `scene`; with the prompt it shows, things come in the prompt's order instead of reading order."""
    words = [scene.tone]
    for thing in scene.things if prompt is None else _in_prompt_order(scene, prompt):
        words += [cell_words()[thing.cell], thing.colour + thing.shape]
    return " ".join(words)


def _in_prompt_order(scene: Scene, prompt: Prompt) -> list[Thing]:
    left, ordered = list(scene.things), []
    for wanted in prompt.spec.things:
        ordered.append(next(t for t in left if t.shape == wanted.shape and wanted.colour in (None, t.colour)))
        left.remove(ordered[-1])
    return ordered + left


def fill_cells(scene: Scene, order: Sequence[int]) -> str:
    """All cells of `scene` in the given order (cell numbers 0 to 15): `"cc none ab redcircle ..."`."""
    words = [EMPTY] * GRID**2
    for thing in scene.things:
        words[thing.cell] = thing.colour + thing.shape
    return " ".join(f"{cell_words()[cell]} {words[cell]}" for cell in order)


def cell_classes(scene: Scene) -> np.ndarray:
    """What stands in each cell, (16,) int64: 0 for nothing, else 1 + the index of its thing word."""
    classes = np.zeros(GRID**2, np.int64)
    for thing in scene.things:
        classes[thing.cell] = 1 + thing_words().index(thing.colour + thing.shape)
    return classes
