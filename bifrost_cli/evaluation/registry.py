"""The measures of a wish, each with its models loaded; the order is that of the report.

Comes in: a recipe, a wish, the images and what they are compared with. Goes out: measures. Measures nothing itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bifrost_cli.config.schema import Evaluate, Recipe
from bifrost_cli.data.image_sets import ImageSet
from bifrost_cli.errors import EnvironmentProblem, UsageError
from bifrost_cli.evaluation.benchmarks.geneval_files import asked_of, from_layout, is_layout, read_asked
from bifrost_cli.evaluation.metrics.clip_score import ClipScoreMetric
from bifrost_cli.evaluation.metrics.distances import DistanceMetric
from bifrost_cli.evaluation.metrics.distribution import LAYERS
from bifrost_cli.evaluation.metrics.metric import Metric
from bifrost_cli.evaluation.metrics.reconstruction import ReconstructionMetric
from bifrost_cli.evaluation.metrics.shapes_accuracy import ShapesMetric
from bifrost_cli.evaluation.networks.clip_scorer import ClipScorer
from bifrost_cli.evaluation.networks.load_networks import load_detector, load_features, load_lpips
from bifrost_cli.evaluation.reference import Reference
from bifrost_cli.evaluation.request import EvalRequest
from bifrost_cli.loading.open_clip_models import features_name, load_open_clip, load_tokenizer

if TYPE_CHECKING:
    from bifrost_cli.evaluation.networks.lpips import Lpips


def load_metrics(
    recipe: Recipe, request: EvalRequest, images: ImageSet, compared: Reference | None, workspace: Path, device: str
) -> tuple[Metric, ...]:
    """UsageError: a measure that lacks its file. EnvironmentProblem, ArtifactError: weights that are not here or no
    weights of that kind."""
    rules, names, found = recipe.evaluate, request.metrics, []
    if "geneval" in names:
        found.append(_geneval(recipe, request, images, device))
    if "dpg" in names:
        found.append(_dpg(recipe, request, images, device))
    if "shapes" in names:
        found.append(ShapesMetric())
    if "clipscore" in names:
        found.append(ClipScoreMetric(_scorer(rules.clip, device)))
    if request.again:
        from bifrost_cli.loading.loaders import ModelLoader

        encoder = ModelLoader(recipe.models, device).encoder(recipe.latents, recipe.images)
        found.append(ReconstructionMetric(compared.images, encoder, _lpips(rules, device)))
    if distances := [name for name in LAYERS if name in names]:
        found.append(DistanceMetric(load_features(rules.features, rules, device), distances, compared, workspace))
    for ref in request.fd:
        found.append(DistanceMetric(load_features(ref, rules, device), ["fid"], compared, workspace))
    return tuple(found)


def _geneval(recipe: Recipe, request: EvalRequest, images: ImageSet, device: str) -> Metric:
    from bifrost_cli.evaluation.metrics.geneval import GenEvalMetric
    from bifrost_cli.evaluation.networks.detector import ColourNamer

    samples = request.images.samples
    if request.metadata is not None:
        asked = asked_of(images, read_asked(Path(request.metadata)), Path(request.metadata))
    elif samples is not None and is_layout(Path(samples)):
        asked = from_layout(Path(samples), recipe.images)[1]
    else:
        raise UsageError("GenEval needs to know what each image should show",
                         fix="--metadata evaluation_metadata.jsonl, the benchmark's file of prompts")  # fmt: skip
    namer = ColourNamer(_scorer(recipe.evaluate.clip, device))
    return GenEvalMetric(load_detector(request.detector, device), namer, asked)


def _dpg(recipe: Recipe, request: EvalRequest, images: ImageSet, device: str) -> Metric:
    from bifrost_cli.evaluation.benchmarks.dpg_files import questions_of, read_questions
    from bifrost_cli.evaluation.metrics.dpg import DpgMetric
    from bifrost_cli.evaluation.networks.vqa import VqaJudge
    from bifrost_cli.loading.loaders import ModelLoader

    items = questions_of(images, read_questions(Path(request.questions)), Path(request.questions))
    models, name = recipe.models, request.judge or recipe.models.mllm
    revision = None if request.judge else models.mllm_revision
    judge = models.model_copy(update={"mllm": name, "mllm_revision": revision, "weights": "dtype"})
    mllm = ModelLoader(judge, device).mllm()
    return DpgMetric(VqaJudge(mllm, name if name.startswith("builtin:") else Path(name).name), items)


def _lpips(rules: Evaluate, device: str) -> Lpips | str:
    """The network, or why it is left out; where the recipe names a file, that file must be there."""
    try:
        return load_lpips(rules, device)
    except EnvironmentProblem as error:
        if rules.lpips_weights:
            raise
        return f"{error.message}. {error.at}; {error.fix}"


def _scorer(ref: str, device: str) -> ClipScorer:
    return ClipScorer(load_open_clip(ref, device), load_tokenizer(ref), features_name(ref))
