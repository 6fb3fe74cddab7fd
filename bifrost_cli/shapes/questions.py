"""Questions about an image of the toy world with their answers, and every word that the toy world has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from bifrost_cli.shapes.captions import phrase, plural, sample_prompt, sample_scene
from bifrost_cli.shapes.scene import COLOURS, GRID, SHAPES, TONES, Scene, Thing
from bifrost_cli.shapes.scene_plan import CELL_WORDS, EMPTY, THING_WORDS

Option = TypeVar("Option")
Asked = tuple[str, str]  # a question and its answer

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
SAMPLES = 4000  # prompts and questions from which the words are taken


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


def _ask_what(rng: np.random.Generator, scene: Scene) -> Asked:
    return _pick(rng, ("what is in the picture?", "what do you see?", "describe the picture.")), describe(scene)


def _ask_how_many(rng: np.random.Generator, scene: Scene) -> Asked:
    present = [thing.shape for thing in scene.things]
    if rng.random() < 0.4:
        what, count = "things", len(present)
    else:
        shape = _pick(rng, present) if present and rng.random() < 0.75 else _pick(rng, SHAPES)
        what, count = plural(shape), present.count(shape)
    return f"how many {what} are there?", NUMBERS[count] if count < len(NUMBERS) else str(count)


def _ask_colour(rng: np.random.Generator, scene: Scene) -> Asked | None:
    thing = _only_one(rng, scene, lambda thing: thing.shape)
    return (f"what colour is the {thing.shape}?", thing.colour) if thing else None


def _ask_whether(rng: np.random.Generator, scene: Scene) -> Asked:
    """Half of what is not there has a shape or a colour that is."""
    if scene.things and rng.random() < 0.5:
        thing = _pick(rng, scene.things)
        return f"is there {phrase(thing.shape, thing.colour)}?", "yes"
    present = {(thing.shape, thing.colour) for thing in scene.things}
    absent = [(shape, colour) for shape in SHAPES for colour in COLOURS if (shape, colour) not in present]
    near = [option for option in absent if any((option[0] == s) != (option[1] == c) for s, c in present)]
    return f"is there {phrase(*_pick(rng, near if near and rng.random() < 0.5 else absent))}?", "no"


def _ask_where(rng: np.random.Generator, scene: Scene) -> Asked | None:
    thing = _only_one(rng, scene, lambda thing: (thing.shape, thing.colour))
    return (f"where is the {thing.colour} {thing.shape}?", place(thing)) if thing else None


def _ask_cell(rng: np.random.Generator, scene: Scene) -> Asked:
    if scene.things and rng.random() < 0.75:
        thing = _pick(rng, scene.things)
        return f"what is at {CELL_WORDS[thing.cell]}?", phrase(thing.shape, thing.colour)
    free = sorted(set(range(GRID**2)) - {thing.cell for thing in scene.things})
    return (f"what is at {CELL_WORDS[_pick(rng, free)]}?", "nothing") if free else _ask_what(rng, scene)


def _ask_background(rng: np.random.Generator, scene: Scene) -> Asked:
    return "what colour is the background?", scene.tone


_KINDS = (_ask_what, _ask_how_many, _ask_colour, _ask_whether, _ask_where, _ask_cell, _ask_background)
_WEIGHTS = np.array([0.25, 0.15, 0.15, 0.15, 0.1, 0.15, 0.05])


def sample_question(rng: np.random.Generator, scene: Scene) -> Asked:
    """A random question about `scene` and its answer; only questions that have one answer are asked."""
    while True:
        if asked := _KINDS[rng.choice(len(_KINDS), p=_WEIGHTS)](rng, scene):
            return asked


def words(texts: Iterable[str] = ()) -> list[str]:
    """Words of plans, of `texts`, and of enough sampled prompts, questions and answers to have met them all."""
    rng = np.random.default_rng(0)
    seen = [*CELL_WORDS, *THING_WORDS, *TONES, EMPTY, *texts]
    for _ in range(SAMPLES):
        prompt = sample_prompt(rng, split="all")
        seen += [prompt.text, *sample_question(rng, sample_scene(rng, prompt))]
    return sorted(set(re.findall(r"[A-Za-z]+", " ".join(seen))))
