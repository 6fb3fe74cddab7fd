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
from bifrost_cli.data.picture_set import drawn
from bifrost_cli.errors import RecipeError, UsageError
from bifrost_cli.models.clip_score import ClipScorer
from bifrost_cli.models.features import FeatureNetwork
from bifrost_cli.stages.loading_clip import features_name, load_open_clip, load_tokenizer
from bifrost_cli.stages.loading_features import load_features
from bifrost_cli.stages.measures.clip_score import clip_score_results
from bifrost_cli.stages.measures.distribution import (
    LAYERS,
    WITHOUT_REFERENCE,
    distribution_results,
    require_layers,
)
from bifrost_cli.stages.measures.kept import statistics_of
from bifrost_cli.stages.measures.shapes import judge, shapes_result
from bifrost_cli.stages.reference import FLOOR_SEED, reference_for
from bifrost_cli.stages.report import report_html
from bifrost_cli.stages.report_facts import (
    SCHEMA,
    Asked,
    command,
    environment,
    lineage_lines,
    settings,
    thumbnails,
    warnings,
)
from bifrost_cli.stages.sample_set import found_samples, require_enough, samples_for
from bifrost_cli.stages.ui import Ui

MEASURES = (*LAYERS, "clipscore", "shapes")


def evaluate(
    recipe: Recipe,
    *,
    measures: Sequence[str] = ("fid",),
    fd: Sequence[str] = (),
    samples: Path | str | None = None,
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
    Frechet distance each. `samples`: a samples artifact (path or id) or a folder of pictures; None takes the newest
    artifact made since the last training that has enough, and else makes a set from held-out prompts of the built-in
    world. `reference`: a folder, a samples artifact, a statistics file; None draws as many pictures of the built-in
    world as there are samples. With `dry_run` the plan is returned: no network is loaded and nothing made.

    Errors: UsageError (nothing to measure), DataError 4 (fewer than `min_samples` pictures, unreadable or unjudgeable
    ones), ArtifactError 5 (damaged artifact, statistics of other features), EnvironmentProblem 3 (weights not here).
    """
    ui = ui or Ui()
    needed = recipe.evaluate.min_samples if min_samples is None else min_samples
    distances = _checked(recipe, measures, fd, needed)
    if dry_run:
        return _plan(recipe, measures, fd, samples, reference, needed if distances else 1, output, workspace, ui)
    pictures = samples_for(recipe, samples, needed, workspace, device, ui)
    require_enough(pictures, needed if distances else 1)
    networks = _networks(recipe, [name for name in LAYERS if name in measures], fd, device)
    compared = None
    if any(set(names) - set(WITHOUT_REFERENCE) for _, names in networks):
        compared = reference_for(recipe, reference, len(pictures.entries), workspace)
    scorer = _scorer(recipe.evaluate.clip, device) if "clipscore" in measures else None
    asked = Asked(pictures, compared, networks, scorer, "shapes" in measures)
    identity, parents = asked.identity(), asked.parents()
    path = Path(output) if output else default_path(workspace, "report", identity_id("report", identity, parents))
    with Draft.open(path, "report", identity, parents) as draft:
        if draft.complete:
            ui.say(f"{path} holds this report already")
            return draft.complete
        report = _report(recipe, asked, needed, Path(workspace), ui)
        report["command"] = command(recipe, measures, fd, pictures, samples, reference, needed, workspace)
        write_json(draft.path / "report.json", report)
        write_bytes(draft.path / "report.html", report_html(report, thumbnails(pictures.entries)).encode("utf-8"))
        lines = [headline(result) for result in report["results"]]
        numbers = {result["metric"]: result["value"] for result in report["results"]}
        info = {**numbers, "headline": lines, "recipe": recipe.model_dump(mode="json")}
        artifact = draft.commit(info, cost={"samples": len(pictures.entries)})
    for line in (*lines, *report["warnings"], f"report: {artifact.path / 'report.html'}"):
        ui.say(line)
    return artifact


def _plan(
    recipe: Recipe, measures: Sequence[str], fd: Sequence[str], samples: Path | str | None,
    reference: Path | str | None, needed: int, output: Path | str | None, workspace: Path | str, ui: Ui,
) -> dict[str, Any]:  # fmt: skip
    """What would be measured, on what, against what."""
    found = found_samples(recipe, samples, needed, workspace, ui)
    if found is not None:
        require_enough(found, needed)
    layers = [name for name in measures if name in LAYERS]
    compares = bool(fd) or bool(set(layers) - set(WITHOUT_REFERENCE))
    count = len(found.entries) if found else needed
    return {
        "output": str(output or f"a new report in {workspace}"),
        "samples": found.what if found else f"{needed} pictures of held-out prompts, made first",
        "pictures": count,
        "measures": [*measures, *(f"fid in {ref}" for ref in fd)],
        "features": recipe.evaluate.features if layers else None,
        "reference": reference_for(recipe, reference, count, workspace).what if compares else None,
    }


def headline(result: Mapping[str, Any]) -> str:
    """A result in one line."""
    value = f"{result['value']:.1%}" if result["format"] == "share" else f"{result['value']:.4g}"
    return "; ".join([f"{result['label']}: {value} ({result['spread']})", *result["details"]])


# ---------------------------------------------------------------- what is asked


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


def _networks(
    recipe: Recipe, names: list[str], fd: Sequence[str], device: str
) -> tuple[tuple[FeatureNetwork, list[str]], ...]:
    rules, asked = recipe.evaluate, []
    if names:
        network = load_features(rules.features, rules, device)
        require_layers(names, network)
        asked.append((network, names))
    return (*asked, *((load_features(ref, rules, device), ["fid"]) for ref in fd))


def _scorer(ref: str, device: str) -> ClipScorer:
    return ClipScorer(load_open_clip(ref, device), load_tokenizer(ref), features_name(ref))


# ---------------------------------------------------------------- the report


def _report(recipe: Recipe, asked: Asked, needed: int, workspace: Path, ui: Ui) -> dict[str, Any]:
    samples, reference = asked.samples, asked.reference
    judged = _judge_all(asked, ui)
    results = [shapes_result(judged)] if asked.shapes else []
    results += clip_score_results(samples, asked.scorer, ui) if asked.scorer else []
    for network, names in asked.networks:
        results += _distances(asked, network, names, workspace, ui)
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
        "pictures": judged,
        "skipped": {"unreadable": samples.skipped},
        "warnings": warnings(asked, judged),
        "settings": settings(recipe, asked, needed),
        "lineage": lineage_lines(asked, workspace),
        "env": environment(asked),
    }


def _judge_all(asked: Asked, ui: Ui) -> list[dict[str, Any]]:
    lines = [{"name": e.name, "prompt": e.prompt, "plan": e.plan, "seed": e.seed, "right": None}
             for e in asked.samples.entries]  # fmt: skip
    if not asked.shapes:
        return lines
    with ui.progress(len(lines), "checking pictures") as bar:
        for line, entry in zip(lines, asked.samples.entries, strict=True):
            line |= judge(entry)
            bar.advance(1)
    return lines


def _distances(
    asked: Asked, network: FeatureNetwork, names: list[str], workspace: Path, ui: Ui
) -> list[dict[str, Any]]:
    layers = sorted({LAYERS[name] for name in names})
    compared = sorted({LAYERS[name] for name in names if name not in WITHOUT_REFERENCE})
    made = statistics_of(asked.samples, network, layers, workspace, ui, "features of the samples")
    real, floor, reference = {}, {}, asked.reference
    if reference is not None and compared:
        real = reference.statistics(network, compared, workspace, ui)
    if reference is not None and reference.world:
        true = drawn(len(asked.samples.entries), seed=FLOOR_SEED)
        floor = statistics_of(true, network, compared, workspace, ui, "features of true pictures")
    described = reference.what if reference is not None else ""
    features = [{layer: found.features_ND for layer, found in side.items()} for side in (made, floor)]
    return distribution_results(names, network.identity, features[0], real, features[1], described)
