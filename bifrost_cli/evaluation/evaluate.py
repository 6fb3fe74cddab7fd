"""eval: samples -> report. Any of the measures together, over one set of samples and one reference.

Comes in: a recipe, a set of samples (or none: the newest, else it makes one), a reference. Goes out: a report artifact
with report.json and report.html. Does not know how a number is computed or a page is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bifrost_cli.artifacts import Artifact, Draft, default_path, identity_id
from bifrost_cli.artifacts.files import write_bytes, write_json
from bifrost_cli.config.schema import Recipe
from bifrost_cli.evaluation.image_selection import ImageSelection
from bifrost_cli.evaluation.inputs import beside_originals, inputs_of, plan_of
from bifrost_cli.evaluation.networks.load_networks import DETECTOR
from bifrost_cli.evaluation.registry import load_metrics
from bifrost_cli.evaluation.report_facts import (
    SCHEMA,
    EvalInputs,
    command,
    environment,
    settings,
    warnings,
)
from bifrost_cli.evaluation.request import EvalRequest, checked
from bifrost_cli.reports.artifact_pages import lineage_plots
from bifrost_cli.reports.evaluation_page import report_html
from bifrost_cli.reports.facts import image_lines, lineage_lines, thumbnails
from bifrost_cli.runtime.ui import Ui


def evaluate(
    recipe: Recipe,
    *,
    metrics: Sequence[str] = ("fid",),
    fd: Sequence[str] = (),
    samples: Path | str | None = None,
    prompts: Path | str | None = None,
    n: int = 1,
    quarters: bool = False,
    reference: Path | str | None = None,
    detector: str = DETECTOR,
    metadata: Path | str | None = None,
    questions: Path | str | None = None,
    judge: str | None = None,
    min_samples: int | None = None,
    output: Path | str | None = None,
    workspace: Path | str = "runs",
    device: str = "auto",
    dry_run: bool = False,
    ui: Ui | None = None,
) -> Artifact | dict[str, Any]:
    """Measure samples and write a report artifact.

    `metrics`: any of MEASURES; the distances are in the features of `evaluate.features`. `fd`: further networks for a
    Frechet distance each. `samples`: a samples artifact (path or id) or a folder of images; `prompts`: a file, of
    each of whose lines `n` images are generated first; None of both takes the newest artifact made since the last
    training that has enough, and else makes a set from held-out prompts of the built-in world. With `quarters` each of
    `samples` is a grid of 2x2 images, as DPG-Bench has them, and is cut. `reference`: a folder, a
    samples artifact, a latents store (its images), a statistics file; None draws as many images of the built-in
    world as there are samples. The measure "reconstruction" generates the reference's images again from their latents,
    measures those, and adds a Frechet distance. "geneval" judges by `detector` (a folder or hub id) what `metadata`,
    the benchmark's file of prompts, asks of the images in order; a folder in its layout has its own. "dpg" puts
    DPG-Bench's `questions` (its CSV) to the recipe's MLLM, or to another `judge`. With `dry_run` the plan is returned:
    no network is loaded and nothing made.

    Errors: UsageError (nothing to measure), DataError 4 (fewer than `min_samples` images, unreadable or unjudgeable
    ones), ArtifactError 5 (damaged artifact, statistics of other features), EnvironmentProblem 3 (weights not here).
    """
    ui, bar = ui or Ui(), recipe.evaluate.min_samples if min_samples is None else min_samples
    wanted = ImageSelection(samples, prompts, n, quarters)
    request = EvalRequest(tuple(metrics), tuple(fd), wanted, reference, detector, metadata, questions, judge, bar)
    request = checked(request, recipe)
    if dry_run:
        return plan_of(recipe, request, output, workspace, ui)
    images, compared = inputs_of(recipe, request, workspace, device, ui)
    asked = EvalInputs(images, compared, load_metrics(recipe, request, images, compared, Path(workspace), device))
    identity, parents = asked.identity(), asked.parents()
    path = Path(output) if output else default_path(workspace, "report", identity_id("report", identity, parents))
    with Draft.open(path, "report", identity, parents) as draft:
        if draft.complete:
            ui.say(f"{path} holds this report already")
            return draft.complete
        report = _report(recipe, asked, bar, Path(workspace), ui)
        report["command"] = command(recipe, request.metrics, fd, images, samples, reference, bar, workspace,
                                    **request.given)  # fmt: skip
        shown = thumbnails(beside_originals(images, compared))
        write_json(draft.path / "report.json", report)
        write_bytes(draft.path / "report.html", report_html(report, shown).encode("utf-8"))
        lines = [headline(result) for result in report["results"]]
        numbers = {result["metric"]: result["value"] for result in report["results"]}
        info = {**numbers, "headline": lines, "recipe": recipe.model_dump(mode="json")}
        artifact = draft.commit(info, cost={"samples": len(images.entries)})
    for line in (*lines, *report["warnings"], f"report: {artifact.path / 'report.html'}"):
        ui.say(line)
    return artifact


def headline(result: Mapping[str, Any]) -> str:
    """A result in one line."""
    value = f"{result['value']:.1%}" if result["format"] == "share" else f"{result['value']:.4g}"
    return "; ".join([f"{result['label']}: {value} ({result['spread']})", *result["details"]])


# ---------------------------------------------------------------- the report


def _report(recipe: Recipe, asked: EvalInputs, needed: int, workspace: Path, ui: Ui) -> dict[str, Any]:
    samples, reference = asked.samples, asked.reference
    lines = image_lines(samples)
    results = [result for measure in asked.metrics for result in measure.results(samples, lines, ui)]
    return {
        "schema": SCHEMA,
        "title": "Evaluation of " + (samples.artifact.id if samples.artifact else samples.what),
        "summary": f"{len(samples.entries)} images; recipe {recipe.name}",
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
