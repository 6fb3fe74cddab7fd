"""One image from untrusted bytes: RGB, upright, opaque, 8 bit, or a reason why not.

In: a file or its bytes, and the recipe's rules (`images`: max_pixels, min_side, background, animated). Out: `DecodedImage`,
whose notes tell what had to be done to it, or `BadImage`. Does not know captions, folders or models. Formats are
decided by content, from a short list; the pixel count is checked before anything is decoded.
"""

from __future__ import annotations

import io
import stat
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from bifrost_cli.config.schema import Images
from bifrost_cli.data.image_modes import to_rgb
from bifrost_cli.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_ASPECT = 20
FILE_BYTES = 1 << 29  # of one image: more than the largest that is decoded has without compression
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_REFUSED = {
    b"%!PS": "EPS",
    b"%PDF": "PDF",
    b"<svg": "SVG",
    b"<?xml": "SVG",
    b"\0\0\1\0": "ICO",
    b"8BPS": "PSD",
    b"\xc5\xd0\xd3\xc6": "EPS",
}

# Pillow's own limit only warns at first; ours (images.max_pixels) refuses, and is checked before decoding.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", message="Corrupt EXIF data", category=UserWarning)


class BadImage(DataError):
    """An image that cannot be used; `message` is the reason."""

    code = "BF-DATA-003"


class Animated(BadImage):
    """Several frames, and the recipe says `animated: skip`."""


@dataclass(frozen=True)
class DecodedImage:
    """`rgb` (H, W, 3) uint8; `notes` name what was repaired or converted, one word each."""

    rgb: np.ndarray
    notes: tuple[str, ...] = ()


def read_image(source: bytes | Path | str, rules: Images) -> DecodedImage:
    """Read one image: EXIF orientation applied, colours in sRGB, transparency over `rules.background`, first frame.

    BadImage says why not: empty, not an image, truncated, damaged, more than `max_pixels`, a side below `min_side`,
    longer than 20 to 1, 32 bits a channel. Any exception of the decoder counts as damage.
    """
    data = source if isinstance(source, bytes) else read_regular(Path(source))
    if not data:
        raise BadImage("empty file")
    try:
        return _decode_open_jpeg(data, rules) if _is_open_jpeg(data) else _decode(data, rules)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(_not_an_image(data)) from None
    except Image.DecompressionBombError as error:
        raise BadImage(str(error)) from error
    except Exception as error:  # decoders raise anything: SyntaxError, struct.error, ValueError, EOFError, MemoryError
        raise BadImage(f"truncated or damaged: {error or type(error).__name__}") from error


def read_regular(path: Path, limit: int = FILE_BYTES) -> bytes:
    """The bytes of a regular file; BadImage for a device, a pipe, a folder, a dangling link, an unreadable file, or one
    of more than `limit` bytes."""
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise BadImage("not a regular file")
        if facts.st_size > limit:
            raise BadImage(f"{facts.st_size} bytes, more than {limit}")
        return path.read_bytes()
    except FileNotFoundError:
        raise BadImage("dangling link" if path.is_symlink() else "file not found") from None
    except PermissionError:
        raise BadImage(f"not readable by this user ({_owner(path)})") from None
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from None


def square(rgb: np.ndarray, size: int) -> np.ndarray:
    """Resize the short side to `size` (bicubic, antialiased), then cut the centre: (size, size, 3) uint8."""
    height, width = rgb.shape[:2]
    if (height, width) == (size, size):
        return rgb
    scale = size / min(height, width)
    wide, high = max(size, round(width * scale)), max(size, round(height * scale))
    image = Image.fromarray(rgb).resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - size) // 2, (high - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _decode(data: bytes, rules: Images) -> DecodedImage:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_size(image.size, rules)
        if image.mode in ("I", "F"):  # Pillow would clip the one and blacken the other
            raise BadImage("32-bit image, export as 8-bit")
        ends = image.format != "PNG" or _png_ends(data)
        notes = _frames(image, rules) if ends else [*_frames(image, rules), "minor-damage"]
        image.load()
        return _upright(image, data, rules, notes)


