"""Drawing a scene: the same scene gives the same bytes everywhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from bifrost_cli.shapes.second.scene import (
    COLOURS,
    MOST,
    RADII,
    SHAPES,
    SIZE,
    SLOPES,
    TONES,
    Scene,
    Thing,
    place_things,
    reach,
)

DARKENING = 0.1  # of the background, from one end to the other
SHADING = 0.2  # of a thing, from its lit upper left to its lower right
_SAMPLES = 8  # samples a pixel and axis

Field = np.ndarray


def _polygon(x: Field, y: Field, corners: list[tuple[float, float]]) -> Field:
    """True where (x, y) lies inside, by the even-odd rule."""
    inside = np.zeros(np.broadcast(x, y).shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 != y1:
            crosses = (y0 > y) != (y1 > y)
            inside ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside


def _heart(x: Field, y: Field) -> Field:
    lobes = (abs(x) - 0.44) ** 2 + (y + 0.34) ** 2 < 0.46**2
    return (
        lobes | _polygon(x, y, [(-0.86, -0.16), (0.86, -0.16), (0.0, 0.98)]) | ((abs(x) < 0.44) & (abs(y + 0.2) < 0.2))
    )


_STAR = [(radius * np.sin(angle), -radius * np.cos(angle))  # clockwise from straight up
         for radius, angle in zip((1.12, 0.46) * 5, np.radians(36.0 * np.arange(10)), strict=True)]  # fmt: skip
# Inside or not, in units of the radius; the areas are alike.
_INSIDE: dict[str, Callable[[Field, Field], Field]] = {
    "circle": lambda x, y: x * x + y * y < 0.96**2,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.84,
    "triangle": lambda x, y: _polygon(x, y, [(0.0, -1.02), (1.04, 0.84), (-1.04, 0.84)]),
    "star": lambda x, y: _polygon(x, y, _STAR),
    "heart": _heart,
    "cross": lambda x, y: (np.maximum(abs(x), abs(y)) < 0.98) & (np.minimum(abs(x), abs(y)) < 0.32),
    "ring": lambda x, y: (x * x + y * y < 1.0) & (x * x + y * y > 0.52**2),
    "diamond": lambda x, y: abs(x) / 0.82 + abs(y) / 1.14 < 1,
}


@cache
def sprite(shape: str, size: str) -> Field:
    """Coverage (2 reach, 2 reach) float32 in 0 to 1, centred on the corner between the middle pixels."""
    half = reach(size)
    at = ((np.arange(2 * half * _SAMPLES) + 0.5) / _SAMPLES - half) / RADII[size]
    inside = _INSIDE[shape](at[None, :], at[:, None])
    mask = inside.reshape(2 * half, _SAMPLES, 2 * half, _SAMPLES).mean((1, 3), dtype=np.float32)
    mask.setflags(write=False)
    return mask


@cache
def _shaded(size: str) -> Field:
    """By how much the colour of a thing is multiplied: lit from the upper left, a little darker towards the rim."""
    half = reach(size)
    at = (np.arange(2 * half) + 0.5 - half) / RADII[size]
    x, y = at[None, :], at[:, None]
    return (1 - SHADING * ((x + y) / 2 + 0.3 * (x * x + y * y))).astype(np.float32)[..., None]


@cache
def _painted(shape: str, colour: str, size: str) -> tuple[Field, Field]:
    """What a thing adds, and by how much it lets the background through."""
    cover = sprite(shape, size)[..., None]
    return cover * np.clip(np.array(COLOURS[colour], np.float32) * _shaded(size), 0, 255), 1 - cover


@cache
def backdrop(tone: str, slope: int) -> Field:
    """The empty background (SIZE, SIZE, 3) float32."""
    right, down = SLOPES[slope]
    at = (np.arange(SIZE) + 0.5) / SIZE - 0.5
    along = (right * at[None, :] + down * at[:, None]) / (abs(right) + abs(down)) + 0.5
    return (1 - DARKENING * along).astype(np.float32)[..., None] * np.array(TONES[tone], np.float32)


def draw(scene: Scene) -> np.ndarray:
    """The image of `scene`: (128, 128, 3) uint8 RGB."""
    rgb = backdrop(scene.tone, scene.slope).copy()
    for thing in scene.things:
        half = thing.reach
        added, through = _painted(thing.shape, thing.colour, thing.size)
        window = rgb[thing.y - half : thing.y + half, thing.x - half : thing.x + half]
        window *= through
        window += added
    return np.rint(rgb).astype(np.uint8)


def crowded_scene(rng: np.random.Generator) -> Scene:
    """A scene of five things of any kind: more to learn from in one image than captioned scenes have."""
    sizes = [list(RADII)[i] for i in rng.integers(len(RADII), size=MOST)]
    picks = rng.integers(0, (len(SHAPES), len(COLOURS)), (MOST, 2)).tolist()
    centres = place_things(rng, sizes)
    things = [Thing(SHAPES[s], list(COLOURS)[c], size, x, y)
              for (s, c), size, (x, y) in zip(picks, sizes, centres, strict=True)]  # fmt: skip
    return Scene(list(TONES)[rng.integers(len(TONES))], tuple(things), int(rng.integers(len(SLOPES))))
