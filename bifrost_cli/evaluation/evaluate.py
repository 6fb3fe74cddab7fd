"""Evaluate images: any metrics together, over one set of images and one reference, into a report artifact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bifrost_cli.artifacts import Artifact, Draft, default_path, identity_id
from bifrost_cli.artifacts.files import write_bytes, write_json
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.image_sets import ImageSet
from bifrost_cli.evaluation.eval_report import Evaluation, command_of, headline
from bifrost_cli.evaluation.inputs import ImageProvider, beside_originals
from bifrost_cli.evaluation.metrics.metric import Metric, MetricInputs
from bifrost_cli.evaluation.registry import report_order
from bifrost_cli.evaluation.request import EvalRequest, request_of
from bifrost_cli.reports.evaluation_page import report_html
from bifrost_cli.reports.page import thumbnails
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
    min_samples: int | None = None,
    output: Path | str | None = None,
    workspace: Path | str = "runs",
    device: str = "auto",
    dry_run: bool = False,
    ui: Ui | None = None,
    **options: Any,
) -> Artifact | dict[str, Any]:
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
    ui, workspace = ui or Ui(), Path(workspace)
    request = request_of(
        recipe.evaluate, metrics=metrics, fd=fd, samples=samples, prompts=prompts, copies=n, quarters=quarters,
        reference=reference, min_samples=min_samples, options=options,
    )  # fmt: skip
    provider = _provider(recipe, workspace, device, ui)
    if dry_run:
        return {"output": str(output or f"a new report in {workspace}"),
                "measures": [*request.metrics, *(f"fid in {ref}" for ref in request.fd)],
                "features": recipe.evaluate.features if _reads_features(request) else None,
                **provider.plan(request)}  # fmt: skip
    images, compared = provider.inputs(request)
    named = None if request.samples is None else Path(request.samples)
    inputs = MetricInputs(images, compared, request.options, named, recipe.evaluate, recipe.models, recipe.latents,
                          recipe.images, workspace, device)  # fmt: skip
    evaluation = Evaluation(images, compared, load_metrics(request.metrics, request.fd, inputs))
    identity, parents = evaluation.identity(), evaluation.parents()
    path = Path(output) if output else default_path(workspace, "report", identity_id("report", identity, parents))
    with Draft.open(path, "report", identity, parents) as draft:
        if draft.complete:
            ui.say(f"{path} holds this report already")
            return draft.complete
        command = command_of(request, recipe.evaluate, images, workspace)
        report = evaluation.report(recipe.name, request.min_samples, command, workspace, ui)
        shown = thumbnails(beside_originals(images, compared))
        pairs = "Each image: original | reconstruction." if compared and compared.originals else ""
        write_json(draft.path / "report.json", report)
        write_bytes(draft.path / "report.html", report_html(report, shown, pairs).encode("utf-8"))
        lines = [headline(result) for result in report["results"]]
        numbers = {result["metric"]: result["value"] for result in report["results"]}
        info = {**numbers, "headline": lines, "recipe": recipe.model_dump(mode="json")}
        artifact = draft.commit(info, cost={"samples": len(images.entries)})
    for line in (*lines, *report["warnings"], f"report: {artifact.path / 'report.html'}"):
        ui.say(line)
    return artifact


def load_metrics(metrics: Sequence[str], fd: Sequence[str], inputs: MetricInputs) -> tuple[Metric, ...]:
    """The metrics with their networks, in the report's order; errors as `Metric.load`."""
    from bifrost_cli.evaluation.metrics.feature_metric import FeatureSets
    from bifrost_cli.evaluation.metrics.fid import Fid

    loaded = [metric.load(inputs) for metric in report_order(metrics)]
    return (*loaded, *(Fid(FeatureSets.load(ref, inputs)) for ref in fd))


def _reads_features(request: EvalRequest) -> bool:
    return any("features" in metric.keys for metric in report_order(request.metrics))


def _provider(recipe: Recipe, workspace: Path, device: str, ui: Ui) -> ImageProvider:
    def generate(*args: Any, **options: Any) -> Any:
        from bifrost_cli.generation.generate import generate

        return generate(recipe, *args, save_latents=True, workspace=workspace, device=device, ui=ui, **options)

    def reconstruct(images: ImageSet) -> Artifact:
        from bifrost_cli.generation.reconstruct import reconstruct_set

        return reconstruct_set(recipe, images, workspace=workspace, device=device, ui=ui)

    builtin_world = recipe.models.diffusion.startswith("builtin:")
    return ImageProvider(recipe.images, workspace, recipe.name, builtin_world, generate, reconstruct, ui)
