"""eval: samples -> report. Frechet distance to a reference, and the checker's accuracy by category.

Comes in: a recipe, a set of samples (or none: the newest, else it makes one), a reference. Goes out: a report artifact
with report.json and report.html. Does not know how a number is computed or a page is written.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image

from bifrost_cli.artifacts import Artifact, Draft, default_path, identity_id, lineage
from bifrost_cli.artifacts.files import write_bytes, write_json
from bifrost_cli.config import Recipe
from bifrost_cli.data.picture_set import Entry, PictureSet, drawn
from bifrost_cli.data.png import png_bytes
from bifrost_cli.errors import UsageError
from bifrost_cli.models.features import FeatureNetwork
from bifrost_cli.stages.loading_clip import load_features
from bifrost_cli.stages.measure import PROTOCOL, distance_result, headline, judge, set_features, shapes_result
from bifrost_cli.stages.reference import FLOOR_SEED, Reference, reference_for
from bifrost_cli.stages.report import SMALL, report_html
from bifrost_cli.stages.sample_set import require_enough, samples_for
from bifrost_cli.stages.ui import Ui

SCHEMA = "bifrost.eval/1"
GALLERY_SMALL, GALLERY_LARGE = 240, 48  # pictures shown


@dataclass(frozen=True)
class _Asked:
    """What the report is made of; together it is the report's identity."""

    samples: PictureSet
    reference: Reference | None
    network: FeatureNetwork | None
    shapes: bool

    def identity(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "samples": {"digest": self.samples.digest, "n": len(self.samples.entries)},
            "reference": None if self.reference is None else self.reference.identity,
            "features": None if self.network is None else self.network.identity,
            "protocol": None if self.network is None else PROTOCOL,
            "shapes": self.shapes,
        }

    def parents(self) -> list[Artifact]:
        sets = [self.samples, self.reference.pictures if self.reference else None]
        return [pictures.artifact for pictures in sets if pictures is not None and pictures.artifact is not None]


def evaluate(
    recipe: Recipe,
    *,
    samples: Path | str | None = None,
    reference: Path | str | None = None,
    fid: bool = True,
    shapes: bool = False,
    min_samples: int | None = None,
    output: Path | str | None = None,
    workspace: Path | str = "runs",
    device: str = "auto",
    ui: Ui | None = None,
) -> Artifact:
    """Measure samples and write a report artifact.

    `samples`: a samples artifact (path or id) or a folder of pictures; None takes the newest artifact made since the
    last training that has enough, and else makes a set from held-out prompts of the built-in world. `reference`: a
    folder, a samples artifact, a saved statistics file; None draws as many pictures of the built-in world as there are
    samples.

    Errors: UsageError (nothing to measure), DataError 4 (fewer than `min_samples` pictures, unreadable or unjudgeable
    ones), ArtifactError 5 (damaged artifact, statistics of other features).
    """
    ui = ui or Ui()
    needed = recipe.evaluate.min_samples if min_samples is None else min_samples
    if not (fid or shapes):
        raise UsageError("nothing to measure", fix="give --fid, --shapes, or both")
    if needed < 4:
        raise UsageError(f"--min-samples {needed} is too small: an error of the distance needs at least 4 pictures")
    pictures = samples_for(recipe, samples, needed, workspace, device, ui)
    require_enough(pictures, needed if fid else 1)
    network = load_features(recipe.evaluate.features, device) if fid else None
    compared = reference_for(recipe, reference, len(pictures.entries), workspace) if fid else None
    asked = _Asked(pictures, compared, network, shapes)
    identity, parents = asked.identity(), asked.parents()
    path = Path(output) if output else default_path(workspace, "report", identity_id("report", identity, parents))
    with Draft.open(path, "report", identity, parents) as draft:
        if draft.complete:
            ui.say(f"{path} holds this report already")
            return draft.complete
        report = _report(recipe, asked, needed, Path(workspace), ui)
        report["command"] = _command(recipe, asked, samples, reference, needed, workspace)
        write_json(draft.path / "report.json", report)
        write_bytes(draft.path / "report.html", report_html(report, _thumbnails(pictures.entries)).encode("utf-8"))
        lines = [headline(result) for result in report["results"]]
        numbers = {result["metric"]: result["value"] for result in report["results"]}
        info = {**numbers, "headline": lines, "recipe": recipe.model_dump(mode="json")}
        artifact = draft.commit(info, cost={"samples": len(pictures.entries)})
    for line in (*lines, *report["warnings"], f"report: {artifact.path / 'report.html'}"):
        ui.say(line)
    return artifact


# ---------------------------------------------------------------- the report


def _report(recipe: Recipe, asked: _Asked, needed: int, workspace: Path, ui: Ui) -> dict[str, Any]:
    judged = _judge_all(asked, ui)
    results = [shapes_result(judged)] if asked.shapes else []
    if asked.network is not None and asked.reference is not None:
        results.append(_distance(asked, asked.network, asked.reference, workspace, ui))
    samples, reference = asked.samples, asked.reference
    return {
        "schema": SCHEMA,
        "title": "Evaluation of " + (samples.artifact.id if samples.artifact else samples.what),
        "summary": f"{len(samples.entries)} pictures; recipe {recipe.name}",
        "gen": f"sha256:{samples.digest}",
        "ref": None if reference is None else f"sha256:{reference.digest}",
        "n_gen": len(samples.entries),
        "n_ref": None if reference is None else reference.count,
        "results": results,
        "pictures": judged,
        "skipped": {"unreadable": samples.skipped},
        "warnings": _warnings(asked, judged),
        "settings": _settings(recipe, asked, needed),
        "lineage": _lineage(asked, workspace),
        "env": _environment(asked.network),
    }


