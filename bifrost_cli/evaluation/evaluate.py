"""Evaluate images: any metrics together, over one set of images and one reference, into a report artifact."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bifrost_cli.artifacts import Artifact, Draft, default_path, identity_id
from bifrost_cli.artifacts.files import write_bytes, write_json
from bifrost_cli.config.schema import Recipe
from bifrost_cli.evaluation.inputs import EvalRequest, ImageProvider, request_of
from bifrost_cli.evaluation.metrics.feature_metrics import Fid
from bifrost_cli.evaluation.metrics.metric import Metric, MetricInputs
from bifrost_cli.reports.artifact_pages import lineage_plots
from bifrost_cli.reports.page import flat, image_lines, lineage_lines, report_html, thumbnails
from bifrost_cli.runtime.ui import Ui

SCHEMA = "bifrost.eval/3"


def evaluate(
    recipe: Recipe, *, metrics: Sequence[str] = ("fid",), fd: Sequence[str] = (), samples: Path | str | None = None,
    prompts: Path | str | None = None, n: int = 1, quarters: bool = False, reference: Path | str | None = None,
    min_samples: int | None = None, output: Path | str | None = None, workspace: Path | str = "runs",
    device: str = "auto", dry_run: bool = False, ui: Ui | None = None, **options: Any,
) -> Artifact | dict[str, Any]:  # fmt: skip
    """Measure images and write a report artifact: report.json and report.html.

    Args:
        recipe: its evaluate section names the networks; its other sections generate what is missing.
        metrics: names of metrics; distances are in the features of `evaluate.features`.
        fd: further networks for a Frechet distance each.
        samples: a samples artifact (path or id) or a folder of images. Without it and `prompts`: the newest artifact
            since the last training that has enough images, else a new set from held-out prompts of the built-in world.
        prompts: a file, of each of whose lines `n` images are generated first.
        quarters: each of `samples` is a grid of 2x2 images, as DPG-Bench has them, and is cut.
        reference: a folder, a samples artifact, a latents store (its images), or a statistics file; None draws as many
            images of the built-in world as there are samples.
        min_samples: fewer images are refused where a distance is measured; None: `evaluate.min_samples`.
        output: the report's folder; None: a new one in the workspace.
        dry_run: return the plan; no network is loaded and nothing made.
        options: the metrics' own, such as `metadata` and `detector` of geneval, `questions` and `judge` of dpg.

    Returns:
        The report artifact, or the plan.

    Raises:
        UsageError: nothing to measure, or options that do not fit.
        DataError: too few images, or some that cannot be read or judged.
        ArtifactError: a damaged artifact, or statistics of other features.
        EnvironmentProblem: weights that are missing.
    """
    ui, workspace, settings = ui or Ui(), Path(workspace), recipe.evaluate
    request = request_of(
        settings, metrics=metrics, fd=fd, min_samples=min_samples, options=options, samples=samples, prompts=prompts,
        copies=n, quarters=quarters, reference=reference,
    )  # fmt: skip
    provider = ImageProvider(recipe, workspace, device, ui)
    if dry_run:
        reads_features = any("features" in metric.keys for metric in request.named)
        return {"output": str(output or f"a new report in {workspace}"),
                "measures": [*request.metrics, *(f"fid in {ref}" for ref in fd)],
                "features": settings.features if reads_features else None, **provider.plan(request)}  # fmt: skip
    images, compared = provider.inputs(request)
    inputs = MetricInputs(images, compared, request.options, None if samples is None else Path(samples), settings,
                          recipe.models, recipe.latents, recipe.images, workspace, device)  # fmt: skip
    loaded = [metric.load(inputs) for metric in request.named]
    loaded += [Fid.load_from(ref, inputs) for ref in request.fd]
    measures = {id(metric.identity): metric.identity for metric in loaded}  # one of those that read the same features
    identity = {
        "schema": SCHEMA, "samples": {"digest": images.digest, "n": len(images.entries)},
        "measures": list(measures.values()),
        "reference": compared and {"digest": compared.digest, "n": compared.count, "saved": compared.file is not None},
    }  # fmt: skip
    sources = (images.artifact, compared.images.artifact if compared and compared.images else None)
    parents = [source for source in sources if source is not None]
    path = Path(output) if output else default_path(workspace, "report", identity_id("report", identity, parents))
    with Draft.open(path, "report", identity, parents) as draft:
        if draft.complete:
            ui.say(f"{path} holds this report already")
            return draft.complete
        report = _report(recipe.name, request, inputs, loaded, parents, ui)
        entries, pairs = images.entries, ""
        if compared and compared.images and compared.originals:
            both = zip(entries, compared.images.entries, strict=True)
            entries = tuple(replace(made, load=lambda true=true, made=made: np.hstack([true.load(), made.load()]))
                            for made, true in both)  # fmt: skip
            pairs = "Each image: original | reconstruction."
        artifact, lines = write_report(draft, report, thumbnails(entries), pairs, recipe=recipe.model_dump(mode="json"))
    for line in (*lines, *report["warnings"], f"report: {artifact.path / 'report.html'}"):
        ui.say(line)
    return artifact


def _report(
    recipe_name: str, request: EvalRequest, inputs: MetricInputs, metrics: Sequence[Metric],
    parents: Sequence[Artifact], ui: Ui,
) -> dict[str, Any]:  # fmt: skip
    """Compute the metrics; the parts of report.json. Its settings are all that decides the numbers."""
    images, reference, lines = inputs.images, inputs.reference, image_lines(inputs.images)
    results = [result for metric in metrics for result in metric.compute(images, lines, ui)]
    warnings = [warning for metric in metrics for warning in metric.warnings(images, lines)]
    for one in (images, reference and reference.images):
        warnings += one.warnings if one else ()
    settings = {"recipe": recipe_name, "samples": images.what, "samples, sha256": images.digest}
    if reference is not None:
        settings |= {"reference": reference.what, "reference, sha256": reference.digest}
    for metric in metrics:
        settings |= metric.settings()
    if any(metric.needs_many for metric in metrics):
        settings["at least"] = f"{request.min_samples} images"
    made = images.artifact.info.get("settings") if images.artifact else None
    packages = ["torch", "numpy", "scipy", "pillow", *sorted({name for metric in metrics for name in metric.packages})]
    devices = ", ".join(sorted({metric.device for metric in metrics}))
    return {
        "title": "Evaluation of " + (images.artifact.id if images.artifact else images.what),
        "summary": f"{len(images.entries)} images; recipe {recipe_name}", "command": _command(request, inputs),
        "gen": f"sha256:{images.digest}", "ref": reference and f"sha256:{reference.digest}",
        "n_gen": len(images.entries), "n_ref": reference and (reference.count or None),
        "seeds": sorted({entry.seed for entry in images.entries if entry.seed is not None}),
        "results": results, "pictures": lines, "skipped": {"unreadable": images.skipped},
        "plots": lineage_plots(images.artifact, inputs.workspace) if images.artifact else [],
        "warnings": list(dict.fromkeys(warnings)),
        "settings": settings | {f"generate: {name}": str(value) for name, value in flat(made or {})},
        "lineage": lineage_lines(parents, inputs.workspace),
        "env": {name: version(name) for name in packages} | {"device": devices},
    }  # fmt: skip


def _command(request: EvalRequest, inputs: MetricInputs) -> str:
    """The command that makes the report again; nothing is left to a default that may change."""
    artifact = inputs.images.artifact
    words = ["bifrost", "eval", *(f"--{name}" for name in request.metrics)]
    words += [word for ref in request.fd for word in ("--fd", ref)]
    if not request.reconstructs:
        words += ["--samples", artifact.id if artifact else str(request.samples)]
    words += ["--workspace", str(inputs.workspace)]
    if request.min_samples == request.needed:
        words += ["--min-samples", str(request.min_samples)]
    for key in dict.fromkeys(key for metric in request.classes for key in metric.keys):
        if (value := getattr(inputs.settings, key)) is not None:
            words += ["--set", f"evaluate.{key}={value}"]
    words += ["--set", "latents.recursive=true"] * inputs.latents.recursive
    words += ["--reference", str(request.reference)] if request.reference is not None else []
    words += ["--quarters"] * request.quarters
    for name in dict.fromkeys(option.name for metric in request.classes for option in metric.options):
        if (value := request.options[name]) is not None:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def write_report(
    draft: Draft, parts: Mapping[str, Any], shown: Mapping[str, tuple[bytes, int]], pairs: str = "", **info: Any
) -> tuple[Artifact, list[str]]:
    """The parts of a report (what is not given is empty) as an artifact, and its results in a line each; `shown` and
    `pairs` as `report_html`."""
    report = {"schema": SCHEMA, "gen": None, "ref": None, "n_ref": None, "seeds": [], "plots": [], "warnings": [],
              "skipped": {"unreadable": 0}, "lineage": [], "env": {}, **parts}  # fmt: skip
    write_json(draft.path / "report.json", report)
    write_bytes(draft.path / "report.html", report_html(report, shown, pairs).encode("utf-8"))
    numbers, lines = {}, []
    for result in report["results"]:
        numbers[result["metric"]] = result["value"]
        value = f"{result['value']:.1%}" if result["format"] == "share" else f"{result['value']:.4g}"
        lines.append("; ".join([f"{result['label']}: {value} ({result['spread']})", *result["details"]]))
    return draft.commit({**numbers, "headline": lines, **info}, cost={"samples": report["n_gen"]}), lines
