"""Images as PNG bytes with text in them, the same for the same input (no time, no host), and contact sheets."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bifrost_cli.errors import ArtifactError

GUTTER, PAPER = 4, 255


def png_bytes(pixels_HWC: np.ndarray, text: Mapping[str, str] | None = None) -> bytes:
    """A PNG of one uint8 (H, W, 3) image; `text` becomes iTXt chunks (UTF-8), in the given order."""
    chunks = PngInfo()
    for keyword, value in (text or {}).items():
        chunks.add_itxt(keyword, value)
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels_HWC)).save(stream, "PNG", pnginfo=chunks)
    return stream.getvalue()


def png_text(data: bytes) -> dict[str, str]:
    """The text chunks of a PNG, by keyword."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.load()
        return {str(keyword): str(value) for keyword, value in getattr(image, "text", {}).items()}


def png_pixels(data: bytes) -> np.ndarray:
    """The image of a PNG that `png_bytes` made, uint8 (H, W, 3). ArtifactError: it is none."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ArtifactError(f"a sheet of images is no PNG: {error}", code="BF-ART-005") from error


def contact_sheet(images: Sequence[np.ndarray]) -> np.ndarray:
    """Equal-sized uint8 images (H, W, 3), row by row on a nearly square sheet with white gutters."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width = images[0].shape[:2]
    sheet = np.full((rows * (height + GUTTER) + GUTTER, columns * (width + GUTTER) + GUTTER, 3), PAPER, np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = GUTTER + row * (height + GUTTER), GUTTER + column * (width + GUTTER)
        sheet[top : top + height, left : left + width] = image
    return sheet
