"""Reading one image: every row of odd, damaged and hostile images has its own rule."""

from __future__ import annotations

import io
import os
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, PngImagePlugin

from bifrost_cli.config.schema import Images
from bifrost_cli.data.images import Animated, BadImage, read_image, square

RULES = Images()


def texture(height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray:
    """Smooth colours, so that JPEG changes them little."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(array: np.ndarray | Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(stream, form, **options)
    return stream.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_of(width: int, height: int) -> bytes:
    """A black grey-scale PNG written without holding its pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    packer, row = zlib.compressobj(9), b"\0" * (width + 1)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def reason(data: bytes | Path, rules: Images = RULES) -> str:
    with pytest.raises(BadImage) as caught:
        read_image(data, rules)
    assert caught.value.exit_code == 4 and caught.value.code == "BF-DATA-003"
    return caught.value.message


def test_plain_pictures_come_back_as_they_are() -> None:
    rgb = texture()
    for form in ("PNG", "BMP", "TIFF"):
        array = read_image(encoded(rgb, form), RULES)
        assert np.array_equal(array.rgb, rgb) and array.notes == ()
    assert np.abs(read_image(encoded(rgb, "JPEG", quality=95), RULES).rgb.astype(int) - rgb).mean() < 3
    assert read_image(encoded(rgb, "WEBP"), RULES).rgb.shape == rgb.shape


def test_empty_and_text_files_say_what_they_are() -> None:
    assert reason(b"") == "empty file"
    assert reason(b"<!DOCTYPE html><html>not found</html>") == "not an image (starts with '<!DOCTYPE')"
    assert "starts with 'hello, wo'" in reason(b"hello, world, I am a text file named .png")
    assert reason(b"\x00\x01\x02garbage").startswith("not an image (starts with 00 01 02")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_picture_cut_in_half_is_refused(form: str) -> None:
    data = encoded(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), form)
    assert "truncated" in reason(data[: len(data) // 2])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_a_missing_end_is_minor_damage() -> None:
    jpeg, png = encoded(texture(), "JPEG"), encoded(texture(), "PNG")
    assert read_image(jpeg[:-2], RULES).notes == ("minor-damage",)
    cut = read_image(png[:-12], RULES)
    assert cut.notes == ("minor-damage",) and np.array_equal(cut.rgb, texture())


def test_a_jpeg_that_lacks_more_than_its_end_is_refused() -> None:
    whole = encoded(texture(), "JPEG")
    expected = read_image(whole, RULES).rgb
    for missing in range(3, 40):
        try:
            assert np.array_equal(read_image(whole[:-missing], RULES).rgb, expected)
        except BadImage as error:
            assert error.message == "truncated"
    assert reason(whole[:-20]) == "truncated"


def test_a_flipped_byte_in_a_jpeg_scan_is_accepted() -> None:
    data = bytearray(encoded(texture(), "JPEG"))
    data[len(data) * 3 // 4] ^= 0x10
    assert read_image(bytes(data), RULES).rgb.shape == (64, 96, 3)


@pytest.mark.parametrize("name", [b"IHDR", b"IDAT", b"IEND"])
def test_a_png_with_a_wrong_checksum_is_refused(name: bytes) -> None:
    data = bytearray(encoded(texture(), "PNG"))
    at = data.index(name)
    length = struct.unpack(">I", data[at - 4 : at])[0]
    data[at + 4 + length] ^= 1
    assert "checksum" in reason(bytes(data)) or "not an image" in reason(bytes(data)) or "CRC" in reason(bytes(data))


def test_bombs_are_refused_before_decoding(tmp_path: Path) -> None:
    """100 Mpx, 400 Mpx and a strip of a million, each under a limit of one gigabyte of memory."""
    sizes = {"hundred": (10_000, 10_000), "four": (20_000, 20_000), "strip": (1_000_000, 33)}
    for name, size in sizes.items():
        (tmp_path / f"{name}.png").write_bytes(png_of(*size))
    script = (
        "import sys\nfrom pathlib import Path\nfrom bifrost_cli.config.schema import Images\n"
        "from bifrost_cli.data.images import BadImage, read_image\n"
        "for path in sys.argv[1:]:\n"
        "    try: read_image(Path(path), Images())\n"
        "    except BadImage as error: print(error.message)\n"
    )
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))  # noqa: E731
    paths = [str(tmp_path / f"{name}.png") for name in sizes]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *paths],
        capture_output=True, text=True, timeout=30, preexec_fn=limit, env=environment,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert "max_pixels" in lines[0] and "400000000 pixels" in lines[1] and "longer than 20 to 1" in lines[2]


