"""What eval is asked for: which measures, of which images, against what, judged by whom.

Comes in: what a user said. Goes out: a `EvalRequest` that makes sense, or UsageError. Loads and reads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bifrost_cli.config.schema import Recipe
from bifrost_cli.errors import RecipeError, UsageError
from bifrost_cli.evaluation.image_selection import ImageSelection
from bifrost_cli.evaluation.metrics.distribution import LAYERS, WITHOUT_REFERENCE

RECONSTRUCTION, OF_PROMPTS = "reconstruction", ("clipscore", "shapes", "geneval", "dpg")
METRICS = (*LAYERS, *OF_PROMPTS, RECONSTRUCTION)


@dataclass(frozen=True)
class EvalRequest:
    """`metrics` of MEASURES; `fd`: further networks for a Frechet distance each; `images`: which; `reference`: what
    they are compared with; `detector` and `metadata` are GenEval's, `questions` and `judge` DPG-Bench's; `bar`: fewer
    images than this are refused where a distance is measured."""

    metrics: tuple[str, ...]
    fd: tuple[str, ...]
    images: ImageSelection
    reference: Path | str | None
    detector: str
    metadata: Path | str | None
    questions: Path | str | None
    judge: str | None
    bar: int

    @property
    def again(self) -> bool:
        """Whether the reference's images are reconstructed and measured."""
        return RECONSTRUCTION in self.metrics

    @property
    def needed(self) -> int:
        """How many images there must be."""
        return self.bar if self.fd or set(self.metrics) & set(LAYERS) else 1

    @property
    def compares(self) -> bool:
        """Whether a reference is needed."""
        return bool(self.fd) or bool(set(self.metrics) & set(LAYERS) - set(WITHOUT_REFERENCE))

    @property
    def given(self) -> dict[str, Path | str | bool | None]:
        """Options of images and single measures by name, for the command that makes the report again."""
        found: dict[str, Path | str | bool | None] = {"quarters": True} if self.images.quarters else {}
        found |= {"detector": self.detector, "metadata": self.metadata} if "geneval" in self.metrics else {}
        return found | ({"questions": self.questions, "judge": self.judge} if "dpg" in self.metrics else {})


def checked(request: EvalRequest, recipe: Recipe) -> EvalRequest:
    """The wish, with a distance beside reconstructions. UsageError or RecipeError for what makes no sense."""
    if unknown := [name for name in request.metrics if name not in METRICS]:
        raise UsageError(f"there is no measure {unknown[0]}", fix=f"one of: {', '.join(METRICS)}")
    if not (request.metrics or request.fd):
        raise UsageError("nothing to measure", fix=f"give one or more of --{', --'.join(METRICS)}")
    if request.bar < 4:
        raise UsageError(
            f"--min-samples {request.bar} is too small: an error of the distance needs at least 4 pictures"
        )
    rules = recipe.evaluate
    if rules.inception_weights and rules.features != "inception" and "inception" not in request.fd:
        raise RecipeError(
            "evaluate.inception_weights would be ignored: the features are " + rules.features,
            fix="--features inception, or leave the weights out",
            code="BF-RECIPE-005",
        )
    if "dpg" in request.metrics and request.questions is None:
        raise UsageError("DPG-Bench asks questions, and none are given", fix="--questions dpg_bench.csv")
    if "geneval" in request.metrics and request.images.quarters:
        raise UsageError("GenEval has no grids: its images are single ones", fix="leave out --quarters")
    return _with_distance(request) if request.again else request


def _with_distance(request: EvalRequest) -> EvalRequest:
    if request.images.samples is not None or request.images.prompts is not None:
        raise UsageError("--reconstruction generates the images of --reference again; it measures no others",
                         fix="leave out --samples and --prompts, or --reconstruction")  # fmt: skip
    more: Sequence[str] = () if set(request.metrics) & set(LAYERS) else ("fid",)
    return EvalRequest(**{**request.__dict__, "metrics": (*request.metrics, *more)})
