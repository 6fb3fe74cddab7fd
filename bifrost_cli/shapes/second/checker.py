"""Reading images of the second toy world back, and checking whether they show a prompt.

`read_scene` says what is where in RGB pixels of any size, `check` gives a verdict with its reason. No learned model:
the nearest background, what departs from it, the colour of most of its pixels up to shading, and the best sprite.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import permutations
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from bifrost_cli.shapes.second.captions import RELATIONS, Prompt, Spec, between, parse, phrase
from bifrost_cli.shapes.second.draw import backdrop, sprite
from bifrost_cli.shapes.second.scene import COLOURS, RADII, SHAPES, SIZE, SLOPES, TONES, reach

UNCLEAR = "unclear"  # shape or tone that is none of the world's
_TONE_REACH = 16.0  # RGB distance within which half of the background's pixels lie
_LEAST_BACKGROUND = 0.5  # share of the image
_DEPARTURE = 60.0  # RGB distance from the background from which a pixel belongs to something
_MISFIT = 75.0  # RGB distance a thing's inner pixels may have from its shaded colour
_LIGHT = (0.75, 1.25)  # how dark and how light shading makes a colour
_PURE = 0.75  # least share of a thing's inner pixels of its colour
_SPECK = 16  # px, smaller regions are noise
_FIT = 0.8  # least share of a sprite's energy that must be explained
_APART = 12.0  # px, least difference of centres for a relation
_ASIDE = 14.0  # px, most distance from the line between two things
_SHIFTS = range(-2, 3)  # px


class FoundShape(NamedTuple):
    """A region read as a thing; (x, y) is its centre in px of the 128x128 image, `score` 1 a perfect sprite."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    score: float


class Reading(NamedTuple):
    """What an image shows: its tone (or "unclear") and its things from top to bottom."""

    tone: str
    found: tuple[FoundShape, ...]


class Verdict(NamedTuple):
    """Whether an image shows a prompt, and in a few words why not."""

    right: bool
    why: str


_WINDOW = 2 * (reach("large") + max(_SHIFTS) + 1)  # px, side of the square a sprite is fitted in


@cache
def _bank() -> tuple[np.ndarray, np.ndarray, list[tuple[str, str, int, int]]]:
    """Sprites at all shifts (K, window pixels), their energies (K,), and what each is."""
    masks, labels = [], []
    for shape in SHAPES:
        for size in RADII:
            edge = _WINDOW // 2 - reach(size)
            padded = np.pad(sprite(shape, size), edge)
            for dy in _SHIFTS:
                for dx in _SHIFTS:
                    masks.append(np.roll(padded, (dy, dx), (0, 1)).ravel())
                    labels.append((shape, size, dx, dy))
    bank = np.stack(masks)
    return bank, (bank**2).sum(1), labels


@cache
def _backdrops() -> tuple[np.ndarray, list[str]]:
    kinds = [(tone, slope) for tone in TONES for slope in range(len(SLOPES))]
    return np.stack([backdrop(*kind) for kind in kinds]), [tone for tone, _ in kinds]


def _background(pixels: np.ndarray) -> tuple[str, np.ndarray | None]:
    """The tone of the nearest backdrop, and that backdrop as the image has it; unclear where none is near."""
    every, tones = _backdrops()
    away = np.linalg.norm(every - pixels, axis=-1).reshape(len(every), -1)
    best = int(np.quantile(away, _LEAST_BACKGROUND, axis=1).argmin())
    near = away[best] < np.quantile(away[best], _LEAST_BACKGROUND) + _TONE_REACH
    if np.quantile(away[best], _LEAST_BACKGROUND) > _TONE_REACH:
        return UNCLEAR, None
    off = np.median((pixels - every[best]).reshape(-1, 3)[near], axis=0)
    return tones[best], every[best] + off


def _colour(pixels_N3: np.ndarray) -> tuple[str, float]:
    """The colour that most of these pixels have up to shading, and their share."""
    base_K3 = np.array(list(COLOURS.values()), np.float32)
    light_NK = np.clip(pixels_N3 @ base_K3.T / (base_K3**2).sum(1), *_LIGHT)
    away_NK = np.linalg.norm(pixels_N3[:, None] - light_NK[..., None] * base_K3, axis=-1)
    votes = np.bincount(away_NK.argmin(1)[away_NK.min(1) < _MISFIT], minlength=len(base_K3))
    return list(COLOURS)[int(votes.argmax())], float(votes.max() / len(pixels_N3))


