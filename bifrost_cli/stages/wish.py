"""What eval is asked for: which measures, of which pictures, against what, judged by whom.

Comes in: what a user said. Goes out: a `Wish` that makes sense, or UsageError. Loads and reads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bifrost_cli.config import Recipe
from bifrost_cli.errors import RecipeError, UsageError
from bifrost_cli.stages.measures.distribution import LAYERS, WITHOUT_REFERENCE
from bifrost_cli.stages.sample_set import Wanted

RECONSTRUCTION, OF_PROMPTS = "reconstruction", ("clipscore", "shapes", "geneval", "dpg")
MEASURES = (*LAYERS, *OF_PROMPTS, RECONSTRUCTION)


@dataclass(frozen=True)
class Wish:
    """`measures` of MEASURES; `fd`: further networks for a Frechet distance each; `pictures`: which; `reference`: what
    they are compared with; `detector` and `metadata` are GenEval's, `questions` and `judge` DPG-Bench's; `bar`: fewer
    pictures than this are refused where a distance is measured."""

    measures: tuple[str, ...]
    fd: tuple[str, ...]
    pictures: Wanted
    reference: Path | str | None
    detector: str
    metadata: Path | str | None
    questions: Path | str | None
    judge: str | None
    bar: int

    @property
    def again(self) -> bool:
        """Whether the reference's pictures are painted again and measured."""
        return RECONSTRUCTION in self.measures

    @property
    def needed(self) -> int:
        """How many pictures there must be."""
        return self.bar if self.fd or set(self.measures) & set(LAYERS) else 1

    @property
    def compares(self) -> bool:
        """Whether a reference is needed."""
        return bool(self.fd) or bool(set(self.measures) & set(LAYERS) - set(WITHOUT_REFERENCE))

    @property
    def given(self) -> dict[str, Path | str | bool | None]:
        """Options of pictures and single measures by name, for the command that makes the report again."""
        found: dict[str, Path | str | bool | None] = {"quarters": True} if self.pictures.quarters else {}
        found |= {"detector": self.detector, "metadata": self.metadata} if "geneval" in self.measures else {}
        return found | ({"questions": self.questions, "judge": self.judge} if "dpg" in self.measures else {})


def checked(wish: Wish, recipe: Recipe) -> Wish:
    """The wish, with a distance beside reconstructions. UsageError or RecipeError for what makes no sense."""
    if unknown := [name for name in wish.measures if name not in MEASURES]:
        raise UsageError(f"there is no measure {unknown[0]}", fix=f"one of: {', '.join(MEASURES)}")
    if not (wish.measures or wish.fd):
        raise UsageError("nothing to measure", fix=f"give one or more of --{', --'.join(MEASURES)}")
    if wish.bar < 4:
        raise UsageError(f"--min-samples {wish.bar} is too small: an error of the distance needs at least 4 pictures")
    rules = recipe.evaluate
    if rules.inception_weights and rules.features != "inception" and "inception" not in wish.fd:
        raise RecipeError(
            "evaluate.inception_weights would be ignored: the features are " + rules.features,
            fix="--features inception, or leave the weights out",
            code="BF-RECIPE-005",
        )
    if "dpg" in wish.measures and wish.questions is None:
        raise UsageError("DPG-Bench asks questions, and none are given", fix="--questions dpg_bench.csv")
    if "geneval" in wish.measures and wish.pictures.quarters:
        raise UsageError("GenEval has no grids: its pictures are single ones", fix="leave out --quarters")
    return _with_distance(wish) if wish.again else wish


def _with_distance(wish: Wish) -> Wish:
    if wish.pictures.samples is not None or wish.pictures.prompts is not None:
        raise UsageError("--reconstruction paints the pictures of --reference again; it measures no others",
                         fix="leave out --samples and --prompts, or --reconstruction")  # fmt: skip
    more: Sequence[str] = () if set(wish.measures) & set(LAYERS) else ("fid",)
    return Wish(**{**wish.__dict__, "measures": (*wish.measures, *more)})
