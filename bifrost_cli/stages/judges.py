"""The measures of a wish, each with its models loaded; the order is that of the report.

Comes in: a recipe, a wish, the pictures and what they are compared with. Goes out: measures. Measures nothing itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bifrost_cli.config import Evaluate, Recipe
from bifrost_cli.data.picture_set import PictureSet
from bifrost_cli.errors import EnvironmentProblem, UsageError
from bifrost_cli.models.clip_score import ClipScorer
from bifrost_cli.stages.geneval_files import asked_of, from_layout, is_layout, read_asked
from bifrost_cli.stages.loading_clip import features_name, load_open_clip, load_tokenizer
from bifrost_cli.stages.loading_features import load_detector, load_features, load_lpips
from bifrost_cli.stages.measures.clip_score import ClipScoreMeasure
from bifrost_cli.stages.measures.distances import DistanceMeasure
from bifrost_cli.stages.measures.distribution import LAYERS
from bifrost_cli.stages.measures.measure import Measure
from bifrost_cli.stages.measures.reconstruction import ReconstructionMeasure
from bifrost_cli.stages.measures.shapes import ShapesMeasure
from bifrost_cli.stages.place import pick_device
from bifrost_cli.stages.reference import Reference
from bifrost_cli.stages.wish import Wish

if TYPE_CHECKING:
    from bifrost_cli.models.lpips import Lpips


def load_measures(
    recipe: Recipe, wish: Wish, pictures: PictureSet, compared: Reference | None, workspace: Path, device: str
) -> tuple[Measure, ...]:
    """UsageError: a measure that lacks its file. EnvironmentProblem, ArtifactError: weights that are not here or no
    weights of that kind."""
    rules, names, found = recipe.evaluate, wish.measures, []
    if "geneval" in names:
        found.append(_geneval(recipe, wish, pictures, device))
    if "dpg" in names:
        found.append(_dpg(recipe, wish, pictures, device))
    if "shapes" in names:
        found.append(ShapesMeasure())
    if "clipscore" in names:
        found.append(ClipScoreMeasure(_scorer(rules.clip, device)))
    if wish.again:
        from bifrost_cli.stages.loading import load_encoder

        encoder = load_encoder(recipe, pick_device(device))
        found.append(ReconstructionMeasure(compared.pictures, encoder, _lpips(rules, device)))
    if distances := [name for name in LAYERS if name in names]:
        found.append(DistanceMeasure(load_features(rules.features, rules, device), distances, compared, workspace))
    for ref in wish.fd:
        found.append(DistanceMeasure(load_features(ref, rules, device), ["fid"], compared, workspace))
    return tuple(found)


def _geneval(recipe: Recipe, wish: Wish, pictures: PictureSet, device: str) -> Measure:
    from bifrost_cli.models.detector import ColourNamer
    from bifrost_cli.stages.measures.geneval import GenEvalMeasure

    samples = wish.pictures.samples
    if wish.metadata is not None:
        asked = asked_of(pictures, read_asked(Path(wish.metadata)), Path(wish.metadata))
    elif samples is not None and is_layout(Path(samples)):
        asked = from_layout(Path(samples), recipe.latents)[1]
    else:
        raise UsageError("GenEval needs to know what each picture should show",
                         fix="--metadata evaluation_metadata.jsonl, the benchmark's file of prompts")  # fmt: skip
    namer = ColourNamer(_scorer(recipe.evaluate.clip, device))
    return GenEvalMeasure(load_detector(wish.detector, device), namer, asked)


def _dpg(recipe: Recipe, wish: Wish, pictures: PictureSet, device: str) -> Measure:
    from bifrost_cli.models.judge import Judge
    from bifrost_cli.stages.dpg_files import questions_of, read_questions
    from bifrost_cli.stages.loading import load_mllm
    from bifrost_cli.stages.measures.dpg import DpgMeasure

    items = questions_of(pictures, read_questions(Path(wish.questions)), Path(wish.questions))
    models, name = recipe.models, wish.judge or recipe.models.mllm
    revision = None if wish.judge else models.revision
    mllm = load_mllm(name, pick_device(device), getattr(torch, models.dtype), revision=revision)
    return DpgMeasure(Judge(mllm, name if name.startswith("builtin:") else Path(name).name), items)


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
