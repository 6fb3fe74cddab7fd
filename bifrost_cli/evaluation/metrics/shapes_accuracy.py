"""The built-in world's checker as a measure: does an image show what its prompt asks?

Comes in: images with prompts. Goes out: a verdict each, and the share that is right, with Wilson's intervals. Does
not know artifacts or pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bifrost_cli.data.image_sets import EvalImage, ImageSet
from bifrost_cli.errors import DataError
from bifrost_cli.evaluation.metrics.metric import Line, Metric
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.shapes.captions import CATEGORIES, parse
from bifrost_cli.shapes.checker import check
from bifrost_cli.stats import wilson


class ShapesMetric(Metric):
    """The share of images that show their prompts."""

    name, identity = "shapes", {"checker": "shapes"}

    def results(self, images: ImageSet, lines: Sequence[Line], ui: Ui) -> list[dict[str, Any]]:
        with ui.progress(len(lines), "checking pictures") as bar:
            for line, entry in zip(lines, images.entries, strict=True):
                line.update(judge(entry))
                bar.advance(1)
        return [shapes_result(lines)]

    def warnings(self, images: ImageSet, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        found, prompts = [], [line["prompt"] for line in lines if line["right"] is not None]
        if len(set(prompts)) < len(prompts):
            found.append("Some prompts occur more than once; the intervals count each image as independent.")
        if unjudged := sum(line["right"] is None for line in lines):
            found.append(
                f"{unjudged} of {len(lines)} images were not judged: their prompts are not of the built-in world."
            )
        return found


def judge(entry: EvalImage) -> dict[str, Any]:
    """The checker's verdict on one image; `right` is None when its prompt is not of the built-in world."""
    try:
        prompt = parse(entry.prompt or "")
    except ValueError:
        return {"category": None, "right": None, "why": "not judged: not a prompt of the built-in world"}
    verdict = check(prompt, entry.load())
    return {"category": prompt.category, "right": bool(verdict.right), "why": verdict.why}


def shapes_result(judged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The share of images that show what was asked, over all and by category, with Wilson's 95 % intervals.

    DataError: no image has a prompt of the built-in world.
    """
    counted = [line for line in judged if line["right"] is not None]
    if not counted:
        raise DataError(
            f"none of {len(judged)} images has a prompt of the built-in world, so the checker cannot judge them",
            fix='make some: bifrost generate "a red circle above a blue square" -o DIR; or leave out --shapes',
            code="BF-DATA-007",
        )
    table = [share(name, [line for line in counted if line["category"] == name]) for name in CATEGORIES]
    total = share("all", counted)
    low, high = total["interval95"]
    return {
        "metric": "shapes_accuracy",
        "label": "Images that show what was asked",
        "format": "share",
        **total,
        "spread": f"{total['right']} of {total['count']}, 95 %: {low:.1%} to {high:.1%}",
        "details": [],
        "n_gen": len(counted),
        "categories": [row for row in table if row],
        "not_judged": len(judged) - len(counted),
        "sentence": (
            f"By the programmatic checker: things, colours, counts, places and a named background all as asked, "
            f"{len(counted)} images of the built-in world, one judgement each."
        ),
    }


def share(name: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many of the lines are `right`, with Wilson's interval; {} for no lines."""
    if not lines:
        return {}
    right = sum(line["right"] for line in lines)
    return {
        "name": name,
        "value": right / len(lines),
        "interval95": list(wilson(right, len(lines))),
        "right": right,
        "count": len(lines),
    }
