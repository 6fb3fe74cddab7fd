"""What of an image is to be predicted again: masks, boxes and places in words, grown to whole patches.

Legend: H W pixels of an image, S side of the encoder's square, P patches.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

from bifrost_cli.data.images import square
from bifrost_cli.errors import UsageError

# As Qwen2.5-VL is asked, and as the built-in MLLM was.
BOX_QUESTION = "Locate {region} in this image and output its bbox coordinates in JSON format."
BUILTIN_QUESTION = "where is {region}?"
_SEAM = 0.25  # of a patch: the blur of the edge between kept and new pixels
_BOX = re.compile(r"\[\s*(-?\d+(?:\.\d+)?(?:\s*,\s*-?\d+(?:\.\d+)?){3})\s*\]")
_SIDES = {"top": (1, 0), "bottom": (1, 1), "left": (0, 0), "right": (0, 1)}  # axis (x, y), half


def mask_of_boxes(boxes: Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    """Boxes (x, y, width, height) in px as a mask (H, W) bool. UsageError: one that lies outside, or is empty."""
    mask = np.zeros((height, width), bool)
    for x, y, wide, high in boxes:
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + wide, width), min(y + high, height)
        if not (right > left and bottom > top):
            raise UsageError(
                f"the box {x:g},{y:g},{wide:g},{high:g} holds nothing of the image",
                at=f"the image is {width}x{height} px",
                fix="--box X,Y,WIDTH,HEIGHT in px from the top left corner",
            )
        mask[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = True
    return mask


def mask_of_image(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask image, uint8 (H, W, 3), white where the image is to change: (H, W) bool. UsageError: another size."""
    if mask.shape[:2] != (height, width):
        sizes = f"the mask is {mask.shape[1]}x{mask.shape[0]} px, the image {width}x{height}"
        raise UsageError("the mask has another size than the image", at=sizes, fix="give a mask of the image's size")
    return mask.mean(axis=-1) >= 128


def masked_patches(mask_HW: np.ndarray, side: int, grid: tuple[int, int]) -> np.ndarray:
    """The patches (P,) bool, row by row, of which the mask covers any pixel, after the image's own cut to a square of
    `side` px. UsageError: none, or all of them."""
    rows, columns = grid
    white = square(np.repeat(mask_HW[..., None].astype(np.uint8) * 255, 3, axis=-1), side)[..., 0] >= 128
    patches = white.reshape(rows, side // rows, columns, side // columns).any(axis=(1, 3)).ravel()
    if not patches.any():
        raise UsageError("the mask is empty within the centre square that is read", fix="mark what is to change")
    if patches.all():
        raise UsageError("the mask covers the whole image, so that nothing of it would stay",
                         fix='mark less, or make a new one: bifrost generate "PROMPT"')  # fmt: skip
    return patches


def region_boxes(answer: str, height: int, width: int) -> list[tuple[float, float, float, float]]:
    """Boxes (x, y, width, height) of an MLLM's answer about a place; [] where it names none.

    Read are corners in px, [x1, y1, x2, y2], as Qwen2.5-VL writes them in JSON, or else words: "top left" is that
    quarter, "left" the middle of that half, "middle" the middle of the image.
    """
    if found := _BOX.findall(answer):
        corners = [[float(number) for number in json.loads(f"[{numbers}]")] for numbers in found]
        return [(x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in corners if x2 > x1 and y2 > y1]
    words = set(re.findall(r"[a-z]+", answer.lower()))
    if not words & {*_SIDES, "middle", "center", "centre"}:
        return []
    span = [[0.25, 0.75], [0.25, 0.75]]
    for word in words & _SIDES.keys():
        axis, half = _SIDES[word]
        span[axis] = [0.5 * half, 0.5 * half + 0.5]
    (left, right), (top, bottom) = span
    return [(left * width, top * height, (right - left) * width, (bottom - top) * height)]


def keep_pixels(original: np.ndarray, made: np.ndarray, patches: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """`made` where patches were predicted again, else the original's pixels, with a soft seam: uint8 (H, W, 3)."""
    side = made.shape[0]
    coarse = Image.fromarray(patches.reshape(grid).astype(np.uint8) * 255)
    weight = coarse.resize((side, side), Image.Resampling.NEAREST)
    blurred = np.asarray(weight.filter(ImageFilter.GaussianBlur(_SEAM * side / grid[0])), np.float32)[..., None] / 255
    soft = np.minimum(2 * blurred, 1)  # the seam lies outside: what is new is whole
    return np.rint(soft * made + (1 - soft) * square(original, side)).astype(np.uint8)


def shown(rgb: np.ndarray, patches: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The image, uint8 (S, S, 3), in which what stays is pale: what `--show-mask` writes."""
    side = rgb.shape[0]
    changes = patches.reshape(grid).repeat(side // grid[0], 0).repeat(side // grid[1], 1)[..., None]
    return np.where(changes, rgb, (0.3 * rgb + 0.7 * 255).astype(np.uint8))
