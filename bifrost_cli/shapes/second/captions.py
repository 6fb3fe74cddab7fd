"""Prompts of the second toy world: a grammar with synonyms over eight categories, its parser, its splits, its samplers.

A `Prompt` says what an image must show; `sample_scene` draws a scene that shows it. The first six categories and their
names follow GenEval (Ghosh et al. 2023).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import NamedTuple

import numpy as np

from bifrost_cli.shapes.second.scene import COLOURS, RADII, SHAPES, SLOPES, TONES, Scene, Thing, place_things

# Category -> how often it is drawn.
CATEGORIES = {
    "single_object": 0.06,
    "two_objects": 0.12,
    "counting": 0.14,
    "colors": 0.08,
    "position": 0.22,
    "color_attribution": 0.16,
    "size": 0.12,
    "between": 0.1,
}
COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5}
RELATIONS = {"above": (0, -1), "below": (0, 1), "left": (-1, 0), "right": (1, 0)}  # towards (x, y)
OPPOSITE = {"below": "above", "right": "left"}
# Words for one meaning; the first is the name.
SHAPE_WORDS = {shape: (shape,) for shape in SHAPES} | {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop"),
    "diamond": ("diamond", "rhombus"),
}
COLOUR_WORDS = {colour: (colour,) for colour in COLOURS} | {"purple": ("purple", "violet"), "grey": ("grey", "gray")}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
RELATION_WORDS = {
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
}
OPENERS = (
    *("",) * 3,
    *(f"{medium} of " for medium in ("a picture", "an image", "a photo", "a drawing", "a painting")),
    *("there is ", "show me ", "please paint ", "i want to see "),
)
HELD_OUT_SHARE = 0.15  # of meanings
NEW_PAIRS = frozenset({("red", "heart"), ("orange", "ring"), ("yellow", "star"), ("green", "triangle"),
                       ("blue", "cross"), ("purple", "circle"), ("pink", "square"), ("black", "diamond")})  # fmt: skip
NEW_RELATION_SHARE = 0.1  # of ordered pairs of shapes in a relation
SPLITS = ("train", "held_out", "new", "all")
APART = 24  # px along the relation's axis, least in a drawn scene
_NEVER_NEW = ("single_object", "two_objects")  # they name no colour and no relation
_TEXTS = 6  # wordings of one meaning among held-out prompts
_ENDING_SHARE = 0.25
_COLOURED_SHARE = 0.6  # of position and between
_SIZED_SHARE = 0.15  # of things where the size is not the point


class WantedThing(NamedTuple):
    """One thing an image must show; None leaves colour or size free."""

    shape: str
    colour: str | None = None
    size: str | None = None


class Spec(NamedTuple):
    """Exactly these things; `relation` is how the first lies to the others; `tone` None leaves the background free."""

    things: tuple[WantedThing, ...]
    relation: str | None = None
    tone: str | None = None

    @property
    def category(self) -> str:
        """Which of `CATEGORIES` it belongs to."""
        if self.relation:
            return "between" if self.relation == "between" else "position"
        if len(self.things) > 1 and len(set(self.things)) == 1:
            return "counting"
        if any(thing.size for thing in self.things):
            return "size"
        if len(self.things) == 1:
            return "colors" if self.things[0].colour else "single_object"
        return "color_attribution" if all(thing.colour for thing in self.things) else "two_objects"


class Prompt(NamedTuple):
    """A prompt (normalised text), its category and what it asks for."""

    text: str
    category: str
    spec: Spec


def phrase(shape: str, colour: str | None = None, size: str | None = None) -> str:
    """The thing with its article: "a red circle", "an orange star", "a large circle"."""
    words = " ".join(filter(None, (size, colour, shape)))
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(shape: str) -> str:
    """The shape's plural: "circles", "crosses", "rhombuses"."""
    return shape + ("es" if shape.endswith(("s", "x")) else "s")