def _judge_all(asked: _Asked, ui: Ui) -> list[dict[str, Any]]:
    entries = asked.samples.entries
    if not asked.shapes:
        return [{"name": e.name, "prompt": e.prompt, "plan": e.plan, "seed": e.seed, "right": None} for e in entries]
    lines = []
    with ui.progress(len(entries), "checking pictures") as bar:
        for entry in entries:
            lines.append(judge(entry))
            bar.advance(1)
    return lines


def _distance(asked: _Asked, network: FeatureNetwork, reference: Reference, workspace: Path, ui: Ui) -> dict[str, Any]:
    count = len(asked.samples.entries)
    features_ND = set_features(network, asked.samples, ui, "features of the samples")
    moments = reference.moments(network, workspace, ui)
    true_ND = None
    if reference.world:
        true_ND = set_features(network, drawn(count, seed=FLOOR_SEED), ui, "features of true pictures")
    return distance_result(features_ND, moments, network, reference.what, true_ND)


def _warnings(asked: _Asked, judged: Sequence[Mapping[str, Any]]) -> list[str]:
    warnings = []
    network, count = asked.network, len(asked.samples.entries)
    if network is not None and network.identity["name"].startswith("builtin:"):
        warnings.append(
            f"The Frechet distance here is in features of {network.identity['name']}, a tiny network trained on the "
            "built-in world. It is not Inception FID and not comparable with any published FID."
        )
    if network is not None and count <= network.identity["width"]:
        warnings.append(f"{count} pictures for {network.identity['width']} features: the distance is mostly bias.")
    if asked.samples.skipped:
        warnings.append(f"{asked.samples.skipped} pictures could not be read and were left out.")
    prompts = [line["prompt"] for line in judged if line["right"] is not None]
    if len(set(prompts)) < len(prompts):
        warnings.append("Some prompts occur more than once; the intervals count each picture as independent.")
    if asked.shapes and (unjudged := sum(line["right"] is None for line in judged)):
        warnings.append(f"{unjudged} of {count} pictures were not judged: their prompts are not of the built-in world.")
    return warnings


def _settings(recipe: Recipe, asked: _Asked, needed: int) -> dict[str, str]:
    settings = {"recipe": recipe.name, "samples": asked.samples.what, "samples, sha256": asked.samples.digest}
    if asked.reference is not None and asked.network is not None:
        identity = asked.network.identity
        settings |= {"reference": asked.reference.what, "reference, sha256": asked.reference.digest}
        settings |= {"features": f"{identity['name']}, {identity['layer']}", "features, sha256": identity["weights"]}
        settings |= {"resize": f"{identity['resize']}, {identity['image_size']} px", "protocol": PROTOCOL}
        settings |= {"at least": f"{needed} pictures"}
    made = asked.samples.artifact.info.get("settings") if asked.samples.artifact else None
    return settings | {f"generate: {name}": str(value) for name, value in _flat(made or {})}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in sorted(settings.items()):
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _lineage(asked: _Asked, workspace: Path) -> list[dict[str, Any]]:
    lines = [line for parent in asked.parents() for line in lineage(parent, workspace)]
    return [{"depth": line.depth, "id": line.id, "cost": _cost(line.artifact)} for line in lines]


def _cost(artifact: Artifact | None) -> str:
    if artifact is None:
        return "not here any more"
    cost, made = artifact.manifest["cost"], artifact.manifest["made"]
    parts = [f"{cost['seconds']:.0f} s"] if "seconds" in cost else []
    parts += [f"{cost['samples']} samples"] if "samples" in cost else []
    parts += [f"{name} {seconds:.0f} s" for name, seconds in cost.get("stages", {}).items()]
    parts += [str(value) for value in (cost.get("device") or made.get("device"),) if value]
    return ", ".join(parts)


def _environment(network: FeatureNetwork | None) -> dict[str, str]:
    versions = {"torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__}
    return versions if network is None else {**versions, "device": network.device}


def _command(
    recipe: Recipe,
    asked: _Asked,
    samples: Path | str | None,
    reference: Path | str | None,
    needed: int,
    workspace: Path | str,
) -> str:
    """The command that makes this report again; nothing is left to a default that may change."""
    used = asked.samples.artifact
    words = ["bifrost", "eval", *(["--fid"] if asked.network else []), *(["--shapes"] if asked.shapes else [])]
    words += ["--samples", used.id if used else str(samples), "--workspace", str(workspace)]
    if asked.network:
        words += ["--min-samples", str(needed), "--set", f"evaluate.features={recipe.evaluate.features}"]
    words += ["--reference", str(reference)] if reference is not None else []
    return shlex.join(words)


def _thumbnails(entries: Sequence[Entry]) -> dict[str, tuple[bytes, int]]:
    """PNG bytes and original width of the pictures that are shown: all, or evenly spaced ones of many."""
    width = entries[0].load().shape[1]
    step = -(-len(entries) // (GALLERY_SMALL if width <= SMALL else GALLERY_LARGE))
    return {entry.name: _thumbnail(entry.load()) for entry in entries[::step]}


def _thumbnail(rgb: np.ndarray) -> tuple[bytes, int]:
    image = Image.fromarray(rgb)
    image.thumbnail((SMALL, SMALL))
    return png_bytes(np.asarray(image)), rgb.shape[1]
