"""The built-in world's checker as a measure: does a picture show what its prompt asks?

Comes in: pictures with prompts. Goes out: a verdict each, and the share that is right, with Wilson's intervals. Does
not know artifacts or pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bifrost_cli.data.picture_set import Entry
from bifrost_cli.errors import DataError
from bifrost_cli.maths.intervals import wilson
from bifrost_cli.shapes.captions import CATEGORIES, parse
from bifrost_cli.shapes.checker import check


def judge(entry: Entry) -> dict[str, Any]:
    """The checker's verdict on one picture; `right` is None when its prompt is not of the built-in world."""
    try:
        prompt = parse(entry.prompt or "")
    except ValueError:
        return {"category": None, "right": None, "why": "not judged: not a prompt of the built-in world"}
    verdict = check(prompt, entry.load())
    return {"category": prompt.category, "right": bool(verdict.right), "why": verdict.why}


def shapes_result(judged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The share of pictures that show what was asked, over all and by category, with Wilson's 95 % intervals.

    DataError: no picture has a prompt of the built-in world.
    """
    counted = [line for line in judged if line["right"] is not None]
    if not counted:
        raise DataError(
            f"none of {len(judged)} pictures has a prompt of the built-in world, so the checker cannot judge them",
            fix='make some: bifrost generate "a red circle above a blue square" -o DIR; or leave out --shapes',
            code="BF-DATA-007",
        )
    table = [share(name, [line for line in counted if line["category"] == name]) for name in CATEGORIES]
    total = share("all", counted)
    low, high = total["interval95"]
    return {
        "metric": "shapes_accuracy",
        "label": "Pictures that show what was asked",
        "format": "share",
        **total,
        "spread": f"{total['right']} of {total['count']}, 95 %: {low:.1%} to {high:.1%}",
        "details": [],
        "n_gen": len(counted),
        "categories": [row for row in table if row],
        "not_judged": len(judged) - len(counted),
        "sentence": (
            f"By the programmatic checker: things, colours, counts, places and a named background all as asked, "
            f"{len(counted)} pictures of the built-in world, one judgement each."
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
