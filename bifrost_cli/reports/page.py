"""What a page consists of, and how it becomes one HTML file that opens from disk.

A `Page` is filled by the modules beside this one and rendered by `templates/page.html.j2`. The file asks for nothing
outside itself, all text in it is escaped, and its content policy admits one line of script, which lets Escape close an
enlarged image.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from bifrost_cli.artifacts import Artifact, lineage
from bifrost_cli.data.image_sets import EvalImage, ImageSet
from bifrost_cli.data.png import png_bytes
from bifrost_cli.reports import charts

if TYPE_CHECKING:
    from jinja2 import Environment

SMALL = 256  # px: narrower images are enlarged with square pixels; larger ones are shown at this size
GALLERY_SMALL, GALLERY_LARGE = 240, 48  # images shown of many small and large ones
SCRIPT = (
    'addEventListener("keydown",e=>{if(e.key=="Escape")document.querySelectorAll(".gallery details[open]")'
    ".forEach(d=>{d.open=false;d.firstElementChild.focus()})})"
)
_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'"
Images = Mapping[str, tuple[bytes, int]]  # name -> (PNG bytes, width in px)


class Card(NamedTuple):
    """A headline number, its uncertainty, and a sentence on what it is."""

    label: str
    number: str
    lines: Sequence[str] = ()
    sentence: str = ""


class Table(NamedTuple):
    """Rows under column headings; the first cell of a row is its name. Without rows the page says `empty`, if given."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    empty: str = ""


class Shown(NamedTuple):
    """An image of a gallery; `label` tells it from its neighbours in the same cell."""

    png: bytes
    width: int
    label: str = ""


class Cell(NamedTuple):
    """A cell of a gallery: one image, or several side by side, and `entry` (prompt, plan, seed, right, why, name)."""

    images: Sequence[Shown]
    entry: Mapping[str, Any]


@dataclass
class Page:
    """The content of a page in the order in which it is shown; what is empty is left out."""

    title: str
    summary: str
    cards: Sequence[Card] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    categories: Sequence[Mapping[str, Any]] = ()
    gallery: Sequence[Cell] = ()
    gallery_title: str = "Images"
    gallery_notes: Sequence[str] = ()
    gallery_wide: bool = False
    plots: Sequence[Mapping[str, Any]] = ()
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    lineage: Sequence[Mapping[str, Any]] = ()
    links: Mapping[str, str] = field(default_factory=dict)
    commands: Mapping[str, Sequence[str]] = field(default_factory=dict)
    folded: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def html(self) -> str:
        """The whole file."""
        graph = _printable(charts.lineage_graph(lineage_edges(self.lineage), self.links)) if self.lineage else ""
        return _environment().get_template("page.html.j2").render(page=self, graph=graph, policy=POLICY, script=SCRIPT)


def gallery(entries: Sequence[Mapping[str, Any]], images: Images) -> list[Cell]:
    """A cell for each entry (with its `name`) that has an image."""
    return [Cell([Shown(*images[entry["name"]])], entry) for entry in entries if entry["name"] in images]


# ---- what pages say of artifacts and images -------------------------------------------------------------------------


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as dotted names and values, sorted."""
    for key, value in sorted(settings.items()):
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def lineage_lines(artifacts: Sequence[Artifact], workspace: Path) -> list[dict[str, Any]]:
    """The artifacts and what they were made from, depth first, and what each cost; None where one is gone."""
    lines = [line for artifact in artifacts for line in lineage(artifact, workspace)]
    return [{"depth": line.depth, "id": line.id, "kind": line.kind, "cost": _cost_of(line.artifact)} for line in lines]


def _cost_of(artifact: Artifact | None) -> dict[str, Any] | None:
    if artifact is None:
        return None
    cost, made = artifact.manifest["cost"], artifact.manifest["made"]
    return {"device": made.get("device"), **{key: value for key, value in cost.items() if key != "stages"}}


def thumbnails(entries: Sequence[EvalImage]) -> dict[str, tuple[bytes, int]]:
    """PNG bytes and original width of the images that are shown: all, or evenly spaced ones of many."""
    width = entries[0].load().shape[1]
    step = -(-len(entries) // (GALLERY_SMALL if width <= SMALL else GALLERY_LARGE))
    return {entry.name: _thumbnail(entry.load()) for entry in entries[::step]}


def _thumbnail(rgb: np.ndarray) -> tuple[bytes, int]:
    image = Image.fromarray(rgb)
    image.thumbnail((SMALL, SMALL))
    return png_bytes(np.asarray(image)), rgb.shape[1]


def image_lines(images: ImageSet) -> list[dict[str, Any]]:
    """A line an image, not judged yet."""
    return [{"name": e.name, "prompt": e.prompt, "plan": e.plan, "seed": e.seed, "right": None}
            for e in images.entries]  # fmt: skip


def lineage_edges(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str | None]]:
    """(material, product) of a lineage that is listed depth first; the product of a root is None."""
    edges: list[tuple[str, str | None]] = []
    above: list[str] = []
    for line in lines:
        del above[line["depth"] :]
        edges.append((line["id"], above[-1] if above else None))
        above.append(line["id"])
    return list(dict.fromkeys(edges))


# ---- jinja ----------------------------------------------------------------------------------------------------------


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # only a command that writes a page pays for it

    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["small"] = SMALL
    environment.filters |= {"data_uri": _data_uri, "chart": _chart, "costs": _costs}
    return environment


def _printable(value: Any) -> Any:
    """Any value as text; bytes that are not text, and control characters, become a replacement sign."""
    if hasattr(value, "__html__"):
        return value
    plain = str(value).encode("utf-8", "replace").decode("utf-8")
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in plain)


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _chart(plot: Mapping[str, Any]) -> str:
    """The drawing of a plot of a report's JSON: `kind` (dots, lines or points) and what `charts` draws of it."""
    if plot["kind"] == "dots":
        svg = charts.dots(plot["rows"], plot["x"])
    elif plot["kind"] == "lines":
        svg = charts.lines(plot["series"], plot["x"], plot["y"], powers=plot["powers"])
    else:
        svg = charts.points(plot["series"], plot["x"], plot["y"])
    return _printable(svg)


def _costs(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(id, cells of its row; none where it is gone) of each artifact of a lineage, once."""
    return [(name, _cost(cost)) for name, cost in {line["id"]: line["cost"] for line in lines}.items()]


def _cost(cost: Mapping[str, Any] | None) -> list[str]:
    if cost is None:
        return []
    seconds = cost.get("seconds")
    time = "" if seconds is None else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
    hours = "" if seconds is None else f"{seconds / 3600 * cost.get('devices', 1):.3f}"
    return [time, hours, str(cost.get("device") or ""), str(cost.get("samples", ""))]