def test_a_text_bomb_in_a_png_is_one_bad_image() -> None:
    text = chunk(b"zTXt", b"comment\0\0" + zlib.compress(b"a" * 200_000_000, 1))
    data = encoded(texture(), "PNG")
    bomb = data[:33] + text + data[33:]
    assert "damaged" in reason(bomb)
    assert PngImagePlugin.MAX_TEXT_CHUNK <= 2**20


def test_cmyk_is_converted_and_counted() -> None:
    cmyk = Image.fromarray(texture()).convert("CMYK")
    array = read_image(encoded(cmyk, "JPEG", quality=95), RULES)
    assert array.notes == ("cmyk",) and np.abs(array.rgb.astype(int) - texture()).mean() < 4


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    grey = np.tile(np.linspace(0, 69_850 - 257, 96).clip(0, 65535).astype(np.uint16), (64, 1))
    array = read_image(encoded(grey, "PNG"), RULES)
    assert array.notes == ("16-bit",)
    assert np.abs(array.rgb[..., 0] - grey / 257).max() <= 0.5
    assert np.array_equal(array.rgb[..., 0], array.rgb[..., 2])
    assert np.array_equal(read_image(encoded(grey, "TIFF"), RULES).rgb, array.rgb)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_thirty_two_bit_pictures_are_refused(dtype: type) -> None:
    values = np.full((64, 64), 70_000, dtype)
    assert reason(encoded(values, "TIFF")) == "32-bit image, export as 8-bit"
    if dtype is np.float32:
        values[0, 0] = np.nan
        assert reason(encoded(values, "TIFF")) == "32-bit image, export as 8-bit"


def test_transparency_goes_over_the_background() -> None:
    rgba = np.dstack([texture(), np.full((64, 96), 255, np.uint8)])
    rgba[:, :48, 3] = 0
    rgba[:, 48:60, 3] = 128
    array = read_image(encoded(rgba, "PNG"), RULES)
    assert array.notes == ("alpha",)
    assert (array.rgb[:, :48] == 255).all() and np.array_equal(array.rgb[:, 60:], texture()[:, 60:])
    half = texture()[:, 48:60] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(array.rgb[:, 48:60] - half).max() <= 1
    green = read_image(encoded(rgba, "PNG"), Images(background="lime"))
    assert (green.rgb[:, :48] == (0, 255, 0)).all()


