"""Questions about an image of the toy world, with their answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from bifrost_cli.shapes.captions import phrase, plural
from bifrost_cli.shapes.scene import COLOURS, GRID, SHAPES, Scene, Thing
from bifrost_cli.shapes.scene_plan import cell_words

Option = TypeVar("Option")

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")


def describe(scene: Scene) -> str:
    """Everything in the image in reading order: "a red circle and a blue square"; "nothing" when it is empty."""
    names = [phrase(thing.shape, thing.colour) for thing in scene.things]
    if len(names) < 2:
        return "".join(names) or "nothing"
    return f"{', '.join(names[:-1])} and {names[-1]}"


def place(thing: Thing) -> str:
    """The quarter of the image a thing stands in: "top left", "bottom right"."""
    return f"{'top' if thing.row < GRID // 2 else 'bottom'} {'left' if thing.col < GRID // 2 else 'right'}"


def _pick(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    return options[int(rng.integers(len(options)))]


def _number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


def _ask_what(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    return _pick(rng, ("what is in the picture?", "what do you see?", "describe the picture.")), describe(scene)


def _ask_how_many(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    if rng.random() < 0.4:
        return "how many things are there?", _number(len(scene.things))
    present = [thing.shape for thing in scene.things]
    shape = _pick(rng, present) if present and rng.random() < 0.75 else _pick(rng, SHAPES)
    return f"how many {plural(shape)} are there?", _number(present.count(shape))


def _ask_colour(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    counts = Counter(thing.shape for thing in scene.things)
    single = [thing for thing in scene.things if counts[thing.shape] == 1]
    if not single:
        return None
    thing = _pick(rng, single)
    return f"what colour is the {thing.shape}?", thing.colour


def _absent(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    """A (shape, colour) that is not there, half of the time with a shape or a colour that is."""
    present = {(thing.shape, thing.colour) for thing in scene.things}
    options = [(shape, colour) for shape in SHAPES for colour in COLOURS if (shape, colour) not in present]
    near = [option for option in options if any((option[0] == s) != (option[1] == c) for s, c in present)]
    return _pick(rng, near if near and rng.random() < 0.5 else options)


def _ask_whether(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    if scene.things and rng.random() < 0.5:
        thing = _pick(rng, scene.things)
        return f"is there {phrase(thing.shape, thing.colour)}?", "yes"
    return f"is there {phrase(*_absent(rng, scene))}?", "no"


def _ask_where(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    counts = Counter((thing.shape, thing.colour) for thing in scene.things)
    single = [thing for thing in scene.things if counts[thing.shape, thing.colour] == 1]
    if not single:
        return None
    thing = _pick(rng, single)
    return f"where is the {thing.colour} {thing.shape}?", place(thing)


def _ask_cell(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    if scene.things and rng.random() < 0.75:
        thing = _pick(rng, scene.things)
        return f"what is at {cell_words()[thing.cell]}?", phrase(thing.shape, thing.colour)
    free = sorted(set(range(GRID**2)) - {thing.cell for thing in scene.things})
    return (f"what is at {cell_words()[_pick(rng, free)]}?", "nothing") if free else _ask_what(rng, scene)


def _ask_background(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    return "what colour is the background?", scene.tone


_KINDS = (_ask_what, _ask_how_many, _ask_colour, _ask_whether, _ask_where, _ask_cell, _ask_background)
_WEIGHTS = np.array([0.25, 0.15, 0.15, 0.15, 0.1, 0.15, 0.05])


def sample_question(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    """A random question about `scene` and its answer; only questions that have one answer are asked."""
    while True:
        asked = _KINDS[rng.choice(len(_KINDS), p=_WEIGHTS)](rng, scene)
        if asked is not None:
            return asked
