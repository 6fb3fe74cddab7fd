"""Plots as inline SVG: values with intervals, lines over a number, clouds of points, and the graph of a lineage.

A drawing takes its colours from the page (`currentColor`, `--bar`, `--soft`, `--line`), so that it is right in light
and dark; it is laid out for the width of a phone, says every value in words too, and needs no script and no library.
"""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from typing import Any, NamedTuple

WIDTH, EDGE, CHAR, WIDE = 360, 8, 7.7, 13  # px of a drawing, of its margin, of a letter at 12 px, of a CJK letter
TOP, BELOW, LINE = 28, 40, 18  # px over a plot, under it for the axis, of a line of text
PLOT, CLOUD = 190, 240  # px of a plot's height
BOX, BOX_HEIGHT, BOX_ROW, ABREAST = 110, 40, 64, 3  # px of a lineage's boxes and rows; boxes side by side
MARKED = 24  # points of a line that are marked one by one
COLOURS = ("var(--bar)", *(f"var(--series-{number})" for number in range(2, 7)))
DASHES = ("", "6 3", "2 3", "9 3 2 3", "12 4", "4 6")
FONT = "font: 12px system-ui, sans-serif"
_RULE = 'stroke="var(--line, currentColor)" stroke-width="1" opacity=".6"'
_SOFT = 'fill="var(--soft, currentColor)"'