@pytest.mark.parametrize("mode", ["LA", "P", "L", "1"])
def test_other_transparent_modes(mode: str) -> None:
    image = Image.new("L", (64, 64), 0).convert(mode)
    options = {"transparency": 0} if mode != "LA" else {}
    if mode == "LA":
        image.putalpha(Image.new("L", (64, 64), 0))
    array = read_image(encoded(image, "PNG", **options), RULES)
    assert (array.rgb == 255).all() and array.notes == ("alpha",)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_once(form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"lossless": True} if form == "WEBP" else {"quality": 95} if form == "JPEG" else {}
    array = read_image(encoded(texture(), form, exif=exif, **options), RULES)
    assert array.rgb.shape == (96, 64, 3)
    assert np.abs(array.rgb.astype(int) - np.rot90(texture(), -1)).mean() < 3
    exif[0x0112] = 99
    odd = read_image(encoded(texture(), form, exif=exif, **options), RULES)
    assert odd.rgb.shape == (64, 96, 3) and (form == "TIFF" or "exif-ignored" in odd.notes)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_garbage_exif_does_not_spoil_the_picture() -> None:
    data = encoded(texture(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage")
    assert read_image(data, RULES).rgb.shape == (64, 96, 3)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(form: str) -> None:
    first, second = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    data = encoded(first, form, save_all=True, append_images=[second])
    array = read_image(data, RULES)
    assert "first-frame" in array.notes and array.rgb[..., 0].mean() > 200 and array.rgb[..., 2].mean() < 30
    with pytest.raises(Animated):
        read_image(data, Images(animated="skip"))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "EPS"),
        (b"%PDF-1.7\n", "PDF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (encoded(texture(64, 64), "ICO"), "ICO"),
        (b"8BPS\0\1" + b"\0" * 40, "PSD"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 40, "HEIC"),
    ],
)
def test_formats_outside_the_list_are_refused(data: bytes, name: str) -> None:
    assert reason(data) == f"{name} is not read; export it as png, jpg or webp"


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    for name in ("picture.jpg", "PICTURE.PNG", "picture"):
        (tmp_path / name).write_bytes(encoded(texture(), "PNG"))
        assert np.array_equal(read_image(tmp_path / name, RULES).rgb, texture())


def test_garbage_profiles_are_ignored_and_counted() -> None:
    array = read_image(encoded(texture(), "PNG", icc_profile=b"garbage" * 30), RULES)
    assert array.notes == ("icc-ignored",) and np.array_equal(array.rgb, texture())


def test_a_profile_is_converted_to_srgb() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert read_image(encoded(texture(), "PNG", icc_profile=srgb), RULES).notes == ()
    wide = swapped_primaries(srgb)
    array = read_image(encoded(texture(), "PNG", icc_profile=wide), RULES)
    assert array.notes == ("icc-converted",)
    assert np.abs(array.rgb[..., ::-1].astype(int) - texture()).mean() < 3
    rgba = np.dstack([texture(), np.full((64, 96), 255, np.uint8)])
    assert np.array_equal(read_image(encoded(rgba, "PNG", icc_profile=wide), RULES).rgb, array.rgb)


