"""Any Pillow mode to opaque 8-bit sRGB.

In: a decoded Pillow image and a background colour. Out: an RGB image and notes on what was converted. Each mode has one
rule; 16-bit grey, which Pillow's own `convert` would clip, is scaled. Knows no files.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms


def to_rgb(image: Image.Image, background: str) -> tuple[Image.Image, tuple[str, ...]]:
    """`image` (8 or 16 bits a channel) as mode RGB in sRGB, transparency over `background`, and the notes."""
    notes: list[str] = []
    icc, mode = image.info.get("icc_profile"), image.mode
    if mode.startswith("I;16"):
        image = _eight_bits(image)
        notes.append("16-bit")
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    base = image if image.mode in ("CMYK", "L") else image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")
    if mode == "CMYK":
        notes.append("cmyk")
    rgb, colour_notes = _to_srgb(base, icc)
    notes += colour_notes
    if alpha is not None and alpha.getextrema()[0] < 255:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, background), alpha)
        notes.append("alpha")
    return rgb, tuple(notes)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey by 257, rounded; Pillow's own conversion cuts everything above 255 to white."""
    grey = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8))


def _to_srgb(base: Image.Image, icc: bytes | None) -> tuple[Image.Image, list[str]]:
    if not icc:
        return base.convert("RGB"), []
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        if ImageCms.getProfileDescription(profile).strip().startswith("sRGB"):
            return base.convert("RGB"), []
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(base, profile, srgb, outputMode="RGB"), ["icc-converted"]
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return base.convert("RGB"), ["icc-ignored"]
