"""What every measure of `eval` is: a judge of a set of images, loaded once, with an identity that the report keeps.

Comes in: an image set, and one line (a dict) an image, in which a measure leaves its verdict. Goes out: results (see
this folder's `__init__`). Does not know artifacts, workspaces or pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bifrost_cli.data.image_sets import ImageSet
from bifrost_cli.runtime.ui import Ui

Line = dict[str, Any]  # of an image: name, prompt, plan, seed; `right`, `why` and `category` where it was judged


class Metric:
    """`identity`: JSON of all that decides the numbers beside the images. `needs_many`: its numbers are biased by how
    few the images are. `packages`: whose versions the report names; `device`: where it computed."""

    name: str
    identity: dict[str, Any]
    needs_many = False
    packages: tuple[str, ...] = ()
    device = "cpu"

    def results(self, images: ImageSet, lines: Sequence[Line], ui: Ui) -> list[dict[str, Any]]:
        """The results; a measure that judges single images also updates their `lines`."""
        raise NotImplementedError

    def settings(self) -> dict[str, str]:
        """What the report's table of settings says of it."""
        return {}

    def warnings(self, images: ImageSet, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        """What a reader of its numbers must know."""
        return []


def generated_from(plans: Iterable[str | None], known: bool) -> str:
    """What images were generated from; without a plan that is only `known` of images generated here."""
    if any(plan is not None for plan in plans):
        return "a plan that the MLLM wrote of each prompt"
    return "the prompts alone" if known else "what is not known: no samples artifact says so"


def plan_warnings(plans: Iterable[str | None]) -> list[str]:
    """What a reader of a benchmark's number must know of plans."""
    planned = any(plan is not None for plan in plans)
    return ["The MLLM wrote a plan for each prompt first: not the score of the prompts alone."] * planned
