"""One image from untrusted bytes: RGB, upright, opaque, 8 bit, or a reason why not. Formats are decided by content,
from a short list; the pixel count is checked before anything is decoded. Each mode of Pillow has one rule of how it
becomes 8-bit sRGB."""

from __future__ import annotations

import io
import stat
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.Image import Transpose

from bifrost_cli.config.schema import Images
from bifrost_cli.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_ASPECT = 20
FILE_BYTES = 1 << 29  # of one image: more than the largest that is decoded has without compression
_ORIENTATION = 0x0112
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT, _WHITE_IS_ZERO = 258, 262, 339, 0
_SAMPLES = {2: "signed", 3: "floating-point", 4: "undefined", 5: "complex", 6: "complex"}  # 1 is unsigned
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}  # fmt: skip
LFS_POINTER = b"version https://git-lfs"  # what a clone without git-lfs has in the place of a file
_REFUSED = {
    b"%!PS": "EPS", b"%PDF": "PDF", b"<svg": "SVG", b"<?xml": "SVG", b"\0\0\1\0": "ICO", b"8BPS": "PSD",
    b"\xc5\xd0\xd3\xc6": "EPS",
}  # fmt: skip

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
    """`rgb` (H, W, 3) uint8; `notes` name what was repaired or converted, one word each; `lossy`: its file is of a
    lossy compression."""

    rgb: np.ndarray
    notes: tuple[str, ...] = ()
    lossy: bool = False


def read_image(source: bytes | Path | str, rules: Images) -> DecodedImage:
    """Read one image, a file or its bytes: EXIF orientation applied, colours in sRGB, transparency over
    `rules.background`, first frame. BadImage with the reason, and the file's name where there is one: empty, not an
    image, truncated, damaged, more than `max_pixels`, a side below `min_side`, longer than 20 to 1, samples that are
    not unsigned or of 32 bits. Any exception of the decoder counts as damage."""
    if not isinstance(source, bytes):
        try:
            return read_image(read_regular(Path(source)), rules)
        except BadImage as error:
            error.at = str(source)
            raise
    if not source:
        raise BadImage("empty file")
    try:
        return _decode_open_jpeg(source, rules) if _is_open_jpeg(source) else _decode(source, rules)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(_not_an_image(source)) from None
    except Image.DecompressionBombError as error:
        raise BadImage(str(error)) from error
    except Exception as error:  # decoders raise anything: SyntaxError, struct.error, ValueError, EOFError, MemoryError
        raise BadImage(f"truncated or damaged: {error or type(error).__name__}") from error


def read_regular(path: Path, limit: int = FILE_BYTES) -> bytes:
    """The bytes of a regular file; BadImage for a device, a pipe, a folder, a dangling link, an unreadable file, or one
    of more than `limit` bytes."""
    owner = "its folder cannot be entered"
    try:
        facts = path.stat()
        owner = f"mode {stat.filemode(facts.st_mode)}, owner {facts.st_uid}"
        if not stat.S_ISREG(facts.st_mode):
            raise BadImage("not a regular file")
        if facts.st_size > limit:
            raise BadImage(f"{facts.st_size} bytes, more than {limit}")
        return path.read_bytes()
    except FileNotFoundError:
        raise BadImage("dangling link" if path.is_symlink() else "file not found") from None
    except PermissionError:
        raise BadImage(f"not readable by this user ({owner})") from None
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from None


