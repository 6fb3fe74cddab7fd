"""What every measure of `eval` is: a judge of a set of pictures, loaded once, with an identity that the report keeps.

Comes in: a picture set, and one line (a dict) a picture, in which a measure leaves its verdict. Goes out: results (see
this folder's `__init__`). Does not know artifacts, workspaces or pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bifrost_cli.data.picture_set import PictureSet
from bifrost_cli.stages.ui import Ui

Line = dict[str, Any]  # of a picture: name, prompt, plan, seed; `right`, `why` and `category` where it was judged


class Measure:
    """`identity`: JSON of all that decides the numbers beside the pictures. `needs_many`: its numbers are biased by how
    few the pictures are. `packages`: whose versions the report names; `device`: where it computed."""

    name: str
    identity: dict[str, Any]
    needs_many = False
    packages: tuple[str, ...] = ()
    device = "cpu"

    def results(self, pictures: PictureSet, lines: Sequence[Line], ui: Ui) -> list[dict[str, Any]]:
        """The results; a measure that judges single pictures also updates their `lines`."""
        raise NotImplementedError

    def settings(self) -> dict[str, str]:
        """What the report's table of settings says of it."""
        return {}

    def warnings(self, pictures: PictureSet, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        """What a reader of its numbers must know."""
        return []


def painted_from(plans: Iterable[str | None], known: bool) -> str:
    """What pictures were painted from; without a plan that is only `known` of pictures painted here."""
    if any(plan is not None for plan in plans):
        return "a plan that the MLLM wrote of each prompt"
    return "the prompts alone" if known else "what is not known: no samples artifact says so"


def plan_warnings(plans: Iterable[str | None]) -> list[str]:
    """What a reader of a benchmark's number must know of plans."""
    planned = any(plan is not None for plan in plans)
    return ["The MLLM wrote a plan for each prompt first: not the score of the prompts alone."] * planned
