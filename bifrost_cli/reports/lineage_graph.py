"""What was made from what, as an inline SVG: boxes in columns, the first material on the left.

Comes in: edges between ids (KIND-HASH). Goes out: one `<svg>` in the page's colours, which says every edge in words
too. Does not know artifacts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape as text

from bifrost_cli.reports.charts import SOFT, TOP, WIDTH, svg


def graph(edges: Sequence[tuple[str, str | None]]) -> str:
    """What was made from what, the first material on the left. `edges`: (material, what was made of it or None)."""
    into: dict[str, set[str]] = {}
    for name, made in edges:
        into.setdefault(name, set()).update({made} - {None})
    column = {name: _steps(name, into) for name in into}
    width = max(column.values()) + 1
    columns = [[name for name in into if column[name] == step] for step in range(width)]
    rows, across = max(map(len, columns)), (WIDTH - 150) / max(1, width - 1)
    place = {name: (75 + across * (width - 1 - step), TOP + 22 + 52 * (row + (rows - len(names)) / 2))
             for step, names in enumerate(columns) for row, name in enumerate(names)}  # fmt: skip
    lines_ = "".join(_edge(place[name], place[made]) for name in into for made in sorted(into[name]))
    boxes = "".join(_box(name, *where) for name, where in place.items())
    told = "; ".join(f"{made} from {name}" for name in into for made in sorted(into[name])) or ", ".join(into)
    return svg(2 * TOP + 52 * rows, told, [lines_, boxes])


def _steps(name: str, into: Mapping[str, set[str]]) -> int:
    """How many steps it is, at the most, from `name` to the last thing made."""
    return max((1 + _steps(made, into) for made in into[name]), default=0)


def _edge(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x, y), (to_x, to_y) = start, end
    bend = (x + to_x) / 2
    path = f"M{x + 70:.1f},{y:.1f} C{bend:.1f},{y:.1f} {bend:.1f},{to_y:.1f} {to_x - 70:.1f},{to_y:.1f}"
    return f'<path d="{path}" fill="none" stroke="var(--soft, currentColor)" stroke-width="1.5"/>'


def _box(name: str, x: float, y: float) -> str:
    kind, _, short = name.rpartition("-")
    return (
        f'<rect x="{x - 70:.1f}" y="{y - 20:.1f}" width="140" height="40" rx="8" fill="var(--page, none)" '
        'stroke="var(--line, currentColor)"/>'
        f'<text x="{x:.1f}" y="{y - 2:.1f}" text-anchor="middle">{text(kind)}</text>'
        f'<text x="{x:.1f}" y="{y + 14:.1f}" text-anchor="middle" {SOFT}>{text(short)}</text>'
    )