class _Axis(NamedTuple):
    """Numbers from `low` to `high` on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[float]
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = map(math.log, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (self.end - self.start) * (value - low) / (high - low)


def dots(rows: Sequence[Mapping[str, Any]], label: str = "") -> str:
    """One row each: its `name` and the value in words, under them a dot at `value` and a bar over `interval95`.

    Values that all lie in [0, 1] get the axis 0 to 1. ValueError: no rows, or a value that is not finite.
    """
    if not rows:
        raise ValueError("no rows to draw")
    axis = _axis([edge for row in rows for edge in (row["value"], *row["interval95"])], 20, WIDTH - 20, share=True)
    parts, y = [], float(EDGE)
    for row in rows:
        names = _wrapped(row["name"], WIDTH - 2 * EDGE - 64)
        parts += [_text(EDGE, y + LINE * (line + 0.7), name) for line, name in enumerate(names)]
        parts.append(_text(WIDTH - EDGE, y + LINE * 0.7, _number(row["value"]), "end"))
        y += LINE * len(names) + 24
        low, high = (axis.at(edge) for edge in row["interval95"])
        parts.append(
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y - 14:.1f}" y2="{y - 14:.1f}" stroke="{COLOURS[0]}" '
            'stroke-width="7" stroke-linecap="round" opacity=".4"/>'
            f'<circle cx="{axis.at(row["value"]):.1f}" cy="{y - 14:.1f}" r="5" fill="{COLOURS[0]}"/>'
        )
    below = _ticks_below(axis, EDGE, y, label)
    return _svg(y + BELOW, "; ".join(f"{row['name']}: {row['value']:.3f}" for row in rows), [below, *parts])


def lines(series: Mapping[str, Sequence[tuple[float, ...]]], x: str, y: str, *, powers: str = "x") -> str:
    """One line a series: points (x, y) or (x, y, low, high) by name; a single one needs no legend. `x` and `y` name the
    axes; those of `powers` ("x", "y", "xy") are logarithmic when all numbers are above 0 and the largest is ten times
    the smallest or more. ValueError: no points, or a value that is not finite."""
    curves = {name: sorted((*point, point[1], point[1])[:4] for point in points)
              for name, points in series.items() if points}  # fmt: skip
    if not curves:
        raise ValueError("no points to draw")
    everything = [point for curve in curves.values() for point in curve]
    heights = [number for point in everything for number in point[1:]]
    up = _axis(heights, TOP + PLOT, TOP, share=max(heights) > 0.5, powers="y" in powers)
    across = _axis([point[0] for point in everything], _left(up), WIDTH - 14, exact=True, powers="x" in powers)
    drawn = [_line(name, curve, across, up, number) for number, (name, curve) in enumerate(curves.items())]
    legend = {name: f'<line x1="{EDGE}" x2="46" y1="%.1f" y2="%.1f" {_stroke(number)}/>'
              for number, name in enumerate(curves) if len(curves) > 1}  # fmt: skip
    values = [f"{name}: " + ", ".join(f"{a:g} {b:.3f}" for a, b, *_ in curve) for name, curve in curves.items()]
    return _plot(across, up, (x, y), drawn, legend, values)


def points(series: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> str:
    """A cloud of points (x, y) a series. ValueError: no points."""
    everything = [point for cloud in series.values() for point in cloud]
    if not everything:
        raise ValueError("no points to draw")
    up = _axis([point[1] for point in everything], TOP + CLOUD, TOP)
    across = _axis([point[0] for point in everything], _left(up), WIDTH - 14)
    drawn, legend = [], {}
    for number, (name, cloud) in enumerate(series.items()):
        circles = "".join(f'<circle cx="{across.at(a):.1f}" cy="{up.at(b):.1f}" r="2"/>' for a, b in cloud)
        drawn.append(f'<g fill="{_colour(number)}" opacity=".55">{circles}</g>')
        legend[name] = f'<circle cx="28" cy="%.1f" r="5" fill="{_colour(number)}"/>'
    return _plot(across, up, (x, y), drawn, legend, [f"{name}: {len(cloud)} points" for name, cloud in series.items()])


def lineage_graph(edges: Sequence[tuple[str, str | None]], links: Mapping[str, str]) -> str:
    """What was made from what, as (material, product) by id (KIND-HASH), the first material at the top.

    The product is None where nothing was made of it. A box leads to the page of its id in `links`, or to `#ID`.
    """
    products: dict[str, set[str]] = {}
    for name, product in edges:
        products.setdefault(name, set()).update([product] if product else [])

    @cache
    def steps(name: str) -> int:
        """The longest way to a last product."""
        return max((1 + steps(product) for product in products[name]), default=0)

    rows: list[list[str]] = []
    for step in range(max(map(steps, products)), -1, -1):
        level = [name for name in products if steps(name) == step]
        rows += [level[start : start + ABREAST] for start in range(0, len(level), ABREAST)]
    place = {name: (WIDTH * (column + 0.5) / len(row), EDGE + BOX_HEIGHT / 2 + BOX_ROW * number)
             for number, row in enumerate(rows) for column, name in enumerate(row)}  # fmt: skip
    pairs, parts = [(name, product) for name in products for product in sorted(products[name])], []
    for name, product in pairs:
        (x, y), (to_x, to_y) = place[name], place[product]
        y, to_y = y + BOX_HEIGHT / 2, to_y - BOX_HEIGHT / 2
        middle = (y + to_y) / 2
        path = f"M{x:.1f},{y:.1f} C{x:.1f},{middle:.1f} {to_x:.1f},{middle:.1f} {to_x:.1f},{to_y:.1f}"
        parts.append(f'<path d="{path}" fill="none" stroke="var(--soft, currentColor)" stroke-width="1.5"/>')
    parts += [_box(name, *place[name], links.get(name, f"#{name}")) for name in products]
    description = "; ".join(f"{product} from {name}" for name, product in pairs) or ", ".join(products)
    return _svg(BOX_ROW * len(rows) - (BOX_ROW - BOX_HEIGHT) + 2 * EDGE, description, parts, role="group")


def _line(name: str, curve: Sequence[tuple[float, ...]], across: _Axis, up: _Axis, number: int) -> str:
    path = " ".join(f"{across.at(x):.1f},{up.at(y):.1f}" for x, y, *_ in curve)
    colour = _colour(number)
    marks = "".join(
        f'<line x1="{across.at(x):.1f}" x2="{across.at(x):.1f}" y1="{up.at(low):.1f}" y2="{up.at(high):.1f}" '
        f'stroke="{colour}" stroke-width="5" opacity=".3"/><circle cx="{across.at(x):.1f}" cy="{up.at(y):.1f}" r="3" '
        f'fill="{colour}"><title>{escape(name)}: {_number(y)} at {_number(x)}</title></circle>'
        for x, y, low, high in (curve if len(curve) <= MARKED else ())
    )
    return f'<polyline points="{path}" {_stroke(number)}/>{marks}'


def _plot(
    across: _Axis, up: _Axis, axes: tuple[str, str], drawn: list[str], legend: Mapping[str, str], values: list[str]
) -> str:
    """What was drawn on its axes, and under it the names of the series, each behind its mark."""
    parts = [_ticks_below(across, TOP, up.start, axes[0])]
    for tick in up.ticks:
        level = f'y1="{up.at(tick):.1f}" y2="{up.at(tick):.1f}"'
        parts.append(f'<line x1="{across.start:.1f}" x2="{across.end:.1f}" {level} {_RULE}/>')
        parts.append(_text(across.start - 6, up.at(tick) + 4, f"{tick:.6g}", "end", _SOFT))
    parts += [_text(EDGE / 2, 13, axes[1], "start", _SOFT), *drawn]
    y = up.start + BELOW
    for name, mark in legend.items():
        parts.append(mark.replace("%.1f", f"{y + LINE / 2:.1f}"))
        for line in _wrapped(name, WIDTH - EDGE - 56):
            parts.append(_text(56, y + LINE / 2 + 4, line))
            y += LINE
    return _svg(y + EDGE / 2, f"{axes[1]} against {axes[0]}. {'; '.join(values)}", parts)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _stroke(number: int) -> str:
    """Colour and dashes together: neither alone tells the lines apart for everyone."""
    dashes = DASHES[number % len(DASHES)]
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'fill="none" stroke="{_colour(number)}" stroke-width="2"{dashed}'


def _ticks_below(axis: _Axis, top: float, bottom: float, label: str) -> str:
    parts, free = [], 0.0  # numbers that would touch the one before are left out
    for tick in axis.ticks:
        x, number = axis.at(tick), f"{tick:.6g}"
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" {_RULE}/>')
        half = CHAR * len(number) / 2
        x = min(x, WIDTH - half - 3)
        if x - half >= free:
            parts.append(_text(x, bottom + 16, number, "middle", _SOFT))
            free = x + half + 6
    return "".join(parts) + _text((axis.start + axis.end) / 2, bottom + 33, label, "middle", _SOFT)


def _left(up: _Axis) -> float:
    """Where a plot begins, so that the numbers at its left have room."""
    return CHAR * max(len(f"{tick:.6g}") for tick in up.ticks) + 12


def _box(name: str, x: float, y: float, link: str) -> str:
    kind, digest = (part if len(part) <= BOX // CHAR else part[: int(BOX // CHAR) - 1] + "\u2026"
                    for part in name.rpartition("-")[::2])  # fmt: skip
    return (
        f'<a href="{escape(link)}"><title>{escape(name)}</title><rect x="{x - BOX / 2:.1f}" '
        f'y="{y - BOX_HEIGHT / 2:.1f}" width="{BOX}" height="{BOX_HEIGHT}" rx="8" fill="var(--page, none)" '
        f'stroke="var(--line, currentColor)"/>{_text(x, y - 3, kind, "middle")}'
        f"{_text(x, y + 13, digest, 'middle', _SOFT)}</a>"
    )


def _text(x: float, y: float, value: Any, anchor: str = "start", fill: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {fill}>{escape(str(value))}</text>'


def _svg(height: float, description: str, parts: Sequence[str], role: str = "img") -> str:
    """The drawing, as wide as the page lets it be."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" width="100%" role="{role}" aria-label="{escape(description)}" '
        f'fill="currentColor" style="{FONT}">{"".join(parts)}</svg>'
    )


