"""Prompts of the toy world: a small grammar over six categories, its parser, its split and its samplers.

A `Prompt` says what an image must show; `sample_scene` draws a scene that shows it. Categories and their names follow
GenEval (Ghosh et al. 2023).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from itertools import permutations, product
from typing import NamedTuple

import numpy as np

from bifrost_cli.shapes.scene import COLOURS, GRID, JITTER, SHAPES, TONES, Scene, Thing

CATEGORIES = ("single_object", "two_objects", "counting", "colors", "position", "color_attribution")
COUNTS = {"two": 2, "three": 3, "four": 4}
RELATIONS = {"above": "above", "below": "below"}
RELATIONS |= {f"{words}{side} of": side for side in ("left", "right") for words in ("", "to the ")}
_MEDIA = ("a picture", "a drawing", "an image", "a photo", "a sketch", "a painting", "a view")
OPENERS = ("", *(f"{medium} of " for medium in _MEDIA))
HELD_OUT_SHARE = 0.2
SPLITS = ("train", "held_out", "all")
_WEIGHTS = (0.1, 0.15, 0.15, 0.1, 0.3, 0.2)  # half of the prompts: position and color_attribution
_ENDING_SHARE = 0.25
_COLOURED_SHARE = 2 / 3  # of position prompts; of counting prompts the rest


class WantedThing(NamedTuple):
    """One thing an image must show; colour None leaves it free."""

    shape: str
    colour: str | None = None


class Spec(NamedTuple):
    """Exactly these things; `relation` is how the first lies to the second; `tone` None leaves the background free."""

    things: tuple[WantedThing, ...]
    relation: str | None = None
    tone: str | None = None


class Prompt(NamedTuple):
    """A prompt (normalised text), its category and what it asks for."""

    text: str
    category: str
    spec: Spec


def phrase(shape: str, colour: str | None = None) -> str:
    """The thing with its article: "a red circle", "an orange star", "a circle"."""
    words = f"{colour} {shape}" if colour else shape
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(shape: str) -> str:
    """The shape's plural: "circles", "crosses"."""
    return shape + ("es" if shape.endswith("s") else "s")