def _fit(cover: np.ndarray) -> tuple[str, str, float, float, float]:
    """Shape, size, centre (x, y) and score of the sprite nearest to a region's coverage (H, W)."""
    bank, energies, labels = _bank()
    row, col = (round(at) for at in ndimage.center_of_mass(cover))
    best = (np.inf, 0, row, col)
    half = _WINDOW // 2
    padded = np.pad(cover, _WINDOW)
    for down in (-3, 0, 3):  # a shape's centre is not that of its mass: a triangle's lies higher
        top, left = row + _WINDOW + down - half, col + _WINDOW - half
        window = padded[top : top + _WINDOW, left : left + _WINDOW].ravel()
        outside = (cover**2).sum() - (window**2).sum()  # a region larger than the window is no thing
        errors = (window**2).sum() - 2 * bank @ window + energies + outside
        index = int(np.argmin(errors / energies))
        error = float(errors[index] / energies[index])
        if error < best[0]:
            best = (error, index, row + down, col)
    error, index, row, col = best
    shape, size, dx, dy = labels[index]
    return shape, size, col + dx, row + dy, 1 - error


def read_scene(rgb: np.ndarray) -> Reading:
    """Read an image, (H, W, 3) uint8 of any size; regions that are no thing of the world come back as "unclear"."""
    rgb = np.asarray(rgb)
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"an image is (height, width, 3) uint8, not {rgb.shape} {rgb.dtype}")
    if rgb.shape[:2] != (SIZE, SIZE):
        rgb = np.asarray(Image.fromarray(rgb).resize((SIZE, SIZE), Image.Resampling.BOX))
    pixels = rgb.astype(np.float32)
    tone, background = _background(pixels)
    if background is None:
        return Reading(UNCLEAR, ())
    away = np.linalg.norm(pixels - background, axis=-1)
    labels, count = ndimage.label(away > _DEPARTURE)
    found = []
    for index in range(1, count + 1):
        region = labels == index
        if region.sum() < _SPECK:
            continue
        inner = ndimage.binary_erosion(region)
        inner = inner if inner.sum() >= _SPECK else region
        colour, pure = _colour(pixels[inner])
        near = ndimage.binary_dilation(region, iterations=2)
        # ---- coverage: how far each pixel lies on the way from the background to the thing's shaded colour
        base = np.array(COLOURS[colour], np.float32)
        light = np.clip(np.median(pixels[inner] @ base) / (base @ base), *_LIGHT)
        towards = light * base - background
        share = ((pixels - background) * towards).sum(-1) / (towards**2).sum(-1)
        shape, size, x, y, score = _fit(np.where(near, np.clip(share, 0, 1), 0))
        clear = score >= _FIT and pure >= _PURE
        found.append(FoundShape(*((shape, colour, size) if clear else (UNCLEAR,) * 3), x, y, score))
    return Reading(tone, tuple(sorted(found, key=lambda it: (it.y, it.x))))


def _fits(found: FoundShape, wanted: tuple[str, str | None, str | None]) -> bool:
    return all(want in (None, is_) for want, is_ in zip(wanted, (found.shape, found.colour, found.size), strict=True))


def _shows(things: tuple[FoundShape, ...], spec: Spec) -> bool:
    """Whether the things, in this order, are the wanted ones in the wanted relation."""
    if not all(_fits(found, wanted) for found, wanted in zip(things, spec.things, strict=True)):
        return False
    if spec.relation is None:
        return True
    centres = [(thing.x, thing.y) for thing in things]
    if spec.relation == "between":
        return between(*centres) <= _ASIDE
    right, down = RELATIONS[spec.relation]
    (x, y), (other_x, other_y) = centres
    return (x - other_x) * right + (y - other_y) * down >= _APART


def check(prompt: Prompt | str, rgb: np.ndarray) -> Verdict:
    """Whether an image shows exactly what the prompt says: things, counts, relation, named tone, nothing else."""
    spec = (parse(prompt) if isinstance(prompt, str) else prompt).spec
    reading = read_scene(rgb)
    names = [
        "an unclear thing" if it.shape == UNCLEAR else phrase(it.shape, it.colour, it.size) for it in reading.found
    ]
    counted = ", ".join(f"{name} x{n}" if n > 1 else name for name, n in sorted(Counter(names).items()))
    seen = f"the picture shows {counted or 'nothing'}"
    if reading.tone == UNCLEAR:
        return Verdict(False, "the background is none of the world's tones")
    if spec.tone not in (None, reading.tone):
        return Verdict(False, f"the background is {reading.tone}, not {spec.tone}")
    if len(reading.found) != len(spec.things):
        return Verdict(False, f"{len(spec.things)} wanted; {seen}")
    if any(_shows(order, spec) for order in permutations(reading.found)):
        return Verdict(True, "shows what was asked")
    if spec.relation and any(_shows(order, spec._replace(relation=None)) for order in permutations(reading.found)):
        return Verdict(False, f"{seen}, but the first does not stand as named ({spec.relation})")
    return Verdict(False, seen)
