"""Drawing a scene: the same scene gives the same bytes everywhere.

A shape is rasterised once with 16x16 samples a pixel. Things of neighbouring cells never share a pixel (a sprite
is 14 px wide, cells are 16 px apart, the jitter is 1 px), so ready-made patches are copied in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from bifrost_cli.shapes.scene import CELL, COLOURS, GRID, JITTER, SHAPES, SIZE, TONES, Scene, Thing

RADIUS = 6.2  # px
SPRITE = CELL - 2 * JITTER  # px, side of a sprite
_SAMPLES = 16  # samples a pixel and axis


def _polygon(x: np.ndarray, y: np.ndarray, corners: list[tuple[float, float]]) -> np.ndarray:
    """True where (x, y) lies inside, by the even-odd rule."""
    inside = np.zeros(np.broadcast(x, y).shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 != y1:
            crosses = (y0 > y) != (y1 > y)
            inside ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside


_TRIANGLE = [(0.0, -RADIUS), (6.7, 5.6), (-6.7, 5.6)]
_STAR = [(radius * np.sin(angle), -radius * np.cos(angle))  # clockwise from straight up
         for radius, angle in zip((6.9, 2.9) * 5, np.radians(36.0 * np.arange(10)), strict=True)]  # fmt: skip
_INSIDE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: x * x + y * y < RADIUS**2,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 5.5,
    "triangle": lambda x, y: _polygon(x, y, _TRIANGLE),
    "cross": lambda x, y: (np.maximum(abs(x), abs(y)) < RADIUS) & (np.minimum(abs(x), abs(y)) < 2.0),
    "star": lambda x, y: _polygon(x, y, _STAR),
}


@cache
def sprite(shape: str, dx: float = 0.0, dy: float = 0.0, size: int = SPRITE) -> np.ndarray:
    """Coverage (size, size) float32 in 0 to 1 of `shape`, centred (dx, dy) px right and down of the middle."""
    at = (np.arange(size * _SAMPLES) + 0.5) / _SAMPLES - size / 2
    inside = _INSIDE[shape](at[None, :] - dx, at[:, None] - dy)
    mask = inside.reshape(size, _SAMPLES, size, _SAMPLES).mean((1, 3), dtype=np.float32)
    mask.setflags(write=False)
    return mask


@cache
def _patch(shape: str, colour: str, tone: str) -> np.ndarray:
    cover = sprite(shape)[..., None]
    blend = cover * np.array(COLOURS[colour], np.float32) + (1 - cover) * np.array(TONES[tone], np.float32)
    return np.rint(blend).astype(np.uint8)


def draw(scene: Scene) -> np.ndarray:
    """The image of `scene`: (64, 64, 3) uint8 RGB."""
    rgb = np.full((SIZE, SIZE, 3), TONES[scene.tone], np.uint8)
    for thing in scene.things:
        x, y = (at - SPRITE // 2 for at in thing.centre)
        rgb[y : y + SPRITE, x : x + SPRITE] = _patch(thing.shape, thing.colour, scene.tone)
    return rgb


def crowded_scene(rng: np.random.Generator) -> Scene:
    """A scene of 1 to 16 things, any mix: more to learn from in one image than captioned scenes have."""
    shapes, colours, tones = list(SHAPES), list(COLOURS), list(TONES)
    cells = rng.permutation(GRID * GRID)[: rng.integers(1, GRID * GRID + 1)].tolist()
    picks = rng.integers(0, (len(shapes), len(colours), 2 * JITTER + 1, 2 * JITTER + 1), (len(cells), 4)).tolist()
    things = [Thing(shapes[s], colours[c], cell // GRID, cell % GRID, dx - JITTER, dy - JITTER)
              for cell, (s, c, dx, dy) in zip(cells, picks, strict=True)]  # fmt: skip
    return Scene(tones[rng.integers(len(tones))], tuple(things))