def normalise(text: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def meaning(spec: Spec) -> str:
    """The core of a prompt in one wording: what any opener, ending, synonym, or turned relation says alike."""
    things, relation = list(spec.things), spec.relation
    if relation in OPPOSITE:
        things, relation = things[::-1], OPPOSITE[relation]
    elif relation == "between":
        things[1:] = sorted(things[1:], key=str)
    elif relation is None:
        things.sort(key=str)
    return f" {relation or 'and'} ".join(phrase(*thing) for thing in things)


def _share(text: str) -> float:
    return int.from_bytes(sha256(text.encode()).digest()[:4], "big") / 2**32


def split_of(spec: Spec) -> str:
    """The split of a meaning.

    "new": it names a pair of colour and shape, or puts two shapes in a relation, that no training prompt has;
    "held_out": else, and its `meaning` is in the held-out share (by sha256); "train": all others.
    """
    if any((thing.colour, thing.shape) in NEW_PAIRS for thing in spec.things):
        return "new"
    if spec.relation in RELATIONS:
        first, second = (thing.shape for thing in spec.things)
        if spec.relation in OPPOSITE:
            first, second = second, first
        if _share(f"{first} {OPPOSITE.get(spec.relation, spec.relation)} {second}") < NEW_RELATION_SHARE:
            return "new"
    return "held_out" if _share(meaning(spec)) < HELD_OUT_SHARE else "train"


def _pick(rng: np.random.Generator, options: tuple[str, ...] | list[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _wanted(rng: np.random.Generator, coloured: bool, sized: bool = False) -> WantedThing:
    return WantedThing(
        _pick(rng, SHAPES), _pick(rng, [*COLOURS]) if coloured else None, _pick(rng, [*RADII]) if sized else None
    )


def _sample_spec(rng: np.random.Generator, category: str) -> Spec:
    sized = rng.random() < _SIZED_SHARE
    coloured = rng.random() < _COLOURED_SHARE
    match category:
        case "single_object" | "colors":
            return Spec((_wanted(rng, category == "colors"),))
        case "counting":
            number = int(rng.choice(list(COUNTS.values()), p=(0.3, 0.3, 0.25, 0.15)))
            return Spec((_wanted(rng, rng.random() < 0.4, sized),) * number)
        case "size":
            if rng.random() < 0.35:
                return Spec((_wanted(rng, coloured, sized=True),))
            return Spec((_wanted(rng, coloured, sized=True), _wanted(rng, coloured, sized=True)))
        case "two_objects" | "color_attribution":
            return Spec(tuple(_wanted(rng, category == "color_attribution") for _ in range(2)))
        case "position":
            return Spec(tuple(_wanted(rng, coloured, sized) for _ in range(2)), _pick(rng, [*RELATIONS]))
        case "between":
            return Spec(tuple(_wanted(rng, coloured) for _ in range(3)), "between")
    raise ValueError(f"no such category: {category!r} ({', '.join(CATEGORIES)})")


def _sensible(spec: Spec, category: str) -> bool:
    """Things that are told apart by what the prompt names: it would be another category, or no statement, else."""
    shapes, colours = [it.shape for it in spec.things], [it.colour for it in spec.things if it.colour]
    if spec.category != category:
        return False
    if category == "counting" or len(shapes) == 1:
        return True
    if category == "size":
        return len(set(spec.things)) == 2
    return len(set(shapes)) == len(shapes) and (not colours or len(set(colours)) == len(colours))


def _noun(rng: np.random.Generator, thing: WantedThing) -> str:
    return phrase(
        _pick(rng, SHAPE_WORDS[thing.shape]),
        thing.colour and _pick(rng, COLOUR_WORDS[thing.colour]),
        thing.size and _pick(rng, SIZE_WORDS[thing.size]),
    )


def write_prompt(rng: np.random.Generator, spec: Spec) -> Prompt:
    """One of the wordings of a meaning."""
    things = spec.things
    if spec.category == "counting":
        thing = things[0]
        words = [word for word, number in COUNTS.items() if number == len(things)]
        words += [_pick(rng, SIZE_WORDS[thing.size])] if thing.size else []
        words += [_pick(rng, COLOUR_WORDS[thing.colour])] if thing.colour else []
        core = " ".join([*words, plural(_pick(rng, SHAPE_WORDS[thing.shape]))])
    elif spec.relation == "between":
        first, *ends = (_noun(rng, thing) for thing in things)
        core = f"{first} between {' and '.join(ends)}"
    else:
        joint = _pick(rng, RELATION_WORDS[spec.relation]) if spec.relation else "and"
        core = f" {joint} ".join(_noun(rng, thing) for thing in things)
    ending = f" on a {_pick(rng, COLOUR_WORDS.get(spec.tone, (spec.tone,)))} background" if spec.tone else ""
    opener = _pick(rng, OPENERS)
    if opener == "there is " and spec.category == "counting":
        opener = "there are "
    return Prompt(opener + core + ending, spec.category, spec)


def sample_prompt(rng: np.random.Generator, split: str = "train", category: str | None = None) -> Prompt:
    """A random prompt of a split: 'train', 'held_out', 'new' (see `split_of`) or 'all'."""
    if split not in SPLITS:
        raise ValueError(f"no such split: {split!r} ({', '.join(SPLITS)})")
    shares = {name: 0.0 if split == "new" and name in _NEVER_NEW else share for name, share in CATEGORIES.items()}
    if category and not shares.get(category):
        raise ValueError(f"no {category!r} prompts in split {split!r}")
    chosen = category or str(rng.choice(list(shares), p=np.array(list(shares.values())) / sum(shares.values())))
    while True:
        spec = _sample_spec(rng, chosen)
        if _sensible(spec, chosen) and split in ("all", split_of(spec)):
            tone = _pick(rng, [*TONES]) if rng.random() < _ENDING_SHARE else None
            return write_prompt(rng, spec._replace(tone=tone))


def held_out_prompts(n: int, seed: int = 0, split: str = "held_out") -> list[Prompt]:
    """`n` distinct prompts of a split, equally many a category, at most `_TEXTS` wordings of one meaning.

    Where a small category runs out, larger ones fill up; "new" has none without a colour or a relation.
    """
    rng = np.random.default_rng(seed)
    by_size = ["single_object", "two_objects", "colors", "counting", "size", "color_attribution", "position", "between"]
    by_size = [name for name in by_size if split != "new" or name not in _NEVER_NEW]
    chosen: dict[str, Prompt] = {}
    wordings: Counter[str] = Counter()
    for place, category in enumerate(by_size):
        quota = len(chosen) + (n - len(chosen)) // (len(by_size) - place)
        for _ in range(200 + 20 * quota):
            if len(chosen) >= quota:
                break
            prompt = sample_prompt(rng, split, category)
            if prompt.text not in chosen and wordings[meaning(prompt.spec)] < _TEXTS:
                chosen[prompt.text] = prompt
                wordings[meaning(prompt.spec)] += 1
    return sorted(chosen.values(), key=lambda prompt: list(CATEGORIES).index(prompt.category))


def _alternatives(
    words: Mapping[str, tuple[str, ...]], form: Callable[[str], str] = str
) -> tuple[str, dict[str | None, str]]:
    """A pattern of all words, longest first, and what each means."""
    named: dict[str | None, str] = {form(word): name for name, synonyms in words.items() for word in synonyms}
    return "|".join(sorted((re.escape(str(word)) for word in named), key=len, reverse=True)), named


_SHAPE, _SHAPES_BY_WORD = _alternatives(SHAPE_WORDS)
_PLURAL, _SHAPES_BY_PLURAL = _alternatives(SHAPE_WORDS, plural)
_COLOUR, _COLOURS_BY_WORD = _alternatives({name: COLOUR_WORDS[name] for name in COLOURS})
_SIZE, _SIZES_BY_WORD = _alternatives(SIZE_WORDS)
_RELATION, _RELATIONS_BY_WORD = _alternatives(RELATION_WORDS)
_TONE, _TONES_BY_WORD = _alternatives({tone: COLOUR_WORDS.get(tone, (tone,)) for tone in TONES})
_NOUN = re.compile(rf"an? (?:({_SIZE}) )?(?:({_COLOUR}) )?({_SHAPE})")
_COUNTED = re.compile(rf"({'|'.join(COUNTS)}) (?:({_SIZE}) )?(?:({_COLOUR}) )?({_PLURAL})")
_FRAME = re.compile(
    rf"(?:{'|'.join(sorted({*OPENERS[3:], 'there are '}, key=len, reverse=True))})?(?P<core>.+?)"
    rf"(?: on an? (?P<tone>{_TONE}) background)?"
)


def _parse_noun(text: str) -> WantedThing | None:
    if not (match := _NOUN.fullmatch(text)):
        return None
    size, colour, shape = match.groups()
    return WantedThing(_SHAPES_BY_WORD[shape], _COLOURS_BY_WORD.get(colour), _SIZES_BY_WORD.get(size))


def _parse_core(text: str) -> Spec | None:
    if match := _COUNTED.fullmatch(text):
        number, size, colour, shape = match.groups()
        thing = WantedThing(_SHAPES_BY_PLURAL[shape], _COLOURS_BY_WORD.get(colour), _SIZES_BY_WORD.get(size))
        return Spec((thing,) * COUNTS[number])
    relation = None
    parts = re.split(r" between | and ", text)
    if " between " in text:
        relation = "between"
    elif match := re.search(rf" ({_RELATION}) ", text):
        relation, parts = _RELATIONS_BY_WORD[match[1]], [text[: match.start()], text[match.end() :]]
    things = tuple(thing for thing in map(_parse_noun, parts) if thing)
    wanted = {None: (1, 2), "between": (3,)}.get(relation, (2,))
    return Spec(things, relation) if len(things) == len(parts) and len(parts) in wanted else None


def parse(text: str) -> Prompt:
    """Read a prompt of the grammar; case, spacing and a full stop do not matter. ValueError says what is understood."""
    match = _FRAME.fullmatch(normalise(text))
    spec = _parse_core(match["core"]) if match else None
    if match is None or spec is None:
        raise ValueError(
            f"not a prompt of the built-in world: {text!r}. Understood are one thing ('a circle', 'a small red"
            f" circle'), two ('a circle and a blue square'), {', '.join(COUNTS)} of a kind ('three red circles'), 'a"
            f" red circle above a blue square' with {', '.join(words[0] for words in RELATION_WORDS.values())}, and"
            f" 'a star between a ring and a heart'; shapes {', '.join(SHAPES)}; colours {', '.join(COLOURS)}; sizes"
            f" {', '.join(RADII)}; at the end, if wanted, 'on a {'|'.join(TONES)} background'"
        )
    spec = spec._replace(tone=_TONES_BY_WORD.get(match["tone"]))
    return Prompt(normalise(text), spec.category, spec)


def between(middle: tuple[float, float], one: tuple[float, float], other: tuple[float, float]) -> float:
    """How far `middle` lies from the line between the two, px; infinite where it lies not in its middle part."""
    (px, py), (ax, ay), (bx, by) = middle, one, other
    dx, dy = bx - ax, by - ay
    length = math.hypot(dx, dy)
    share = ((px - ax) * dx + (py - ay) * dy) / length**2
    return abs((px - ax) * dy - (py - ay) * dx) / length if 0.2 < share < 0.8 else math.inf


def _centres(rng: np.random.Generator, relation: str | None, sizes: list[str]) -> list[tuple[int, int]]:
    """Where things of these sizes stand in this relation: along its axis, which dominates."""
    while True:
        if relation == "between":
            one, other = place_things(rng, sizes[1:])
            share, aside_x, aside_y = rng.uniform((0.4, -4, -4), (0.6, 4, 4)).tolist()
            x, y = (round(a + share * (b - a) + off) for a, b, off in zip(one, other, (aside_x, aside_y), strict=True))
            return [(x, y), one, other]
        centres = place_things(rng, sizes)
        if relation is None:
            return centres
        right, down = RELATIONS[relation]
        (x, y), (other_x, other_y) = centres
        along, across = (x - other_x) * right + (y - other_y) * down, (x - other_x) * down + (y - other_y) * right
        if along >= max(APART, abs(across)):
            return centres


def sample_scene(rng: np.random.Generator, prompt: Prompt, pairs: str = "all") -> Scene:
    """A scene that shows the prompt and nothing else, uniform over what it leaves free.

    Args:
        pairs: "seen" never takes one of `NEW_PAIRS` where the prompt leaves the colour free.
    """
    spec = prompt.spec
    while True:
        things = []
        sizes = [wanted.size or _pick(rng, [*RADII]) for wanted in spec.things]
        try:
            for wanted, size, centre in zip(spec.things, sizes, _centres(rng, spec.relation, sizes), strict=True):
                free = [c for c in COLOURS if pairs == "all" or (c, wanted.shape) not in NEW_PAIRS]
                things.append(Thing(wanted.shape, wanted.colour or _pick(rng, free), size, *centre))
            return Scene(spec.tone or _pick(rng, [*TONES]), tuple(things), int(rng.integers(len(SLOPES))))
        except ValueError:  # too near to each other or to the edge
            continue


def training_sample(rng: np.random.Generator) -> tuple[Prompt, Scene]:
    """A prompt of the training split, and a scene that shows it and holds no pair that is kept from training."""
    prompt = sample_prompt(rng, split="train")
    return prompt, sample_scene(rng, prompt, pairs="seen")