def _not_an_image(data: bytes) -> str:
    head = data[:256].lstrip()
    if head.startswith(LFS_POINTER):
        return "a git-lfs pointer in the place of the image (git lfs pull fetches it)"
    kind = next((name for magic, name in _REFUSED.items() if head.startswith(magic)), None)
    if data[4:8] == b"ftyp":
        kind = kind or data[8:12].decode("latin-1").upper()
    if kind:
        return f"{kind} is not read; export it as png, jpg or webp"
    text = head[:9].decode("latin-1")
    return f"not an image (starts with {repr(text) if text.isprintable() and text.isascii() else head[:9].hex(' ')})"


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
        width, height = image.size
        if width * height > rules.max_pixels:
            raise BadImage(f"{width}x{height} pixels, more than max_pixels {rules.max_pixels}")
        if min(width, height) < rules.min_side:
            raise BadImage(f"{width}x{height} pixels, a side is below min_side {rules.min_side}")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise BadImage(f"{width}x{height} pixels, longer than {MAX_ASPECT} to 1")
        kind = _tiff_tag(image, _TIFF_SAMPLE_FORMAT) or 1  # Pillow reads them all as if they were unsigned integers
        if image.format == "TIFF" and kind in _SAMPLES and image.mode not in ("I", "F"):
            raise BadImage(f"TIFF with {_SAMPLES[kind]} samples; export it with unsigned integers of 8 or 16 bits")
        if image.format == "WEBP" and _webp_ends_in_zeros(data):
            raise BadImage("truncated: the end of its image data is zeros")
        if image.mode in ("I", "F"):  # Pillow would clip the one and blacken the other
            raise BadImage("32-bit image, export as 8-bit")
        damaged = image.format == "PNG" and not _png_ends(data)
        notes = []
        # MPO is what many phones write: one photograph and its preview, not an animation.
        if image.format != "MPO" and getattr(image, "is_animated", False):
            if rules.animated == "skip":
                raise Animated("several frames (images.animated is skip)")
            notes.append("first-frame")
        notes += ["minor-damage"] * damaged
        image.load()
        try:  # after decoding: Pillow turns TIFF itself and then drops the tag
            orientation = image.getexif().get(_ORIENTATION, 1)
        except Exception:  # EXIF is metadata: garbage in it does not spoil the image
            orientation = None
        if orientation not in (0, 1):
            notes.append("exif-rotated" if orientation in _UPRIGHT else "exif-ignored")
        rgb, mode_notes = _to_rgb(image, rules.background)
        if image.format == "PNG" and data[24] == 16 and "16-bit" not in mode_notes:
            mode_notes.append("16-bit")
        upright = rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb
        lossy = image.format in ("JPEG", "MPO") or image.info.get("compression") == "jpeg"  # the latter in TIFF
        lossy = lossy or (image.format == "WEBP" and b"VP8L" not in data)
        return DecodedImage(np.array(upright), (*notes, *mode_notes), lossy)


def _tiff_tag(image: Image.Image, tag: int) -> int | None:
    value = getattr(image, "tag_v2", {}).get(tag)
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int) else None


def _is_open_jpeg(data: bytes) -> bool:
    """A JPEG that ends before its end-of-image marker. What follows that marker, as the film of a motion photo, is not
    looked at."""
    if not data.startswith(b"\xff\xd8\xff"):
        return False
    at = 2
    while 0 <= (at := data.find(b"\xff", at)) < len(data) - 1:
        marker = data[at + 1]
        if marker == 0xD9:
            return False
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD7:  # in scan data
            at += 1 if marker == 0xFF else 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return True


def _decode_open_jpeg(data: bytes, rules: Images) -> DecodedImage:
    """Only the end marker is missing when bytes put before a new one change nothing; else image data is too. Zeros at
    the end are none: a download into a file that had its full size from the start leaves them."""
    scan = data.rstrip(b"\xff\0")
    image, *others = (_decode(scan + filler + b"\xff\xd9", rules) for filler in (b"", b"\xaa" * 128, b"\xfe" * 128))
    if not all(np.array_equal(image.rgb, other.rgb) for other in others):
        raise BadImage("truncated")
    return DecodedImage(image.rgb, ("minor-damage", *image.notes), True)


def _webp_ends_in_zeros(data: bytes) -> bool:
    """Whether the last 64 bytes of a still image's data are zeros, which compressed data never are."""
    at = 12
    while at + 8 <= len(data):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if name in (b"VP8 ", b"VP8L"):
            return size >= 64 and not data[at + 8 : at + 8 + size][-64:].strip(b"\0")
        at += 8 + size + size % 2
    return False


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


def _to_rgb(image: Image.Image, background: str) -> tuple[Image.Image, list[str]]:
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
    rgb, colour_notes = _to_srgb(base, icc) if icc else (base.convert("RGB"), [])
    notes += colour_notes
    if alpha is not None and np.asarray(alpha).min() < 255:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, background), alpha)
        notes.append("alpha")
    return rgb, notes


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit (in TIFF also 12-bit) grey scaled and rounded; Pillow's own conversion cuts all above 255 to white."""
    grey, top = np.asarray(image).astype(np.uint32), 4095 if _tiff_tag(image, _TIFF_BITS) == 12 else 65535
    if _tiff_tag(image, _TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts 8 bits and leaves 16 as they are
        grey = top - np.minimum(grey, top)
    return Image.fromarray(((grey * 255 + top // 2) // top).astype(np.uint8))


def _to_srgb(base: Image.Image, icc: bytes) -> tuple[Image.Image, list[str]]:
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        if ImageCms.getProfileDescription(profile).strip().startswith("sRGB"):
            return base.convert("RGB"), []
        converted = ImageCms.profileToProfile(base, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        return converted or base.convert("RGB"), ["icc-converted"]
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return base.convert("RGB"), ["icc-ignored"]
