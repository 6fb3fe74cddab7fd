"""What a page consists of, the page of an evaluation or an ablation, and how a page becomes one HTML file.

The file opens from disk and asks for nothing outside itself, all text in it is escaped, and its content policy admits
one line of script, which lets Escape close an enlarged image.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from bifrost_cli.artifacts import Artifact, lineage
from bifrost_cli.data.image_sets import EvalImage, ImageSet
from bifrost_cli.data.png import png_bytes
from bifrost_cli.interop.privacy import shared_command, without_places
from bifrost_cli.reports import charts

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
    links: dict[str, str] = field(default_factory=dict)
    commands: Mapping[str, Sequence[str]] = field(default_factory=dict)
    folded: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def html(self) -> str:
        """The whole file."""
        from jinja2 import Environment, PackageLoader, StrictUndefined  # only a command that writes a page pays for it

        graph = _printable(charts.lineage_graph(_edges(self.lineage), self.links)) if self.lineage else ""
        environment = Environment(
            loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined, finalize=_printable,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        environment.globals["small"] = SMALL
        filters: dict[str, Any] = {"data_uri": lambda png: "data:image/png;base64," + base64.b64encode(png).decode(),
                                   "chart": _chart, "costs": _costs}  # fmt: skip
        environment.filters |= filters
        return environment.get_template("page.html.j2").render(
            page=self._without_places(), graph=graph, policy=POLICY, script=SCRIPT,
            commands={title: map(shared_command, lines) for title, lines in self.commands.items() if lines},
        )  # fmt: skip

    def _without_places(self) -> Page:
        """The page without names of folders of this machine, but for those that are a row's own name (its key)."""
        commands = [line for lines in self.commands.values() for line in lines]

        def hidden(value: Any) -> Any:
            if isinstance(value, str):
                return without_places(value, commands)
            if isinstance(value, Mapping):
                return {key: hidden(inner) for key, inner in value.items()}
            if isinstance(value, tuple) and hasattr(value, "_make"):
                return value._make(map(hidden, value))
            return [hidden(inner) for inner in value] if isinstance(value, list | tuple) else value

        told = ("title", "summary", "cards", "tables", "notes", "facts", "folded")
        return replace(self, **{name: hidden(getattr(self, name)) for name in told})


def gallery(entries: Sequence[Mapping[str, Any]], images: Images) -> list[Cell]:
    """A cell for each entry (with its `name`) that has an image."""
    return [Cell([Shown(*images[entry["name"]])], entry) for entry in entries if entry["name"] in images]


def report_html(report: Mapping[str, Any], images: Images, pairs: str = "") -> str:
    """The page of a report: what `report.json` holds, and the images of `report["pictures"]` that are shown.

    `pairs` says what stands left and right where an image is a pair ("true | predicted").
    """
    cells, count = gallery(report["pictures"], images), len(report["pictures"])
    rows = [row for result in report["results"] for row in result.get("categories", ())]

    def share(row: Mapping[str, Any], low: float, high: float) -> str:
        return f"{row['value']:.1%}: {row['right']} of {row['count']} (95 % interval {low:.1%} to {high:.1%})"

    plotted = any(plot["kind"] == "dots" and len(plot["rows"]) == len(rows) for plot in report.get("plots", ()))
    some = f"{len(cells)} of {count}, in order; none picked." if len(cells) < count else ""
    cards = [Card(result["label"], number(result), (result["spread"], *result["details"]), result["sentence"])
             for result in report["results"]]  # fmt: skip
    return Page(
        report["title"],
        report["summary"],
        cards=cards,
        notes=report["warnings"],
        categories=() if plotted else rows,
        gallery=cells,
        gallery_notes=[pairs, some],
        plots=report.get("plots", ()),
        lineage=report["lineage"],
        commands={"The same again": [report["command"]]},
        folded={"By variant": {row["name"]: share(row, *row["interval95"]) for row in rows if plotted},
                "Settings": report["settings"], "Measured with": report["env"]},
    ).html()  # fmt: skip


def number(result: Mapping[str, Any]) -> str:
    """A result's value as it is shown."""
    return f"{result['value']:.1%}" if result["format"] == "share" else f"{result['value']:.4g}"


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as dotted names and values, sorted."""
    for key, value in sorted(settings.items()):
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def lineage_lines(artifacts: Sequence[Artifact], workspace: Path) -> list[dict[str, Any]]:
    """The artifacts and what they were made from, depth first, and what each cost; None where one is gone."""
    lines = []
    for line in (line for artifact in artifacts for line in lineage(artifact, workspace)):
        cost = None
        if line.artifact:
            manifest = line.artifact.manifest
            cost = {"device": manifest["made"].get("device"), **manifest["cost"]}
            cost.pop("stages", None)
        lines.append({"depth": line.depth, "id": line.id, "kind": line.kind, "cost": cost})
    return lines


def thumbnails(entries: Sequence[EvalImage]) -> dict[str, tuple[bytes, int]]:
    """PNG bytes and original width of the images that are shown: all, or evenly spaced ones of many."""
    shown: dict[str, tuple[bytes, int]] = {}
    few = entries and entries[0].load().shape[1] > SMALL
    for entry in entries[:: -(-len(entries) // (GALLERY_LARGE if few else GALLERY_SMALL)) or 1]:
        image = Image.fromarray(entry.load())
        width = image.width
        image.thumbnail((SMALL, SMALL))
        shown[entry.name] = (png_bytes(np.asarray(image)), width)
    return shown


def image_lines(images: ImageSet) -> list[dict[str, Any]]:
    """A line an image, not judged yet."""
    return [{"name": e.name, "prompt": e.prompt, "plan": e.plan, "seed": e.seed, "right": None}
            for e in images.entries]  # fmt: skip


def _edges(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str | None]]:
    """(material, product) of a lineage that is listed depth first; the product of a root is None."""
    edges: list[tuple[str, str | None]] = []
    above: list[str] = []
    for line in lines:
        del above[line["depth"] :]
        edges.append((line["id"], above[-1] if above else None))
        above.append(line["id"])
    return list(dict.fromkeys(edges))


def _printable(value: Any) -> Any:
    """Any value as text; bytes that are not text, and control characters, become a replacement sign."""
    if hasattr(value, "__html__"):
        return value
    plain = str(value).encode("utf-8", "replace").decode("utf-8")
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in plain)


def _chart(plot: Mapping[str, Any]) -> str:
    """What `charts` draws of a plot of a report's JSON."""
    if plot["kind"] == "dots":
        return _printable(charts.dots(plot["rows"], plot["x"]))
    if plot["kind"] == "lines":
        return _printable(charts.lines(plot["series"], plot["x"], plot["y"], powers=plot["powers"]))
    return _printable(charts.points(plot["series"], plot["x"], plot["y"]))


def _costs(lines: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """(id, cells of its row; none where it is gone) of each artifact of a lineage, once."""
    for name, cost in {line["id"]: line["cost"] for line in lines}.items():
        if cost is None:
            yield name, []
            continue
        time = hours = ""
        if (seconds := cost.get("seconds")) is not None:
            time = f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
            hours = f"{seconds / 3600 * cost.get('devices', 1):.3f}"
        yield name, [time, hours, str(cost.get("device") or ""), str(cost.get("samples", ""))]
