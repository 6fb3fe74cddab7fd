"""The report of an evaluation or an ablation as one page.

Comes in: the report's JSON value and the bytes of the images to show. Goes out: HTML. Does not know how anything was
measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bifrost_cli.reports.charts import dots, lines, points
from bifrost_cli.reports.page import (
    Images,
    card,
    cards,
    command,
    facts,
    gallery,
    lineage,
    note,
    page,
    plot,
    section,
    text,
)

_DRAWN = {"dots": lambda found: dots(found["rows"], found["x"]),
          "lines": lambda found: lines(found["series"], found["x"], found["y"], powers=found["powers"]),
          "points": lambda found: points(found["series"], found["x"], found["y"])}  # fmt: skip


def report_html(report: Mapping[str, Any], images: Images) -> str:
    """The page. `images`: name -> (PNG bytes, width in px) of the entries of `report["pictures"]` that are shown."""
    return page(report["title"], report["summary"], [
        cards([_card(result) for result in report["results"]]),
        *map(note, report["warnings"]),
        *(_categories(result["categories"]) for result in report["results"] if "categories" in result),
        plots(report.get("plots", ())),
        gallery(report["pictures"], images),
        section("Settings", facts(report["settings"])),
        lineage(report["lineage"]),
        section("The same again", command(report["command"])),
        section("Measured with", facts(report["env"])),
    ])  # fmt: skip


def plots(found: Sequence[Mapping[str, Any]]) -> str:
    """Plots of a report's JSON: `kind` (dots, lines or points), `title`, `caption`, and what `charts` draws of it."""
    drawn = "".join(f'<div class="{text(one["kind"])}"><h3>{text(one["title"])}</h3>'
                    f'{plot(_DRAWN[one["kind"]](one), one["caption"])}</div>' for one in found)  # fmt: skip
    return section("Plots", drawn and f'<div class="plots">{drawn}</div>')


def number(result: Mapping[str, Any]) -> str:
    """A result's value as it is shown."""
    return f"{result['value']:.1%}" if result["format"] == "share" else f"{result['value']:.4g}"


def _card(result: Mapping[str, Any]) -> str:
    return card(result["label"], number(result), (result["spread"], *result["details"]), result["sentence"])


def _categories(categories: Sequence[Mapping[str, Any]]) -> str:
    rows = ['<tr><th scope="col">Category</th><th scope="col">Right</th><th scope="col">95 % interval</th></tr>']
    for row in categories:
        low, high = row["interval95"]
        bar = (
            f'<div class="plot"><i style="left:{low:.2%};width:{high - low:.2%}"></i>'
            f'<b style="left:{row["value"]:.2%}"></b></div>'
        )
        rows.append(
            f'<tr><th scope="row">{text(row["name"].replace("_", " "))}</th><td>{row["value"]:.1%}<br>'
            f'<span class="soft">{row["right"]} of {row["count"]}</span></td>'
            f'<td>{bar}<span class="soft">{low:.1%} to {high:.1%}</span></td></tr>'
        )
    return section("By category", f'<div class="wide"><table>{"".join(rows)}</table></div>')
