"""A scene in words: its plan, its description, questions about it with their answers; and every word of the world.

A plan says the background and where everything is, as an MLLM would write it: "mint background, top left large red
circle, right small blue square". It does not hold the pixels of the places.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any, TypeVar

import numpy as np

from bifrost_cli.shapes.second.captions import (
    COLOUR_WORDS,
    COUNTS,
    OPENERS,
    RELATION_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    Prompt,
    phrase,
    plural,
    sample_prompt,
    sample_scene,
)
from bifrost_cli.shapes.second.scene import COLOURS, RADII, SHAPES, SIZE, TONES, Scene, Thing

Option = TypeVar("Option")
Asked = tuple[str, str]  # a question and its answer

PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four", "five")
_KINDS = {
    "what": 0.15, "how many": 0.15, "colour": 0.15, "whether": 0.2, "where": 0.1, "at": 0.1, "size": 0.1, "tone": 0.05,
}  # fmt: skip
SAMPLES = 4000  # prompts and questions from which the words are taken


def place(thing: Thing) -> str:
    """The ninth of the image that a thing's centre lies in: "top left", "middle"."""
    return PLACES[3 * (3 * thing.y // SIZE) + 3 * thing.x // SIZE]


def words_of(thing: Thing) -> str:
    """Size, colour and shape: "large red circle"."""
    return f"{thing.size} {thing.colour} {thing.shape}"


def in_prompt_order(scene: Scene, prompt: Prompt | None = None) -> list[Thing]:
    """The things as a prompt that the scene shows names them; without it from top to bottom."""
    left, ordered = list(scene.things), []
    for shape, colour, size in prompt.spec.things if prompt else ():
        ordered.append(
            next(t for t in left if t.shape == shape and colour in (None, t.colour) and size in (None, t.size))
        )
        left.remove(ordered[-1])
    return ordered + left


def write_plan(scene: Scene, prompt: Prompt | None = None) -> str:
    """The plan of `scene`; with the prompt it shows, things come in the prompt's order."""
    things = in_prompt_order(scene, prompt)
    return ", ".join([f"{scene.tone} background", *(f"{place(thing)} {words_of(thing)}" for thing in things)])


def describe(scene: Scene) -> str:
    """Everything in the image from top to bottom: "a large red circle and a small blue square"."""
    *names, last = [phrase(thing.shape, thing.colour, thing.size) for thing in scene.things] or ["nothing"]
    return f"{', '.join(names)} and {last}" if names else last


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
            return f"how many {what} are there?", NUMBERS[count]
        case "colour":
            thing = _only_one(rng, scene, lambda thing: thing.shape)
            return (f"what colour is the {thing.shape}?", thing.colour) if thing else None
        case "where":
            thing = _only_one(rng, scene, lambda thing: (thing.shape, thing.colour))
            return (f"where is the {thing.colour} {thing.shape}?", place(thing)) if thing else None
        case "size":
            thing = _only_one(rng, scene, lambda thing: (thing.shape, thing.colour))
            return (f"how big is the {thing.colour} {thing.shape}?", thing.size) if thing else None
        case "whether":  # half of what is not there has a shape or a colour that is
            if things and rng.random() < 0.5:
                thing = _pick(rng, things)
                return f"is there {phrase(thing.shape, thing.colour)}?", "yes"
            pairs = {(thing.shape, thing.colour) for thing in things}
            absent = [pair for pair in product(SHAPES, COLOURS) if pair not in pairs]
            near = [pair for pair in absent if any((pair[0] == s) != (pair[1] == c) for s, c in pairs)]
            return f"is there {phrase(*_pick(rng, near if near and rng.random() < 0.5 else absent))}?", "no"
        case "at":
            if thing := _only_one(rng, scene, place):
                return f"what is at the {place(thing)}?", phrase(thing.shape, thing.colour, thing.size)
        case "tone":
            return "what colour is the background?", scene.tone
    return _pick(rng, ("what is in the picture?", "what do you see?", "describe the picture.")), describe(scene)


def sample_question(rng: np.random.Generator, scene: Scene) -> Asked:
    """A random question about `scene` and its answer; only questions that have one answer are asked."""
    while True:
        if asked := _ask(str(rng.choice(list(_KINDS), p=list(_KINDS.values()))), rng, scene):
            return asked


def words(texts: Iterable[str] = ()) -> list[str]:
    """Words of prompts, plans, of `texts`, and of enough sampled questions and answers to have met them all."""
    rng = np.random.default_rng(0)
    named: list[Mapping[str, tuple[str, ...]]] = [SHAPE_WORDS, SIZE_WORDS, COLOUR_WORDS, RELATION_WORDS]
    seen = [*(word for words in named for group in words.values() for word in group), *TONES, *COUNTS, *NUMBERS, *RADII]
    seen += [*map(plural, (word for group in SHAPE_WORDS.values() for word in group)), *PLACES, *OPENERS, *texts]
    for _ in range(SAMPLES):
        prompt = sample_prompt(rng, split="all")
        seen += [prompt.text, *sample_question(rng, sample_scene(rng, prompt))]
    return sorted(set(re.findall(r"[A-Za-z]+", " ".join(seen))))
