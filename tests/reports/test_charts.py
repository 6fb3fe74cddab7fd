"""The plots of a report: well-formed SVG, everything said in words, nothing outside the drawing."""

import re
from xml.etree import ElementTree

import pytest

from bifrost_cli.reports.charts import WIDTH, dots, lines

ROWS = [
    {"name": "native <latents>", "value": 0.9375, "interval95": [0.91, 0.963]},
    {"name": "learned & read", "value": 0.0, "interval95": [0.0, 0.0]},
]


def places(svg, name):
    return [float(found) for found in re.findall(rf'\b{name}="(-?[\d.]+)"', svg)]


def test_a_row_is_a_dot_a_bar_and_words():
    svg = dots(ROWS, "share right")
    root = ElementTree.fromstring(svg)
    words = [text.text for text in root.iter("text")]
    assert {"native <latents>", "learned & read", "0.938", "0", "share right"} <= set(words)
    assert root.get("aria-label") == "native <latents>: 0.938; learned & read: 0.000"
    one, zero = places(svg, "cx")
    ends = {text.text: float(text.get("x")) for text in root.iter("text") if text.text in ("0.2", "1")}
    assert zero == pytest.approx(ends["0.2"] - (ends["1"] - ends["0.2"]) / 4, abs=0.2)
    assert one - zero == pytest.approx(0.9375 * (ends["1"] - zero), abs=0.2)


def test_values_beyond_one_get_round_numbers_below():
    svg = dots([{"name": "psnr", "value": 27.3, "interval95": [24.9, 31.2]}])
    words = [text.text for text in ElementTree.fromstring(svg).iter("text")]
    assert {"24", "28", "32"} <= set(words)
    assert all(0 <= x <= WIDTH for x in places(svg, "x1") + places(svg, "x2") + places(svg, "cx"))


def test_lines_are_told_apart_by_dashes_too_and_named():
    svg = lines({"random": [(1, 0.9, 0.8, 1.0), (16, 0.7, 0.6, 0.8)], "raster": [(4, 0.5), (1, 0.6)]}, "steps", "right")
    root = ElementTree.fromstring(svg)
    drawn = list(root.iter("polyline"))
    assert [line.get("stroke-dasharray") for line in drawn] == [None, "6 3"]
    assert {"random", "raster", "steps", "right", "1", "2", "5", "10"} <= {text.text for text in root.iter("text")}
    assert "raster: 1 0.600, 4 0.500" in root.get("aria-label")
    first, second = (float(point.split(",")[0]) for point in drawn[1].get("points").split())
    third = float(drawn[0].get("points").split()[1].split(",")[0])
    assert second - first == pytest.approx((third - first) / 2, abs=0.2)  # powers: 1 to 4 is as far as 4 to 16


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        dots([])
    with pytest.raises(ValueError, match="no points"):
        lines({"empty": []}, "x", "y")
    with pytest.raises(ValueError, match="not finite"):
        lines({"one": [(1, float("nan"))]}, "x", "y")
