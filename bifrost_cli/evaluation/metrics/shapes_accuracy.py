"""The built-in world's checker as a metric: does an image show what its prompt says?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bifrost_cli.errors import DataError
from bifrost_cli.evaluation.metrics.metric import Line, Metric, row

if TYPE_CHECKING:
    from bifrost_cli.data.image_sets import EvalImage, ImageSet
    from bifrost_cli.runtime.ui import Ui


class ShapesAccuracy(Metric):
    """The share of images that show their prompts."""

    name, help = "shapes", "Accuracy by the built-in world's checker."
    protocol = (
        "The built-in world's checker: objects, colours, counts, places and a named background are all as the prompt "
        "says, with Wilson's 95 % intervals."
    )
    gates, needs_prompts = ("shapes_accuracy",), True
    identity = {"checker": "shapes"}

    def compute(self, images: ImageSet, lines: Sequence[Line], ui: Ui) -> list[dict[str, Any]]:
        with ui.progress(len(lines), "checking images") as bar:
            for line, entry in zip(lines, images.entries, strict=True):
                line.update(judge(entry))
                bar.advance(1)
        from bifrost_cli.shapes.captions import CATEGORIES

        counted = [line for line in lines if line["right"] is not None]
        if not counted:
            raise DataError(
                f"none of {len(lines)} images has a prompt of the built-in world, so the checker cannot judge them",
                fix='make some: bifrost generate "a red circle above a blue square" -o DIR; or leave out --shapes',
                code="BF-DATA-007",
            )
        total = share("all", counted)
        low, high = total["interval95"]
        by_category = [share(name, [line for line in counted if line["category"] == name]) for name in CATEGORIES]
        return [row(
            "shapes_accuracy", "Images that show their prompt", total.pop("value"), format="share", n_gen=len(counted),
            spread=f"{total['right']} of {total['count']}, 95 %: {low:.1%} to {high:.1%}", **total,
            categories=[found for found in by_category if found], not_judged=len(lines) - len(counted),
            sentence="By the programmatic checker: objects, colours, counts, places and a named background all as the "
            f"prompt says, {len(counted)} images of the built-in world, judged once each.",
        )]  # fmt: skip

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
    """The checker's verdict on an image; `right` is None when its prompt is not of the built-in world."""
    from bifrost_cli.shapes.captions import parse
    from bifrost_cli.shapes.checker import check

    try:
        prompt = parse(entry.prompt or "")
    except ValueError:
        return {"category": None, "right": None, "why": "not judged: not a prompt of the built-in world"}
    verdict = check(prompt, entry.load())
    return {"category": prompt.category, "right": bool(verdict.right), "why": verdict.why}


def share(name: str, lines: Sequence[Mapping[str, Any]], by_prompt: bool = False) -> dict[str, Any]:
    """How many of the lines are `right`, with Wilson's interval, or one clustered by prompt; {} for no lines."""
    from bifrost_cli.stats import clustered_interval

    if not lines:
        return {}
    right = [int(line["right"]) for line in lines]
    clusters = [line["prompt"] for line in lines] if by_prompt else range(len(lines))
    return {"name": name, "value": sum(right) / len(lines), "interval95": list(clustered_interval(right, clusters)),
            "right": sum(right), "count": len(lines)}  # fmt: skip