def normalise(text: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def held_out(text: str) -> bool:
    """Whether a prompt belongs to the held-out fifth.

    The split is on the exact normalised text and on nothing else: sha256 of the text, first four bytes as a fraction
    below 0.2. A held-out prompt's words, pairs and even its meaning under another opener may well be trained on.
    """
    return int.from_bytes(sha256(normalise(text).encode()).digest()[:4], "big") < HELD_OUT_SHARE * 2**32


def _cores() -> Iterator[Prompt]:
    """Every prompt without its opener and its ending."""
    plain = [WantedThing(shape) for shape in SHAPES]
    coloured = [WantedThing(shape, colour) for colour, shape in product(COLOURS, SHAPES)]
    for thing in plain + coloured:
        yield Prompt(phrase(*thing), "colors" if thing.colour else "single_object", Spec((thing,)))
    for word, shape, colour in product(COUNTS, SHAPES, (None, *COLOURS)):
        text = " ".join(filter(None, (word, colour, plural(shape))))
        yield Prompt(text, "counting", Spec((WantedThing(shape, colour),) * COUNTS[word]))
    plain_pairs, coloured_pairs = list(permutations(plain, 2)), list(permutations(coloured, 2))
    unlike = [(first, second) for first, second in coloured_pairs if first.colour != second.colour]
    joined = [("two_objects", "and", plain_pairs), ("color_attribution", "and", unlike)]
    joined += [("position", joint, plain_pairs + coloured_pairs) for joint in RELATIONS]
    for category, joint, pairs in joined:
        for first, second in pairs:
            text = f"{phrase(*first)} {joint} {phrase(*second)}"
            yield Prompt(text, category, Spec((first, second), RELATIONS.get(joint)))


@cache
def _by_text() -> dict[str, Prompt]:
    return {core.text: core for core in _cores()}


@cache
def _by_category() -> dict[tuple[str, bool], list[Prompt]]:
    """Cores by category and by whether they name a colour, such that the four relations are drawn equally often."""
    wordings = Counter(RELATIONS.values())
    table: dict[tuple[str, bool], list[Prompt]] = defaultdict(list)
    for core in _cores():
        copies = max(wordings.values()) // wordings[core.spec.relation] if core.spec.relation else 1
        table[core.category, core.spec.things[0].colour is not None] += [core] * copies
    return table


def _prompt(opener: str, core: Prompt, tone: str | None) -> Prompt:
    ending = f" on a {tone} background" if tone else ""
    return Prompt(opener + core.text + ending, core.category, core.spec._replace(tone=tone))


def grammar(category: str) -> Iterator[Prompt]:
    """Every prompt of a category, each once."""
    for core in _by_text().values():
        if core.category == category:
            for opener, tone in product(OPENERS, (None, *TONES)):
                yield _prompt(opener, core, tone)


_FRAME = re.compile(
    rf"(?P<opener>{'|'.join(OPENERS[1:])}|)(?P<core>.+?)(?: on a (?P<tone>{'|'.join(TONES)}) background)?"
)


def parse(text: str) -> Prompt:
    """Read a prompt of the grammar; case, spacing and a full stop do not matter. ValueError says what is understood."""
    match = _FRAME.fullmatch(normalise(text))
    if match is None or match["core"] not in _by_text():
        raise ValueError(
            f"not a prompt of the built-in world: {text!r}. Understood are one thing ('a circle', 'a red circle'), two"
            f" ('a circle and a square', 'a red circle and a blue square'), {', '.join(COUNTS)} of a kind ('three"
            f" circles'), and 'a red circle above a blue square' with {', '.join(RELATIONS)}; shapes"
            f" {', '.join(SHAPES)}; colours {', '.join(COLOURS)}; at the end, if wanted,"
            f" 'on a {'|'.join(TONES)} background'"
        )
    return _prompt(match["opener"], _by_text()[match["core"]], match["tone"])


def sample_prompt(rng: np.random.Generator, split: str = "train", category: str | None = None) -> Prompt:
    """A random prompt of a split ('train', 'held_out', 'all'); by default half are about place or attribution."""
    if split not in SPLITS:
        raise ValueError(f"no such split: {split!r} ({', '.join(SPLITS)})")
    chosen = category or CATEGORIES[int(np.searchsorted(np.cumsum(_WEIGHTS)[:-1], rng.random(), side="right"))]
    share = {"position": _COLOURED_SHARE, "counting": 1 - _COLOURED_SHARE}.get(chosen)
    while True:
        named = chosen in ("colors", "color_attribution") if share is None else bool(rng.random() < share)
        cores = _by_category()[chosen, named]
        tone = list(TONES)[rng.integers(len(TONES))] if rng.random() < _ENDING_SHARE else None
        prompt = _prompt(OPENERS[rng.integers(len(OPENERS))], cores[rng.integers(len(cores))], tone)
        if split == "all" or held_out(prompt.text) == (split == "held_out"):
            return prompt


def held_out_prompts(n: int, seed: int = 0, split: str = "held_out") -> list[Prompt]:
    """`n` distinct prompts of a split, a sixth a category; where a small category runs out, the larger ones fill up."""
    rng = np.random.default_rng(seed)
    by_size = ("single_object", "two_objects", "colors", "counting", "color_attribution", "position")
    chosen: dict[str, Prompt] = {}
    for place, category in enumerate(by_size):
        quota = len(chosen) + (n - len(chosen)) // (len(by_size) - place)
        for _ in range(5000 + 20 * quota):
            if len(chosen) >= quota:
                break
            prompt = sample_prompt(rng, split, category)
            chosen.setdefault(prompt.text, prompt)
    return sorted(chosen.values(), key=lambda prompt: CATEGORIES.index(prompt.category))


@cache
def _cell_pairs(relation: str) -> list[tuple[int, int]]:
    """Ordered pairs of cells whose first lies to the second as named, that axis dominating."""
    down, right = {"above": (-1, 0), "below": (1, 0), "left": (0, -1), "right": (0, 1)}[relation]
    pairs = []
    for first, second in permutations(range(GRID**2), 2):
        rows, cols = first // GRID - second // GRID, first % GRID - second % GRID
        if rows * down + cols * right > abs(cols if down else rows):
            pairs.append((first, second))
    return pairs


def sample_scene(rng: np.random.Generator, prompt: Prompt) -> Scene:
    """A scene that shows the prompt and nothing else, uniform over cells, shifts, and unnamed colours and tones.

    Where no relation is named, the things of the prompt come in reading order, as people list what they see.
    """
    spec = prompt.spec
    colours, tones = list(COLOURS), list(TONES)
    if spec.relation:
        pairs = _cell_pairs(spec.relation)
        cells = list(pairs[rng.integers(len(pairs))])
    else:
        cells = sorted(rng.permutation(GRID**2)[: len(spec.things)].tolist())
    things = []
    for wanted, cell in zip(spec.things, cells, strict=True):
        free, dx, dy = rng.integers(0, (len(colours), 2 * JITTER + 1, 2 * JITTER + 1)).tolist()
        colour = wanted.colour or colours[free]
        things.append(Thing(wanted.shape, colour, cell // GRID, cell % GRID, dx - JITTER, dy - JITTER))
    return Scene(spec.tone or tones[rng.integers(len(tones))], tuple(things))


def training_sample(rng: np.random.Generator) -> tuple[Prompt, Scene]:
    """A prompt of the training split, and a scene that shows it."""
    prompt = sample_prompt(rng, split="train")
    return prompt, sample_scene(rng, prompt)