def _wrapped(name: Any, width: float) -> list[str]:
    """The name in lines that are at most `width` px."""
    letter = WIDE if any(unicodedata.east_asian_width(char) in "WF" for char in str(name)) else CHAR
    return textwrap.wrap(str(name), max(1, int(width / letter))) or [""]


def _axis(
    values: Sequence[float], start: float, end: float, *, exact: bool = False, share: bool = False, powers: bool = False
) -> _Axis:
    """`exact`: from the smallest to the largest value, not to round numbers around them; `share`: values that all lie
    in [0, 1] get all of it."""
    low, high = min(values), max(values)
    if not all(map(math.isfinite, (low, high))):
        raise ValueError("a value to draw is not finite")
    if powers and low > 0 and high >= 10 * low:  # ticks at 1, 2 and 5 times powers of ten, or at those alone
        tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [part * 10.0**ten for ten in tens for part in ((1, 2, 5) if high < 1000 * low else (1,))]
        return _Axis(low, high, start, end, [tick for tick in ticks if low <= tick <= high], log=True)
    if share and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    if low == high:
        low, high = low - 0.5, high + 0.5
    # 1, 2 or 5 times a power of ten, four to ten of which make the width.
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(power * part for part in (0.1, 0.2, 0.5, 1.0, 2.0) if (high - low) / (power * part) <= 8)
    if not exact:
        low, high = step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9)
    first = math.ceil(low / step - 1e-9)
    ticks = [round(step * place, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]
    return _Axis(low, high, start, end, ticks)


def _number(value: float) -> str:
    return f"{value:.3f}" if 0 < abs(value) < 1 and round(value, 2) != value else f"{value:.4g}"
