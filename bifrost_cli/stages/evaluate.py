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
from bifrost_cli.config import Recipe
from bifrost_cli.stages.eval_inputs import beside_originals, inputs_of, plan_of
from bifrost_cli.stages.judges import load_measures
from bifrost_cli.stages.kind_pages import lineage_plots
from bifrost_cli.stages.loading_features import DETECTOR
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
from bifrost_cli.stages.sample_set import Wanted
from bifrost_cli.stages.ui import Ui
from bifrost_cli.stages.wish import Wish, checked


def evaluate(
    recipe: Recipe,
    *,
    measures: Sequence[str] = ("fid",),
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

    `measures`: any of MEASURES; the distances are in the features of `evaluate.features`. `fd`: further networks for a
    Frechet distance each. `samples`: a samples artifact (path or id) or a folder of pictures; `prompts`: a file, of
    each of whose lines `n` pictures are painted first; None of both takes the newest artifact made since the last
    training that has enough, and else makes a set from held-out prompts of the built-in world. With `quarters` each of
    `samples` is a grid of 2x2 pictures, as DPG-Bench has them, and is cut. `reference`: a folder, a
    samples artifact, a latents store (its pictures), a statistics file; None draws as many pictures of the built-in
    world as there are samples. The measure "reconstruction" paints the reference's pictures again from their latents,
    measures those, and adds a Frechet distance. "geneval" judges by `detector` (a folder or hub id) what `metadata`,
    the benchmark's file of prompts, asks of the pictures in order; a folder in its layout has its own. "dpg" puts
    DPG-Bench's `questions` (its CSV) to the recipe's MLLM, or to another `judge`. With `dry_run` the plan is returned:
    no network is loaded and nothing made.

    Errors: UsageError (nothing to measure), DataError 4 (fewer than `min_samples` pictures, unreadable or unjudgeable
    ones), ArtifactError 5 (damaged artifact, statistics of other features), EnvironmentProblem 3 (weights not here).
    """
    ui, bar = ui or Ui(), recipe.evaluate.min_samples if min_samples is None else min_samples
    wanted = Wanted(samples, prompts, n, quarters)
    wish = Wish(tuple(measures), tuple(fd), wanted, reference, detector, metadata, questions, judge, bar)
    wish = checked(wish, recipe)
    if dry_run:
        return plan_of(recipe, wish, output, workspace, ui)
    pictures, compared = inputs_of(recipe, wish, workspace, device, ui)
    asked = Asked(pictures, compared, load_measures(recipe, wish, pictures, compared, Path(workspace), device))
    identity, parents = asked.identity(), asked.parents()
    path = Path(output) if output else default_path(workspace, "report", identity_id("report", identity, parents))
    with Draft.open(path, "report", identity, parents) as draft:
        if draft.complete:
            ui.say(f"{path} holds this report already")
            return draft.complete
        report = _report(recipe, asked, bar, Path(workspace), ui)
        report["command"] = command(recipe, wish.measures, fd, pictures, samples, reference, bar, workspace,
                                    **wish.given)  # fmt: skip
        shown = thumbnails(beside_originals(pictures, compared))
        write_json(draft.path / "report.json", report)
        write_bytes(draft.path / "report.html", report_html(report, shown).encode("utf-8"))
        lines = [headline(result) for result in report["results"]]
        numbers = {result["metric"]: result["value"] for result in report["results"]}
        info = {**numbers, "headline": lines, "recipe": recipe.model_dump(mode="json")}
        artifact = draft.commit(info, cost={"samples": len(pictures.entries)})
    for line in (*lines, *report["warnings"], f"report: {artifact.path / 'report.html'}"):
        ui.say(line)
    return artifact


def headline(result: Mapping[str, Any]) -> str:
    """A result in one line."""
    value = f"{result['value']:.1%}" if result["format"] == "share" else f"{result['value']:.4g}"
    return "; ".join([f"{result['label']}: {value} ({result['spread']})", *result["details"]])


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
