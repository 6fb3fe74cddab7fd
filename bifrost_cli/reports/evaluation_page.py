"""The page of an evaluation or an ablation, from its report's JSON and the images to show. Measures nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bifrost_cli.reports.page import Card, Images, Page, gallery


def report_html(report: Mapping[str, Any], images: Images, pairs: str = "") -> str:
    """The page of a report.

    Args:
        report: what `report.json` holds.
        images: name -> (PNG bytes, width in px) of the entries of `report["pictures"]` that are shown.
        pairs: what stands left and right where an image is a pair ("true | predicted").

    Returns:
        HTML.
    """
    cells, count = gallery(report["pictures"], images), len(report["pictures"])
    rows = [row for result in report["results"] for row in result.get("categories", ())]
    plotted = any(plot["kind"] == "dots" and len(plot["rows"]) == len(rows) for plot in report.get("plots", ()))
    some = f"{len(cells)} of {count}, in order; none picked." if len(cells) < count else ""
    return Page(
        report["title"],
        report["summary"],
        cards=[result_card(result) for result in report["results"]],
        notes=report["warnings"],
        categories=() if plotted else rows,
        gallery=cells,
        gallery_notes=[pairs, some],
        plots=report.get("plots", ()),
        lineage=report["lineage"],
        commands={"The same again": [report["command"]]},
        folded={"By variant": {row["name"]: _share(row) for row in rows} if plotted else {},
                "Settings": report["settings"], "Measured with": report["env"]},
    ).html()  # fmt: skip


def result_card(result: Mapping[str, Any]) -> Card:
    """A result as a headline number."""
    return Card(result["label"], number(result), (result["spread"], *result["details"]), result["sentence"])


def number(result: Mapping[str, Any]) -> str:
    """A result's value as it is shown."""
    return f"{result['value']:.1%}" if result["format"] == "share" else f"{result['value']:.4g}"


def _share(row: Mapping[str, Any]) -> str:
    low, high = row["interval95"]
    return f"{row['value']:.1%}: {row['right']} of {row['count']} (95 % interval {low:.1%} to {high:.1%})"
