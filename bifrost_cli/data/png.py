"""Images as bytes that say what they are, the same for the same input (no time, no host), and contact sheets."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bifrost_cli import __version__
from bifrost_cli.data.xmp import GENERATED, xmp_packet
from bifrost_cli.errors import ArtifactError, UsageError

GUTTER, PAPER = 4, 255
XMP_CHUNK = "XML:com.adobe.xmp"  # the keyword of a PNG's iTXt chunk that holds XMP
WRITTEN = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # by the name's ending
_QUALITY: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95, "subsampling": "4:4:4"}, "WEBP": {"lossless": True}}


def png_bytes(pixels_HWC: np.ndarray, text: Mapping[str, str] | None = None) -> bytes:
    """A PNG of one uint8 (H, W, 3) image; `text` becomes iTXt chunks (UTF-8), in the given order."""
    chunks = PngInfo()
    for keyword, value in (text or {}).items():
        chunks.add_itxt(keyword, value)
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels_HWC)).save(stream, "PNG", pnginfo=chunks)
    return stream.getvalue()


def image_bytes(
    pixels_HWC: np.ndarray, text: Mapping[str, str], *, source_type: str = GENERATED, suffix: str = ".png"
) -> bytes:
    """One generated image as a file, marked as such.

    Args:
        pixels_HWC: uint8 (H, W, 3).
        text: what made it, by name. A PNG keeps it in chunks of their own, the others in
            their XMP.
        source_type: `GENERATED` or `EDITED`, IPTC's DigitalSourceType, in the XMP of each format.
        suffix: one of `WRITTEN`: `.jpg` has quality 95 and whole colours (4:4:4), `.webp` is lossless.

    Returns:
        The bytes.

    Raises:
        UsageError: `text` does not fit into a JPEG, which holds 64 kB.
    """
    kind, tool = WRITTEN[suffix], f"bifrost {__version__}"
    if kind == "PNG":
        return png_bytes(pixels_HWC, {**text, XMP_CHUNK: xmp_packet(source_type, tool)})
    stream, packet = io.BytesIO(), xmp_packet(source_type, tool, text).encode()
    try:
        Image.fromarray(np.ascontiguousarray(pixels_HWC)).save(stream, kind, xmp=packet, **_QUALITY[kind])
    except ValueError as error:
        if "XMP" not in str(error):
            raise
        raise UsageError("the prompt and what else made the image do not fit into a JPEG", at=f"{len(packet)} bytes",
                         fix="write a .png or a .webp") from error  # fmt: skip
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
