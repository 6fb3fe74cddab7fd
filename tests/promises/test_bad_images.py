"""Bad inputs 1 to 23, as commands: folders with nothing in them, and images of every kind of damage.

A bad image stops the extraction before anything is made; with `--bad-image skip` it is counted, and the rest stored.
How each is decoded to the last value is in `test_images.py`.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from fixtures_targets import Means
from PIL import Image
from refusals import SMALL, refused, told
from test_images import chunk, encoded, png_of, texture

from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.loading.loaders import ModelLoader

SKIP = ["--bad-image", "skip", "--max-bad", "0.5"]


@pytest.fixture(autouse=True)
def means(monkeypatch):
    monkeypatch.setattr(ModelLoader, "encoder", lambda *_, **__: Means(lambda: None))


@pytest.fixture
def inputs(tmp_path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def put(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    (folder / name).with_suffix(".txt").write_text("a caption")
    return folder / name


def command(source: Path, tmp_path: Path) -> list[object]:
    return ["extract-latents", source, "-o", tmp_path / "out", *SMALL]


# ---- 1, 2: nothing --------------------------------------------------------------------------------------------------


def test_01_an_empty_folder_list_or_table(inputs, tmp_path, capsys):
    refused(capsys, inputs, 4, "DATA-001", str(inputs), *command(inputs, tmp_path))
    for name, text in (("a.jsonl", ""), ("a.csv", "image,caption\n")):
        (inputs / name).write_text(text)
        refused(capsys, inputs, 4, "DATA-001", name, *command(inputs / name, tmp_path))
    assert not (tmp_path / "out").exists()


def test_01_a_parquet_without_rows(inputs, tmp_path, capsys):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"image": [], "caption": []}), inputs / "a.parquet")
    refused(capsys, inputs, 4, "DATA-001", "a.parquet", *command(inputs / "a.parquet", tmp_path))


def test_02_folders_and_texts_alone(inputs, tmp_path, capsys):
    (inputs / "sub").mkdir()
    (inputs / "1.txt").write_text("x")
    said = refused(capsys, inputs, 4, "DATA-001", str(inputs), *command(inputs, tmp_path))
    assert "txt" in said and "png" in said, "what was seen, and what was looked for"
    assert not (tmp_path / "out").exists()


# ---- 3 to 22: images that are refused -----------------------------------------------------------------------------


def cut(form: str) -> bytes:
    data = encoded(texture(), form)
    return data[: len(data) // 2]


def wrong_crc() -> bytes:
    data = bytearray(encoded(texture(), "PNG"))
    data[data.index(b"IDAT") + 6] ^= 1
    return bytes(data)


def text_bomb() -> bytes:
    import zlib

    body = b"Comment\0\0" + zlib.compress(b"x" * 70_000_000, 9)
    whole = encoded(texture(), "PNG")
    return whole[:33] + chunk(b"zTXt", body) + whole[33:]


def tiff(dtype: type, value: float = 1.0) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((64, 64), value, dtype)).save(stream, "TIFF")
    return stream.getvalue()


def other(form: str) -> bytes:
    return encoded(Image.fromarray(texture()).convert("RGB"), form)


REFUSED = [
    ("03-no-bytes", "a.png", lambda: b"", "empty"),
    ("04-a-page-for-a-picture", "a.jpg", lambda: b"<!DOCTYPE html><html>404</html>", "<!DOCTYPE"),
    ("05-a-jpeg-cut-in-half", "a.jpg", lambda: cut("JPEG"), "a.jpg"),
    ("05-a-png-cut-in-half", "a.png", lambda: cut("PNG"), "a.png"),
    ("08-a-png-with-a-wrong-crc", "a.png", wrong_crc, "a.png"),
    ("09-a-png-of-100-megapixels", "a.png", lambda: png_of(10_000, 10_000), "more than max_pixels"),
    ("10-a-strip-of-a-million-pixels", "a.png", lambda: png_of(1_000_000, 1), "a.png"),
    ("10-a-bomb-of-400-megapixels", "a.png", lambda: png_of(20_000, 20_000), "400000000 pixels"),
    ("11-a-text-bomb", "a.png", text_bomb, "a.png"),
    ("14-a-tiff-of-32-bit-integers", "a.tif", lambda: tiff(np.int32), "32-bit"),
    ("14-a-tiff-of-floats", "a.tif", lambda: tiff(np.float32), "32-bit"),
    ("15-a-tiff-of-floats-with-nan", "a.tif", lambda: tiff(np.float32, np.nan), "32-bit"),
    ("19-eps", "a.png", lambda: other("EPS"), "a.png"),
    ("19-pdf", "a.png", lambda: other("PDF"), "a.png"),
    ("19-svg", "a.png", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a.png"),
    ("19-ico", "a.png", lambda: other("ICO"), "a.png"),
    ("19-psd", "a.png", lambda: b"8BPS\0\1" + b"\0" * 60, "a.png"),
    ("22-one-pixel", "a.png", lambda: encoded(np.zeros((1, 1, 3), np.uint8), "PNG"), "1x1"),
    ("22-a-line", "a.png", lambda: encoded(np.zeros((1, 3000, 3), np.uint8), "PNG"), "3000x1"),
]


@pytest.mark.parametrize(("name", "data", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_pictures_that_are_refused_stop_or_are_counted(inputs, tmp_path, capsys, name, data, words):
    bad = put(inputs, name, data())
    put(inputs, "good.png", encoded(texture(), "PNG"))
    said = refused(capsys, inputs, 4, "DATA-003", name, *command(inputs, tmp_path))
    assert words in said, said
    assert not (tmp_path / "out").exists(), "it stops before anything is made"
    code, said = told(capsys, inputs, *command(inputs, tmp_path), *SKIP)
    assert code == 0 and "seen 2, readable 1" in said, said
    event = json.loads((tmp_path / "out" / "work" / "events.jsonl").read_text())
    assert event["event"] == "bad-image" and any(bad.name in str(value) for value in event.values())
    assert LatentsStore.open(tmp_path / "out").keys == ["good"]


# ---- 6 to 23: images that are accepted ----------------------------------------------------------------------------


def flipped_scan() -> bytes:
    data = bytearray(encoded(texture(256, 256), "JPEG", quality=95))
    data[len(data) // 2] ^= 1
    return bytes(data)


def oriented(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return encoded(Image.fromarray(texture()), "JPEG", exif=exif)


def animated(form: str) -> bytes:
    frames = [Image.fromarray(texture(seed=i)) for i in range(3)]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:])


ACCEPTED = [
    ("06-a-jpeg-without-its-end", "a.jpg", lambda: encoded(texture(), "JPEG")[:-2], "minor-damage 1"),
    ("06-a-png-without-its-end", "a.png", lambda: encoded(texture(), "PNG")[:-12], "minor-damage 1"),
    ("07-a-flipped-byte-in-the-scan", "a.jpg", flipped_scan, ""),
    ("12-cmyk", "a.jpg", lambda: encoded(Image.fromarray(texture()).convert("CMYK"), "JPEG"), "cmyk 1"),
    ("13-grey-of-16-bits", "a.png", lambda: encoded(Image.fromarray(np.full((64, 64), 9000, np.uint16)), "PNG"), "16"),
    ("16-transparent", "a.png", lambda: encoded(Image.fromarray(texture()).convert("RGBA"), "PNG"), ""),
    ("16-grey-and-transparent", "a.png", lambda: encoded(Image.fromarray(texture()).convert("LA"), "PNG"), ""),
    ("17-lying-on-its-side", "a.jpg", lambda: oriented(6), ""),
    ("17-an-orientation-that-is-none", "a.jpg", lambda: oriented(99), ""),
    ("18-an-animated-gif", "a.gif", lambda: animated("GIF"), "first-frame 1"),
    ("18-an-animated-webp", "a.webp", lambda: animated("WEBP"), "first-frame 1"),
    ("18-a-tiff-of-pages", "a.tif", lambda: animated("TIFF"), "first-frame 1"),
    ("20-a-png-named-jpg", "a.JPG", lambda: encoded(texture(), "PNG"), ""),
    ("21-a-profile-of-garbage", "a.png", lambda: encoded(texture(), "PNG", icc_profile=b"no"), "icc-ignored 1"),
]


@pytest.mark.parametrize(("name", "data", "counted"), [row[1:] for row in ACCEPTED], ids=[row[0] for row in ACCEPTED])
def test_pictures_that_are_accepted_are_stored_and_their_kind_counted(inputs, tmp_path, capsys, name, data, counted):
    put(inputs, name, data())
    code, said = told(capsys, inputs, *command(inputs, tmp_path))
    assert code == 0 and counted in said, said
    assert LatentsStore.open(tmp_path / "out").keys == ["a"]


def test_16_17_what_is_done_to_pictures_belongs_to_the_store(inputs, tmp_path, capsys):
    """Another background is another store: the same place refuses it, and what is there stays."""
    put(inputs, "a.png", encoded(Image.fromarray(texture()).convert("RGBA"), "PNG"))
    assert told(capsys, inputs, *command(inputs, tmp_path))[0] == 0
    told_of = LatentsStore.open(tmp_path / "out").artifact.identity["preprocessing"]
    assert told_of["background"] == "white" and told_of["orientation"] == "exif" and told_of["colour"] == "srgb"
    refused(capsys, inputs, 5, "STORE-003", "background", *command(inputs, tmp_path), "--background", "black")


def test_18_animations_can_be_left_out(inputs, tmp_path, capsys):
    put(inputs, "a.gif", animated("GIF"))
    put(inputs, "good.png", encoded(texture(), "PNG"))
    code, said = told(capsys, inputs, *command(inputs, tmp_path), "--animated", "skip")
    assert code == 0 and LatentsStore.open(tmp_path / "out").keys == ["good"], said


def test_23_the_same_bytes_twice_are_two_rows(inputs, tmp_path, capsys):
    for name in ("a.png", "b.png"):
        put(inputs, name, encoded(texture(), "PNG"))
    code, said = told(capsys, inputs, *command(inputs, tmp_path))
    assert code == 0 and "duplicates 1" in said, said
    assert LatentsStore.open(tmp_path / "out").keys == ["a", "b"]