def _is_open_jpeg(data: bytes) -> bool:
    """A JPEG with no end-of-image marker after its last scan. In scan data 0xff is never followed by 0xd9."""
    return data.startswith(b"\xff\xd8\xff") and b"\xff\xd9" not in data[max(0, data.rfind(b"\xff\xda")) :]


def _decode_open_jpeg(data: bytes, rules: Images) -> DecodedImage:
    """Only the end marker is missing when bytes put before a new one change nothing; else image data is too."""
    scan = data.rstrip(b"\xff")
    image, *others = (_decode(scan + filler + b"\xff\xd9", rules) for filler in (b"", b"\xaa" * 128, b"\xfe" * 128))
    if not all(np.array_equal(image.rgb, other.rgb) for other in others):
        raise BadImage("truncated")
    return DecodedImage(image.rgb, ("minor-damage", *image.notes))


def _upright(image: Image.Image, data: bytes, rules: Images, notes: list[str]) -> DecodedImage:
    turn, turn_notes = _turn(image)
    rgb, mode_notes = to_rgb(image, rules.background)
    if image.format == "PNG" and data[24] == 16 and "16-bit" not in mode_notes:
        mode_notes = (*mode_notes, "16-bit")
    upright = rgb if turn is None else rgb.transpose(turn)
    return DecodedImage(np.array(upright), (*notes, *turn_notes, *mode_notes))


def _check_size(size: tuple[int, int], rules: Images) -> None:
    width, height = size
    if width * height > rules.max_pixels:
        raise BadImage(f"{width}x{height} pixels, more than max_pixels {rules.max_pixels}")
    if min(size) < rules.min_side:
        raise BadImage(f"{width}x{height} pixels, a side is below min_side {rules.min_side}")
    if max(size) > MAX_ASPECT * min(size):
        raise BadImage(f"{width}x{height} pixels, longer than {MAX_ASPECT} to 1")


def _frames(image: Image.Image, rules: Images) -> list[str]:
    """MPO is what many phones write: one photograph and its preview, not an animation."""
    if image.format == "MPO" or not getattr(image, "is_animated", False):
        return []
    if rules.animated == "skip":
        raise Animated("several frames (images.animated is skip)")
    return ["first-frame"]


def _png_ends(data: bytes) -> bool:
    """Whether the closing chunk is there. BadImage: a chunk with a wrong checksum, which Pillow does not check."""
    view, at = memoryview(data), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(view[at : at + 4], "big")
        name = bytes(view[at + 4 : at + 8])
        if end + 4 <= len(data) and zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise BadImage(f"the checksum of PNG chunk {name.decode('latin-1')!r} is wrong")
        if name == b"IEND":
            return True
        at = end + 4
    return False


def _turn(image: Image.Image) -> tuple[Image.Transpose | None, list[str]]:
    """How to turn the image upright. Read after decoding: Pillow turns TIFF itself and then drops the tag."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # EXIF is metadata: garbage in it does not spoil the image
        return None, ["exif-ignored"]
    if orientation in _UPRIGHT:
        return _UPRIGHT[orientation], ["exif-rotated"]
    return None, [] if orientation in (0, 1) else ["exif-ignored"]


def _not_an_image(data: bytes) -> str:
    head = data[:256].lstrip()
    for magic, name in _REFUSED.items():
        if head.startswith(magic):
            return f"{name} is not read; export it as png, jpg or webp"
    if data[4:8] == b"ftyp":
        return f"{data[8:12].decode('latin-1').upper()} is not read; export it as png, jpg or webp"
    return f"not an image (starts with {_shown(head[:9])})"


def _shown(head: bytes) -> str:
    text = head.decode("latin-1")
    return repr(text) if text.isprintable() and text.isascii() else head.hex(" ")


def _owner(path: Path) -> str:
    try:
        found = path.stat()
        return f"mode {stat.filemode(found.st_mode)}, owner {found.st_uid}"
    except OSError:
        return "its folder cannot be entered"
