"""eval: samples -> report. Any of the measures together, over one set of samples and one reference.

Comes in: a recipe, a set of samples (or none: the newest, else it makes one), a reference. Goes out: a report artifact
with report.json and report.html. Does not know how a number is computed or a page is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bifrost_cli.artifacts import Artifact, Draft, default_path, identity_id
from bifrost_cli.artifacts.files import write_bytes, write_json
from bifrost_cli.config import Evaluate, Recipe
from bifrost_cli.data.picture_set import Entry, PictureSet, from_samples
from bifrost_cli.errors import EnvironmentProblem, RecipeError, UsageError
from bifrost_cli.models.clip_score import ClipScorer
from bifrost_cli.stages.kind_pages import lineage_plots
from bifrost_cli.stages.loading_clip import features_name, load_open_clip, load_tokenizer
from bifrost_cli.stages.loading_features import load_features, load_lpips
from bifrost_cli.stages.measures.clip_score import ClipScoreMeasure
from bifrost_cli.stages.measures.distances import DistanceMeasure
from bifrost_cli.stages.measures.distribution import LAYERS, WITHOUT_REFERENCE
from bifrost_cli.stages.measures.measure import Measure
from bifrost_cli.stages.measures.reconstruction import ReconstructionMeasure
from bifrost_cli.stages.measures.shapes import ShapesMeasure
from bifrost_cli.stages.place import pick_device
from bifrost_cli.stages.prompts import read_prompts
from bifrost_cli.stages.reference import Reference, originals_for, reference_for
from bifrost_cli.stages.report import report_html
from bifrost_cli.stages.report_facts import (
    SCHEMA,
    Asked,
    command,
    environment,
    lineage_lines,
    picture_lines,
    settings,
    thumbnails,
    warnings,
)
from bifrost_cli.stages.sample_set import Wanted, found_samples, require_enough, require_one_kind, samples_for
from bifrost_cli.stages.ui import Ui

if TYPE_CHECKING:
    from bifrost_cli.models.lpips import Lpips

RECONSTRUCTION, OF_PROMPTS = "reconstruction", ("clipscore", "shapes")
MEASURES = (*LAYERS, *OF_PROMPTS, RECONSTRUCTION)


def evaluate(
    recipe: Recipe,
    *,
    measures: Sequence[str] = ("fid",),
    fd: Sequence[str] = (),
    samples: Path | str | None = None,
    prompts: Path | str | None = None,
    n: int = 1,
    reference: Path | str | None = None,
    min_samples: int | None = None,
    output: Path | str | None = None,
    workspace: Path | str = "runs",
    device: str = "auto",
    dry_run: bool = False,
    ui: Ui | None = None,
) -> Artifact | dict[str, Any]:
    """Measure samples and write a report artifact.

    `measures`: any of MEASURES; the distances are in the features of `evaluate.features`. `fd`: further networks for a
    Frechet distance each. `samples`: a samples artifact (path or id) or a folder of pictures; `prompts`: a file, of
    each of whose lines `n` pictures are painted first; None of both takes the newest artifact made since the last
    training that has enough, and else makes a set from held-out prompts of the built-in world. `reference`: a folder, a
    samples artifact, a latents store (its pictures), a statistics file; None draws as many pictures of the built-in
    world as there are samples. The measure "reconstruction" paints the reference's pictures again from their latents,
    measures those, and adds a Frechet distance. With `dry_run` the plan is returned: no network is loaded and nothing
    made.

    Errors: UsageError (nothing to measure), DataError 4 (fewer than `min_samples` pictures, unreadable or unjudgeable
    ones), ArtifactError 5 (damaged artifact, statistics of other features), EnvironmentProblem 3 (weights not here).
    """
    ui, wanted = ui or Ui(), Wanted(samples, prompts, n)
    needed = recipe.evaluate.min_samples if min_samples is None else min_samples
    measures = _with_distance(measures, wanted)
    needed_here = needed if _checked(recipe, measures, fd, needed) else 1
    if dry_run:
        return _plan(recipe, measures, fd, wanted, reference, needed_here, output, workspace, ui)
    pictures, compared = _inputs(recipe, measures, fd, wanted, reference, needed_here, workspace, device, ui)
    asked = Asked(pictures, compared, _measures(recipe, measures, fd, compared, Path(workspace), device))
    identity, parents = asked.identity(), asked.parents()
    path = Path(output) if output else default_path(workspace, "report", identity_id("report", identity, parents))
    with Draft.open(path, "report", identity, parents) as draft:
        if draft.complete:
            ui.say(f"{path} holds this report already")
            return draft.complete
        report = _report(recipe, asked, needed, Path(workspace), ui)
        report["command"] = command(recipe, measures, fd, pictures, samples, reference, needed, workspace)
        shown = thumbnails(_beside_originals(pictures, compared))
        write_json(draft.path / "report.json", report)
        write_bytes(draft.path / "report.html", report_html(report, shown).encode("utf-8"))
        lines = [headline(result) for result in report["results"]]
        numbers = {result["metric"]: result["value"] for result in report["results"]}
        info = {**numbers, "headline": lines, "recipe": recipe.model_dump(mode="json")}
        artifact = draft.commit(info, cost={"samples": len(pictures.entries)})
    for line in (*lines, *report["warnings"], f"report: {artifact.path / 'report.html'}"):
        ui.say(line)
    return artifact


def _plan(
    recipe: Recipe, measures: Sequence[str], fd: Sequence[str], wanted: Wanted, reference: Path | str | None,
    needed: int, output: Path | str | None, workspace: Path | str, ui: Ui,
) -> dict[str, Any]:  # fmt: skip
    """What would be measured, on what, against what."""
    plan = {
        "output": str(output or f"a new report in {workspace}"),
        "measures": [*measures, *(f"fid in {ref}" for ref in fd)],
        "features": recipe.evaluate.features if any(name in LAYERS for name in measures) else None,
    }
    if RECONSTRUCTION in measures:
        originals = originals_for(recipe, reference, needed, workspace)
        return {**plan, "samples": f"reconstructions of {originals.what}, made first", "pictures": originals.count,
                "reference": originals.what}  # fmt: skip
    if wanted.prompts is not None:
        count = len(read_prompts(Path(wanted.prompts), ui)) * wanted.copies
        told = f"{count} pictures of {wanted.prompts}, made first where they are not there"
    else:
        found = found_samples(recipe, wanted.samples, needed, workspace, ui)
        if found is not None:
            require_enough(found, needed)
        count = len(found.entries) if found else needed
        told = found.what if found else f"{needed} pictures of held-out prompts, made first"
    compared = reference_for(recipe, reference, count, workspace).what if _compares(measures, fd) else None
    return {**plan, "samples": told, "pictures": count, "reference": compared}


def _inputs(
    recipe: Recipe, measures: Sequence[str], fd: Sequence[str], wanted: Wanted, reference: Path | str | None,
    needed: int, workspace: Path | str, device: str, ui: Ui,
) -> tuple[PictureSet, Reference | None]:  # fmt: skip
    """What is measured, and what it is compared with; what is not there is made."""
    if RECONSTRUCTION in measures:
        from bifrost_cli.stages.reconstruct_set import reconstruct_set  # and with it the painter's library

        compared = originals_for(recipe, reference, needed, workspace)
        require_enough(compared.pictures, needed)
        made = reconstruct_set(recipe, compared.pictures, workspace=workspace, device=device, ui=ui)
        return from_samples(made, recipe.latents), compared
    pictures = samples_for(recipe, wanted, needed, workspace, device, ui)
    require_enough(pictures, needed)
    if set(measures) & set(OF_PROMPTS):
        require_one_kind(pictures)
    if not _compares(measures, fd):
        return pictures, None
    return pictures, reference_for(recipe, reference, len(pictures.entries), workspace)


def _beside_originals(pictures: PictureSet, compared: Reference | None) -> Sequence[Entry]:
    """The pictures as the report shows them: reconstructions on the right of their originals."""
    if compared is None or not compared.originals:
        return pictures.entries
    pairs = zip(pictures.entries, compared.pictures.entries, strict=True)
    return [replace(made, load=partial(_side_by_side, true, made)) for made, true in pairs]


def _side_by_side(left: Entry, right: Entry) -> np.ndarray:
    return np.concatenate([left.load(), right.load()], axis=1)


def headline(result: Mapping[str, Any]) -> str:
    """A result in one line."""
    value = f"{result['value']:.1%}" if result["format"] == "share" else f"{result['value']:.4g}"
    return "; ".join([f"{result['label']}: {value} ({result['spread']})", *result["details"]])


# ---------------------------------------------------------------- what is asked


def _with_distance(measures: Sequence[str], wanted: Wanted) -> Sequence[str]:
    """Reconstructions are also measured by the distance to their originals. UsageError: other pictures are named."""
    if RECONSTRUCTION not in measures:
        return measures
    if wanted.samples is not None or wanted.prompts is not None:
        raise UsageError("--reconstruction paints the pictures of --reference again; it measures no others",
                         fix="leave out --samples and --prompts, or --reconstruction")  # fmt: skip
    return measures if set(measures) & set(LAYERS) else [*measures, "fid"]


def _checked(recipe: Recipe, measures: Sequence[str], fd: Sequence[str], needed: int) -> bool:
    """Whether a distance is asked for. UsageError for what makes no sense."""
    if unknown := [name for name in measures if name not in MEASURES]:
        raise UsageError(f"there is no measure {unknown[0]}", fix=f"one of: {', '.join(MEASURES)}")
    if not (measures or fd):
        raise UsageError("nothing to measure", fix=f"give one or more of --{', --'.join(MEASURES)}")
    if needed < 4:
        raise UsageError(f"--min-samples {needed} is too small: an error of the distance needs at least 4 pictures")
    if recipe.evaluate.inception_weights and recipe.evaluate.features != "inception" and "inception" not in fd:
        raise RecipeError(
            "evaluate.inception_weights would be ignored: the features are " + recipe.evaluate.features,
            fix="--features inception, or leave the weights out",
            code="BF-RECIPE-005",
        )
    return bool(fd) or any(name in LAYERS for name in measures)


def _compares(measures: Sequence[str], fd: Sequence[str]) -> bool:
    """Whether a reference is needed."""
    return bool(fd) or bool(set(measures) & set(LAYERS) - set(WITHOUT_REFERENCE))


def _measures(
    recipe: Recipe, names: Sequence[str], fd: Sequence[str], reference: Reference | None, workspace: Path, device: str
) -> tuple[Measure, ...]:
    """What was asked for, each with its models loaded; the order is that of the report."""
    rules, found = recipe.evaluate, []
    if "shapes" in names:
        found.append(ShapesMeasure())
    if "clipscore" in names:
        found.append(ClipScoreMeasure(_scorer(rules.clip, device)))
    if RECONSTRUCTION in names:
        from bifrost_cli.stages.loading import load_encoder

        found.append(ReconstructionMeasure(reference.pictures, load_encoder(recipe, pick_device(device)),
                                           _lpips(rules, device)))  # fmt: skip
    if distances := [name for name in LAYERS if name in names]:
        found.append(DistanceMeasure(load_features(rules.features, rules, device), distances, reference, workspace))
    for ref in fd:
        found.append(DistanceMeasure(load_features(ref, rules, device), ["fid"], reference, workspace))
    return tuple(found)


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


# ---------------------------------------------------------------- the report


def _report(recipe: Recipe, asked: Asked, needed: int, workspace: Path, ui: Ui) -> dict[str, Any]:
    samples, reference = asked.samples, asked.reference
    lines = picture_lines(samples)
    results = [result for measure in asked.measures for result in measure.results(samples, lines, ui)]
    return {
        "schema": SCHEMA,
        "title": "Evaluation of " + (samples.artifact.id if samples.artifact else samples.what),
        "summary": f"{len(samples.entries)} pictures; recipe {recipe.name}",
        "gen": f"sha256:{samples.digest}",
        "ref": None if reference is None else f"sha256:{reference.digest}",
        "n_gen": len(samples.entries),
        "n_ref": None if reference is None else reference.count or None,
        "seeds": sorted({entry.seed for entry in samples.entries if entry.seed is not None}),
        "results": results,
        "pictures": lines,
        "plots": lineage_plots(samples.artifact, workspace) if samples.artifact else [],
        "skipped": {"unreadable": samples.skipped},
        "warnings": warnings(asked, lines),
        "settings": settings(recipe, asked, needed),
        "lineage": lineage_lines(asked.parents(), workspace),
        "env": environment(asked),
    }
