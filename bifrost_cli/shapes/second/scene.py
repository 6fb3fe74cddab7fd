"""What an image of the second toy world shows: things of two sizes that stand anywhere on a shaded background."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

SIZE = 128  # px, side of an image
MARGIN = 2  # px, least distance of a thing from the image's edge
GAP = 4  # px, least distance of two things' bounding circles
MOST = 5  # things in an image

# Far apart also after shading, and from every tone.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 34, 44),
    "orange": (250, 132, 16),
    "yellow": (240, 205, 24),
    "green": (34, 150, 66),
    "blue": (36, 84, 222),
    "purple": (132, 44, 180),
    "pink": (250, 122, 190),
    "black": (44, 44, 50),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
RADII: dict[str, int] = {"small": 9, "large": 15}  # px
REACH = 1.2  # times its radius, no pixel of a thing is farther from its centre
TONES: dict[str, tuple[int, int, int]] = {
    "white": (252, 252, 252),
    "grey": (206, 206, 210),
    "cream": (250, 234, 200),
    "mint": (208, 240, 222),
}
SLOPES: tuple[tuple[int, int], ...] = ((0, 1), (1, 0), (1, 1), (-1, 1))  # the (x, y) direction in which it darkens


@dataclass(frozen=True)
class Thing:
    """One shape with its centre (x, y) in px from the image's top left corner."""

    shape: str
    colour: str
    size: str
    x: int
    y: int

    def __post_init__(self) -> None:
        if self.shape not in SHAPES or self.colour not in COLOURS or self.size not in RADII:
            raise ValueError(f"no such thing: {self.size} {self.colour} {self.shape}")
        if not all(self.reach + MARGIN <= at <= SIZE - self.reach - MARGIN for at in (self.x, self.y)):
            raise ValueError(f"a {self.size} thing does not fit at {self.x}, {self.y}")

    @property
    def reach(self) -> int:
        """No pixel of it is farther from its centre, px."""
        return reach(self.size)


def reach(size: str) -> int:
    """The radius of the bounding circle of things of this size, px."""
    return math.ceil(REACH * RADII[size])


@dataclass(frozen=True)
class Scene:
    """A tone that darkens along `SLOPES[slope]`, and things that keep apart; kept from top to bottom, then left."""

    tone: str
    things: tuple[Thing, ...]
    slope: int = 0

    def __post_init__(self) -> None:
        if self.tone not in TONES:
            raise ValueError(f"no such tone: {self.tone} (there are {', '.join(TONES)})")
        ordered = tuple(sorted(self.things, key=lambda thing: (thing.y, thing.x)))
        for index, one in enumerate(ordered):
            if any(math.hypot(one.x - it.x, one.y - it.y) < one.reach + it.reach + GAP for it in ordered[:index]):
                raise ValueError("two things are too near to each other")
        object.__setattr__(self, "things", ordered)


def place_things(rng: np.random.Generator, sizes: list[str], tries: int = 200) -> list[tuple[int, int]]:
    """Centres for things of these sizes, each uniform where it fits, by rejection."""
    reaches = [reach(size) for size in sizes]
    for _ in range(tries):
        centres: list[tuple[int, int]] = []
        for index, own in enumerate(reaches):
            for _ in range(30):
                x, y = rng.integers(own + MARGIN, SIZE - own - MARGIN + 1, 2).tolist()
                if all(math.hypot(x - u, y - v) >= own + reaches[i] + GAP for i, (u, v) in enumerate(centres)):
                    centres.append((x, y))
                    break
            if len(centres) <= index:
                break
        if len(centres) == len(sizes):
            return centres
    raise ValueError(f"{len(sizes)} things of sizes {', '.join(sizes)} do not fit")