def swapped_primaries(profile: bytes) -> bytes:
    """sRGB with red and blue exchanged, under another name: a profile whose effect cannot be missed."""
    data = bytearray(
        profile.replace("sRGB".encode("utf-16-be"), "odd!".encode("utf-16-be")).replace(b"sRGB ", b"odd! ")
    )
    count = struct.unpack(">I", data[128:132])[0]
    at = {bytes(data[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, blue = at[b"rXYZ"], at[b"bXYZ"]
    data[red + 4 : red + 12], data[blue + 4 : blue + 12] = data[blue + 4 : blue + 12], data[red + 4 : red + 12]
    return bytes(data)


def test_small_and_long_pictures_are_refused() -> None:
    assert "min_side" in reason(encoded(np.zeros((1, 1, 3), np.uint8), "PNG"))
    assert "min_side" in reason(encoded(np.zeros((1, 3000, 3), np.uint8), "PNG"))
    assert "longer than 20 to 1" in reason(encoded(np.zeros((32, 3000, 3), np.uint8), "PNG"))
    assert read_image(encoded(np.zeros((4, 4, 3), np.uint8), "PNG"), Images(min_side=4)).rgb.shape == (4, 4, 3)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert reason(tmp_path / "pipe.png") == "not a regular file"
    assert reason(Path("/dev/zero")) == "not a regular file"
    assert reason(tmp_path / "gone.png") == "dangling link"
    assert "links" in reason(tmp_path / "loop.png")
    assert reason(tmp_path / "nowhere.png") == "file not found"


def test_a_file_we_may_not_read_names_its_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "locked.png"
    path.write_bytes(encoded(texture(), "PNG"))
    path.chmod(0)

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)  # the user of the tests may be root, whom no mode stops
    assert "not readable by this user (mode ----------" in reason(path)


def test_square_resizes_the_short_side_and_cuts_the_centre() -> None:
    rgb = texture(100, 300)
    cut = square(rgb, 50)
    whole = np.asarray(Image.fromarray(rgb).resize((150, 50), Image.Resampling.BICUBIC))
    assert cut.shape == (50, 50, 3) and np.array_equal(cut, whole[:, 50:100])
    assert square(texture(300, 100), 64).shape == (64, 64, 3)
    assert np.array_equal(square(texture(64, 64), 64), texture(64, 64))
    assert square(texture(33, 47), 448).shape == (448, 448, 3)


# ---- zeros where data should be, films behind photographs, depths of TIFF --------------------------------------------


@pytest.mark.parametrize("quality", [75, 95])
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_jpeg_whose_end_is_zeros_is_truncated(quality: int, options: dict) -> None:
    whole = encoded(texture(256, 256), "JPEG", quality=quality, **options)
    for share in (0.5, 0.9):
        keep = int(len(whole) * share)
        assert reason(whole[:keep] + bytes(len(whole) - keep)).startswith("truncated")
    assert read_image(whole[:-2] + bytes(64), RULES).notes == ("minor-damage",), "only its end marker is missing"
    assert read_image(whole + bytes(64), RULES).notes == (), "what follows the end marker does not matter"


@pytest.mark.parametrize("lossless", [True, False])
def test_a_webp_whose_end_is_zeros_is_truncated(lossless: bool) -> None:
    whole = encoded(texture(128, 128), "WEBP", lossless=lossless)
    assert read_image(whole, RULES).notes == ()
    assert reason(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2)).startswith("truncated")


def test_a_film_behind_a_photograph_is_not_looked_at() -> None:
    whole = encoded(texture(), "JPEG")
    film = b"\0\0\0\x18ftypmp42" + b"\xff\xda\0\x08film" + bytes(range(200))
    assert np.array_equal(read_image(whole + film, RULES).rgb, read_image(whole, RULES).rgb)
    assert read_image(whole + film, RULES).notes == ()


def grey_tiff(pixels: np.ndarray, bits: int, photometric: int, data: bytes, sample_format: int = 1) -> bytes:
    height, width = pixels.shape
    rows = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1), (278, height),
            (279, len(data)), (339, sample_format)]  # fmt: skip
    start = 8 + 2 + 12 * len(rows) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in rows)
    return b"II*\0" + struct.pack("<IH", 8, len(rows)) + entries + struct.pack("<I", 0) + data


def test_grey_tiffs_of_every_depth_show_the_same_image() -> None:
    grey = texture()[..., 0]
    twelve = (grey.astype(int) * 4095 // 255).ravel()
    packed = b"".join(
        bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in zip(twelve[::2], twelve[1::2], strict=True)
    )
    deep = grey.astype(np.uint16) * 257
    for data in (grey_tiff(grey, 8, 1, grey.tobytes()), grey_tiff(grey, 8, 0, (255 - grey).tobytes()),
                 grey_tiff(grey, 16, 1, deep.astype("<u2").tobytes()), grey_tiff(grey, 12, 1, packed),
                 grey_tiff(grey, 16, 0, (65535 - deep).astype("<u2").tobytes())):  # fmt: skip
        assert np.array_equal(read_image(data, RULES).rgb, np.stack([grey] * 3, -1))


def test_tiffs_whose_numbers_mean_something_else_are_refused() -> None:
    grey = texture()[..., 0]
    assert "signed samples" in reason(grey_tiff(grey, 8, 1, grey.tobytes(), sample_format=2))
    assert reason(grey_tiff(grey, 16, 1, bytes(2 * grey.size), sample_format=2))
    assert reason(grey_tiff(grey, 12, 0, bytes(2 * grey.size)))


def test_an_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "holiday.heic").write_bytes(b"\0\0\0\x20ftypheic00000000")
    for path in (tmp_path / "holiday.heic", tmp_path / "nothere.png"):
        with pytest.raises(BadImage) as caught:
            read_image(path, RULES)
        assert caught.value.at == str(path)
