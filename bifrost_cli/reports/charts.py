"""Plots as inline SVG: values with intervals, lines over a number, and clouds of points.

Comes in: rows, or series of points, and the axes' names. Goes out: one `<svg>` as text: it takes its colours from the
page (`currentColor`, `--bar`, `--soft`, `--line`), so that it is right in light and dark, says every value in words
too, and needs no script and no library. Does not know what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

WIDTH, HALF, CHAR = 720, 540, 7.2  # px of a drawing, of one with a neighbour, of one letter at 13 px
ROW, TOP, BOTTOM = 34, 8, 44  # px of a row, above and below the plot
MARKED = 24  # points of a line that are marked one by one
COLOURS = ("var(--bar, #3b6fb5)", "#c2571a", "#2e8b57", "#8e44ad", "#a8861d", "#c0397a")
DASHES = ("", "6 3", "2 3", "9 3 2 3", "12 4", "4 6")
FONT = "font: 13px system-ui, sans-serif"


class Point(NamedTuple):
    """A measured point with the bounds of its interval; without an interval all three are the same."""

    x: float
    y: float
    low: float
    high: float


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
    """One line a row: its `name`, a dot at `value`, a bar over `interval95`, the value in words.

    `label` names the axis. Values that all lie in [0, 1] get the axis 0 to 1. ValueError: no rows.
    """
    if not rows:
        raise ValueError("no rows to draw")
    edges = [number for row in rows for number in (row["value"], *row["interval95"])]
    left = min(0.55 * WIDTH, CHAR * max(len(str(row["name"])) for row in rows) + 12)
    height = TOP + ROW * len(rows) + BOTTOM
    axis = _axis(edges, left, WIDTH - 84, share=True)
    parts = [_ticks_below(axis, TOP, TOP + ROW * len(rows), label)]
    for place, row in enumerate(rows):
        parts.append(_dot(row, axis, TOP + ROW * (place + 0.5)))
    return svg(height, "; ".join(f"{row['name']}: {row['value']:.3f}" for row in rows), parts)


def lines(series: Mapping[str, Sequence[tuple[float, ...]]], x: str, y: str, *, powers: str = "x") -> str:
    """One line a series, through points (x, y) or (x, y, low, high); `x` and `y` name the axes.

    A single series needs no legend. An axis named in `powers` ("x", "y", "xy") runs over powers when its largest number
    is ten times the smallest or more, and all are above 0. ValueError: no points.
    """
    points = {name: sorted(_point(values) for values in found) for name, found in series.items() if found}
    if not points:
        raise ValueError("no points to draw")
    everything = [point for found in points.values() for point in found]
    plot = 280
    across = _axis([point.x for point in everything], 64, HALF - 24, exact=True, powers="x" in powers)
    heights = [number for point in everything for number in point[1:]]
    up = _axis(heights, TOP + plot, TOP + 14, share=max(heights) > 0.5, powers="y" in powers)
    parts = [_ticks_below(across, TOP + 14, TOP + plot, x), _ticks_left(up, across, y)]
    for number, (name, found) in enumerate(points.items()):
        parts.append(_line(name, found, across, up, number))
        parts.append(_legend(name, TOP + plot + BOTTOM + 22 * (number + 0.5), number) if len(points) > 1 else "")
    told = "; ".join(f"{name}: " + ", ".join(f"{p.x:g} {p.y:.3f}" for p in found) for name, found in points.items())
    legends = len(points) if len(points) > 1 else 0
    return svg(TOP + plot + BOTTOM + 22 * legends, f"{y} against {x}. {told}", parts, HALF)


def points(series: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> str:
    """A cloud of points (x, y) a series. ValueError: no points."""
    everything = [point for found in series.values() for point in found]
    if not everything:
        raise ValueError("no points to draw")
    plot = 320
    across = _axis([point[0] for point in everything], 64, HALF - 24)
    up = _axis([point[1] for point in everything], TOP + plot, TOP + 14)
    parts = [_ticks_below(across, TOP + 14, TOP + plot, x), _ticks_left(up, across, y)]
    for number, (name, found) in enumerate(series.items()):
        colour, middle = COLOURS[number % len(COLOURS)], TOP + plot + BOTTOM + 22 * (number + 0.5)
        dots_ = "".join(f'<circle cx="{across.at(a):.1f}" cy="{up.at(b):.1f}" r="2.5"/>' for a, b in found)
        parts.append(f'<g fill="{colour}" opacity=".55">{dots_}</g><circle cx="84" cy="{middle:.1f}" r="5" '
                     f'fill="{colour}"/><text x="114" y="{middle + 4:.1f}">{_text(name)}</text>')  # fmt: skip
    told = "; ".join(f"{name}: {len(found)} points" for name, found in series.items())
    return svg(TOP + plot + BOTTOM + 22 * len(series), f"{y} against {x}. {told}", parts, HALF)


# ---- parts ----------------------------------------------------------------------------------------------------------


def _dot(row: Mapping[str, Any], axis: _Axis, middle: float) -> str:
    low, high = (axis.at(edge) for edge in row["interval95"])
    where = axis.at(row["value"])
    return (
        f'<text x="{axis.start - 10:.1f}" y="{middle + 4:.1f}" text-anchor="end">{_text(row["name"])}</text>'
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle:.1f}" y2="{middle:.1f}" stroke="{COLOURS[0]}" '
        'stroke-width="7" stroke-linecap="round" opacity=".4"/>'
        f'<circle cx="{where:.1f}" cy="{middle:.1f}" r="5" fill="{COLOURS[0]}"/>'
        f'<text x="{axis.end + 12:.1f}" y="{middle + 4:.1f}">{_number(row["value"])}</text>'
    )


def _line(name: str, points: Sequence[Point], across: _Axis, up: _Axis, number: int) -> str:
    colour = COLOURS[number % len(COLOURS)]
    places = [(across.at(p.x), up.at(p.y), up.at(p.low), up.at(p.high)) for p in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
    bars = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}" stroke-width="5" '
        f'opacity=".3"/><circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}">'
        f"<title>{_text(name)}: {_number(point.y)} at {_number(point.x)}</title></circle>"
        for point, (x, y, low, high) in zip(points, places, strict=True)
        if len(points) <= MARKED
    )
    return f'<polyline points="{path}" {_stroke(number)}/>{bars}'


def _legend(name: str, middle: float, number: int) -> str:
    return (
        f'<line x1="64" x2="104" y1="{middle:.1f}" y2="{middle:.1f}" {_stroke(number)}/>'
        f'<text x="114" y="{middle + 4:.1f}">{_text(name)}</text>'
    )


def _stroke(number: int) -> str:
    """Colour and dashes together: neither alone tells the lines apart for everyone."""
    dashes = DASHES[number % len(DASHES)]
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'fill="none" stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="2"{dashed}'


def _ticks_below(axis: _Axis, top: float, bottom: float, label: str) -> str:
    ticks = "".join(
        f'<line x1="{axis.at(tick):.1f}" x2="{axis.at(tick):.1f}" y1="{top:.1f}" y2="{bottom:.1f}" {_RULE}/>'
        f'<text x="{axis.at(tick):.1f}" y="{bottom + 17:.1f}" text-anchor="middle" {SOFT}>{tick:.6g}</text>'
        for tick in axis.ticks
    )
    middle = (axis.start + axis.end) / 2
    return ticks + f'<text x="{middle:.1f}" y="{bottom + 36:.1f}" text-anchor="middle" {SOFT}>{_text(label)}</text>'


def _ticks_left(up: _Axis, across: _Axis, label: str) -> str:
    ticks = "".join(
        f'<line x1="{across.start:.1f}" x2="{across.end:.1f}" y1="{up.at(tick):.1f}" y2="{up.at(tick):.1f}" {_RULE}/>'
        f'<text x="{across.start - 8:.1f}" y="{up.at(tick) + 4:.1f}" text-anchor="end" {SOFT}>{tick:.6g}</text>'
        for tick in up.ticks
    )
    return ticks + f'<text x="4" y="{TOP + 4}" {SOFT}>{_text(label)}</text>'


_RULE = 'stroke="var(--line, currentColor)" stroke-width="1" opacity=".6"'
SOFT = 'fill="var(--soft, currentColor)"'


def svg(height: float, told: str, parts: Sequence[str], width: int = WIDTH) -> str:
    """The drawing, as wide as the page lets it be; `told` is what it shows, in words."""
    return (
        f'<svg viewBox="0 0 {width} {height:.0f}" width="100%" role="img" aria-label="{_text(told)}" '
        f'fill="currentColor" style="{FONT}; max-width: {width}px">{"".join(parts)}</svg>'
    )


# ---- numbers --------------------------------------------------------------------------------------------------------


def _point(values: Sequence[float]) -> Point:
    return Point(*values) if len(values) == 4 else Point(values[0], values[1], values[1], values[1])


def _axis(
    values: Sequence[float], start: float, end: float, *, exact: bool = False, share: bool = False, powers: bool = False
) -> _Axis:
    """`exact`: from the smallest to the largest value, not to round numbers around them; `share`: values that all lie
    in [0, 1] get all of it."""
    low, high = min(values), max(values)
    if not all(map(math.isfinite, (low, high))):
        raise ValueError("a value to draw is not finite")
    if powers and low > 0 and high >= 10 * low:
        return _Axis(low, high, start, end, _powers(low, high), log=True)
    if share and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    if low == high:
        low, high = low - 0.5, high + 0.5
    step = _step(high - low)
    if not exact:
        low, high = step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9)
    first = math.ceil(low / step - 1e-9)
    ticks = [round(step * place, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]
    return _Axis(low, high, start, end, ticks)


def _step(width: float) -> float:
    """1, 2 or 5 times a power of ten, four to ten of which make the width."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(power * part for part in (0.1, 0.2, 0.5, 1.0, 2.0) if width / (power * part) <= 8)


def _powers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten from low to high, or only the powers where those would be many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    parts = (1, 2, 5) if high < 1000 * low else (1,)
    return [found for power in powers for part in parts if low <= (found := part * 10.0**power) <= high]


def _number(value: float) -> str:
    return f"{value:.3f}" if 0 < abs(value) < 1 and round(value, 2) != value else f"{value:.4g}"


def _text(value: Any) -> str:
    return escape(str(value))
