"""Generated images as PNG, JPEG and WebP: the pixels stay, and each says that a model made it, and how."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from bifrost_cli import __version__
from bifrost_cli.data.png import XMP_CHUNK, image_bytes, png_bytes, png_text
from bifrost_cli.data.xmp import EDITED, GENERATED, LONGEST, is_ours, xmp_facts, xmp_packet
from bifrost_cli.errors import UsageError

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
TEXT = {"prompt": '<a> & "b" \x07 \ud83d\ude42'.encode("utf-16", "surrogatepass").decode("utf-16"), "seed": "7"}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("source_type", [GENERATED, EDITED])
def test_each_format_carries_the_mark_and_what_made_it(suffix, source_type):
    data = image_bytes(PIXELS, TEXT, source_type=source_type, suffix=suffix)
    assert data == image_bytes(PIXELS, TEXT, source_type=source_type, suffix=suffix)
    image = Image.open(io.BytesIO(data))
    assert image.format == {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}[suffix]
    found = xmp_facts(image.info["xmp"])
    assert found.pop("DigitalSourceType") == source_type and found.pop("CreatorTool").endswith(__version__)
    assert found == ({} if suffix == ".png" else TEXT) and is_ours(image.info["xmp"])
    assert f"<Iptc4xmpExt:DigitalSourceType>{source_type}</".encode() in data  # in the open, as other programs look


def test_a_png_is_what_it_was_but_for_one_chunk():
    marked, plain = image_bytes(PIXELS, TEXT), png_bytes(PIXELS, TEXT)
    assert png_text(marked) == TEXT | {XMP_CHUNK: png_text(marked)[XMP_CHUNK]}
    start = marked.index(b"iTXt" + XMP_CHUNK.encode()) - 4
    length = int.from_bytes(marked[start : start + 4], "big") + 12
    assert marked[:start] + marked[start + length :] == plain
    assert marked[start + 8 : start + length].startswith(XMP_CHUNK.encode() + b"\0\0\0\0\0")  # as XMP part 3 asks


def test_webp_is_exact_and_jpeg_is_near():
    webp, jpeg = (np.asarray(Image.open(io.BytesIO(image_bytes(PIXELS, {}, suffix=s)))) for s in (".webp", ".jpg"))
    assert (webp == PIXELS).all() and np.abs(jpeg.astype(int) - PIXELS).mean() < 12  # of noise, the hardest
    assert Image.open(io.BytesIO(image_bytes(PIXELS, {}, suffix=".jpg"))).layer[1][1:3] == (1, 1)  # 4:4:4


def test_a_jpeg_says_when_its_text_does_not_fit():
    text = {"prompt": "a" * 66_000}
    with pytest.raises(UsageError, match="do not fit into a JPEG"):
        image_bytes(PIXELS, text, suffix=".jpg")
    for suffix in (".png", ".webp"):
        image_bytes(PIXELS, text, suffix=suffix)


PACKET = xmp_packet(GENERATED, "bifrost 1", {"prompt": "a"})


@pytest.mark.parametrize(
    "packet",
    ["", "no xml", PACKET[:-60], PACKET.replace("<x:xmpmeta", "<!DOCTYPE a [<!ENTITY b 'c'>]><x:xmpmeta"),
     PACKET.encode("utf-16"), PACKET + " " * LONGEST, b"\xff\xfe"],
)  # fmt: skip
def test_what_is_no_packet_says_nothing(packet):
    assert xmp_facts(packet) == {} and not is_ours(packet)


def test_a_foreign_packet_is_read_and_told_apart():
    foreign = PACKET.replace("<rdf:Description ", '<rdf:Description xmp:Rating="5" ')
    assert xmp_facts(foreign)["prompt"] == "a" and not is_ours(foreign) and is_ours(PACKET)
    listed = PACKET.replace('"prompt": "a"', '"prompt": 3')
    assert "prompt" not in xmp_facts(listed)
    names = (
        'xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:i="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    )
    as_attribute = f'<r:Description {names} i:DigitalSourceType="{EDITED}"/>'
    assert xmp_facts(as_attribute) == {"DigitalSourceType": EDITED}
