"""Reading images of the toy world back, and checking whether they show a prompt.

`read_scene` says what is where in RGB pixels of any size, `check` gives a verdict with its reason. No learned model:
coloured regions, the colour of most of their pixels, and the shape whose sprite fits best.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import permutations
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from bifrost_cli.shapes.captions import Prompt, Spec, parse, phrase
from bifrost_cli.shapes.draw import sprite
from bifrost_cli.shapes.scene import COLOURS, SHAPES, SIZE, TONES

UNCLEAR = "unclear"  # shape or tone that is none of the world's
_TONE_REACH = 20.0  # RGB distance within which a background counts as a tone
_LEAST_BACKGROUND = 0.25  # share of the image
_SOLID = 0.6  # share of a colour over the background from which a pixel belongs to a thing
_DEPARTURE = 60.0  # RGB distance from the background from which a pixel must belong to something
_MISFIT = 60.0  # RGB distance a thing's pixel may have from the mix of background and its colour
_SPECK = 12  # px, smaller regions are noise
_FIT = 0.8  # least share of a sprite's energy that must be explained
_APART = 8.0  # px, least difference of centres for a relation
_WINDOW = 20  # px, side of the square a sprite is fitted in
_SHIFTS = np.arange(-3.0, 3.5, 0.5)  # px


class FoundShape(NamedTuple):
    """A region read as a thing; (x, y) is its centre in px of the 64x64 image, `score` 1 a perfect sprite."""

    shape: str
    colour: str
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


@cache
def _bank() -> tuple[np.ndarray, np.ndarray, list[tuple[str, float, float]]]:
    """Sprites at all half-pixel shifts (K, window pixels), their energies (K,), and what each is."""
    labels = [(shape, float(dx), float(dy)) for shape in SHAPES for dy in _SHIFTS for dx in _SHIFTS]
    masks = np.stack([sprite(*label, _WINDOW).ravel() for label in labels])
    return masks, (masks**2).sum(1), labels


def _background(pixels: np.ndarray) -> tuple[str, np.ndarray | None]:
    """The tone most light pixels are nearest to and their median (that of all would lean to crowded things)."""
    tones = np.array(list(TONES.values()), np.float32)
    away = np.linalg.norm(pixels[:, :, None] - tones, axis=-1)
    nearest = np.where(away.min(-1) < 2 * _TONE_REACH, away.argmin(-1), -1)
    counts = [int((nearest == index).sum()) for index in range(len(TONES))]
    index = int(np.argmax(counts))
    if counts[index] < _LEAST_BACKGROUND * SIZE**2:
        return UNCLEAR, None
    background = np.median(pixels[nearest == index], axis=0)
    off = np.linalg.norm(background - tones[index])
    return (list(TONES)[index] if off < _TONE_REACH else UNCLEAR), background


def _shares(rgb: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each colour and pixel: its least-squares share over the background, 0 to 1, and what is left; (6, H, W)."""
    towards = np.array(list(COLOURS.values()), np.float32) - background
    away = rgb - background
    lengths = (towards**2).sum(1)[:, None, None]
    along = np.moveaxis(away @ towards.T, -1, 0)
    share = np.clip(along / lengths, 0, 1)
    rest = np.sqrt(np.maximum((away**2).sum(-1) - 2 * share * along + share**2 * lengths, 0))
    return share, rest


def _fit(share: np.ndarray, region: np.ndarray) -> tuple[str, float, float, float]:
    """Shape, centre (x, y) and score of the sprite nearest to the region's shares."""
    masks, energies, labels = _bank()
    row, col = (int(round(at)) for at in ndimage.center_of_mass(region))
    half = _WINDOW // 2
    near = ndimage.binary_dilation(region, iterations=2)
    window = np.pad(np.where(near, share, 0), half)[row : row + _WINDOW, col : col + _WINDOW].ravel()
    errors = (window**2).sum() - 2 * masks @ window + energies
    best = int(np.argmin(errors))
    shape, dx, dy = labels[best]
    outside = (share[near] ** 2).sum() - (window**2).sum()  # a region larger than the window is no thing
    return shape, col + dx, row + dy, float(1 - (errors[best] + outside) / energies[best])


def _regions(mask: np.ndarray) -> list[np.ndarray]:
    labels, count = ndimage.label(mask)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    return [labels == i for i in range(1, count + 1) if sizes[i] >= _SPECK]


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
    share, rest = _shares(pixels, background)
    nearest = rest.argmin(0)
    found, explained = [], np.zeros((SIZE, SIZE), bool)
    for index, colour in enumerate(COLOURS):
        for region in _regions((nearest == index) & (share[index] > _SOLID) & (rest[index] < _MISFIT)):
            shape, x, y, score = _fit(share[index], region)
            found.append(FoundShape(shape if score >= _FIT else UNCLEAR, colour, x, y, score))
            explained |= ndimage.binary_dilation(region, iterations=2)
    for region in _regions((np.linalg.norm(pixels - background, axis=-1) > _DEPARTURE) & ~explained):
        row, col = ndimage.center_of_mass(region)
        found.append(FoundShape(UNCLEAR, UNCLEAR, float(col), float(row), 0.0))
    return Reading(tone, tuple(sorted(found, key=lambda it: (it.y, it.x))))


def _shows(things: tuple[FoundShape, ...], spec: Spec) -> bool:
    """Whether the things, in this order, are the wanted ones in the wanted relation."""
    if any(f.shape != w.shape or w.colour not in (None, f.colour) for f, w in zip(things, spec.things, strict=True)):
        return False
    if spec.relation is None:
        return True
    right, down = things[1].x - things[0].x, things[1].y - things[0].y
    return {"above": down, "below": -down, "left": right, "right": -right}[spec.relation] >= _APART


def check(prompt: Prompt | str, rgb: np.ndarray) -> Verdict:
    """Whether an image shows exactly what the prompt says: things, counts, relation, named tone, nothing else."""
    spec = (parse(prompt) if isinstance(prompt, str) else prompt).spec
    reading = read_scene(rgb)
    names = ["an unclear thing" if it.shape == UNCLEAR else phrase(it.shape, it.colour) for it in reading.found]
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
        return Verdict(False, f"{seen}, but the first is not on the side named ({spec.relation})")
    return Verdict(False, seen)
