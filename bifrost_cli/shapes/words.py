"""A scene in words: its plan, its description, questions about it with their answers; and every word of the toy world.

A plan is a line, `"white ab redcircle cd bluesquare"`: the tone, then for each thing its cell word (row letter, column
letter) and its thing word (colour and shape as one word). It does not hold the pixel shifts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any, TypeVar

import numpy as np

from bifrost_cli.shapes.captions import Prompt, phrase, plural, sample_prompt, sample_scene
from bifrost_cli.shapes.scene import COLOURS, GRID, SHAPES, TONES, Scene, Thing

Option = TypeVar("Option")
Asked = tuple[str, str]  # a question and its answer

EMPTY = "none"
CELL_WORDS = tuple(row + col for row in "abcd" for col in "abcd")  # in reading order: aa, ab, ... dd
THING_WORDS = tuple(colour + shape for colour in COLOURS for shape in SHAPES)  # redcircle, redsquare, ... orangestar
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
_KINDS = {"what": 0.25, "how many": 0.15, "colour": 0.15, "whether": 0.15, "where": 0.1, "cell": 0.15, "tone": 0.05}
SAMPLES = 4000  # prompts and questions from which the words are taken


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


def describe(scene: Scene) -> str:
    """Everything in the image in reading order: "a red circle and a blue square"; "nothing" when it is empty."""
    *names, last = [phrase(thing.shape, thing.colour) for thing in scene.things] or ["nothing"]
    return f"{', '.join(names)} and {last}" if names else last


def place(thing: Thing) -> str:
    """The quarter of the image a thing stands in: "top left", "bottom right"."""
    return f"{'top' if thing.row < GRID // 2 else 'bottom'} {'left' if thing.col < GRID // 2 else 'right'}"


def _pick(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    return options[int(rng.integers(len(options)))]


def _only_one(rng: np.random.Generator, scene: Scene, kind: Callable[[Thing], Any]) -> Thing | None:
    """A thing that is the only one of its kind."""
    counts = Counter(map(kind, scene.things))
    single = [thing for thing in scene.things if counts[kind(thing)] == 1]
    return _pick(rng, single) if single else None


def _ask(kind: str, rng: np.random.Generator, scene: Scene) -> Asked | None:
    things = scene.things
    match kind:
        case "how many":
            present = [thing.shape for thing in things]
            if rng.random() < 0.4:
                what, count = "things", len(present)
            else:
                shape = _pick(rng, present) if present and rng.random() < 0.75 else _pick(rng, SHAPES)
                what, count = plural(shape), present.count(shape)
            return f"how many {what} are there?", NUMBERS[count] if count < len(NUMBERS) else str(count)
        case "colour":
            thing = _only_one(rng, scene, lambda thing: thing.shape)
            return (f"what colour is the {thing.shape}?", thing.colour) if thing else None
        case "where":
            thing = _only_one(rng, scene, lambda thing: (thing.shape, thing.colour))
            return (f"where is the {thing.colour} {thing.shape}?", place(thing)) if thing else None
        case "whether":  # half of what is not there has a shape or a colour that is
            if things and rng.random() < 0.5:
                thing = _pick(rng, things)
                return f"is there {phrase(thing.shape, thing.colour)}?", "yes"
            pairs = {(thing.shape, thing.colour) for thing in things}
            absent = [pair for pair in product(SHAPES, COLOURS) if pair not in pairs]
            near = [pair for pair in absent if any((pair[0] == s) != (pair[1] == c) for s, c in pairs)]
            return f"is there {phrase(*_pick(rng, near if near and rng.random() < 0.5 else absent))}?", "no"
        case "cell":
            if things and rng.random() < 0.75:
                thing = _pick(rng, things)
                return f"what is at {CELL_WORDS[thing.cell]}?", phrase(thing.shape, thing.colour)
            if free := sorted(set(range(GRID**2)) - {thing.cell for thing in things}):
                return f"what is at {CELL_WORDS[_pick(rng, free)]}?", "nothing"
        case "tone":
            return "what colour is the background?", scene.tone
    return _pick(rng, ("what is in the picture?", "what do you see?", "describe the picture.")), describe(scene)


def sample_question(rng: np.random.Generator, scene: Scene) -> Asked:
    """A random question about `scene` and its answer; only questions that have one answer are asked."""
    while True:
        if asked := _ask(str(rng.choice(list(_KINDS), p=list(_KINDS.values()))), rng, scene):
            return asked


def words(texts: Iterable[str] = ()) -> list[str]:
    """Words of plans, of `texts`, and of enough sampled prompts, questions and answers to have met them all."""
    rng = np.random.default_rng(0)
    seen = [*CELL_WORDS, *THING_WORDS, *TONES, EMPTY, *texts]
    for _ in range(SAMPLES):
        prompt = sample_prompt(rng, split="all")
        seen += [prompt.text, *sample_question(rng, sample_scene(rng, prompt))]
    return sorted(set(re.findall(r"[A-Za-z]+", " ".join(seen))))
