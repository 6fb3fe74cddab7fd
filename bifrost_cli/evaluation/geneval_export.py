"""Images for GenEval's own scorer, and its results as a report labelled as that scorer's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bifrost_cli.artifacts import Artifact, Draft, default_path, identity_id, resolve
from bifrost_cli.artifacts.files import make_folder, new_folder, write_bytes
from bifrost_cli.artifacts.manifest import require_new
from bifrost_cli.config.load import load_recipe
from bifrost_cli.data.image_sets import from_samples
from bifrost_cli.evaluation.evaluate import SCHEMA, write_report
from bifrost_cli.evaluation.inputs import require_one_kind
from bifrost_cli.evaluation.metrics import geneval
from bifrost_cli.evaluation.metrics.metric import planned
from bifrost_cli.runtime.ui import Ui


def export_geneval(
    ref: Path | str, metadata: Path | str, output: Path | str, *, workspace: Path | str = "runs", ui: Ui | None = None
) -> Path:
    """Write `output/00000/{metadata.jsonl,samples/0000.png}` for every prompt, whole or not at all; returns `output`.

    A plan stands in its prompt's line, which the scorer copies into its results. DataError: images that are missing,
    generated from other prompts, or some of them from a plan. UsageError: the folder exists.
    """
    artifact, folder = resolve(workspace, ref, "samples"), Path(output)
    require_new(folder)
    images = from_samples(artifact, load_recipe(str(artifact.path)).images)
    lines = geneval.read_asked(Path(metadata))
    geneval.asked_of(images, lines, Path(metadata))
    require_one_kind([entry.plan for entry in images.entries], images.what)
    copies = len(images.entries) // len(lines)
    make_folder(folder.parent)
    with new_folder(folder) as draft:
        for index, entry in enumerate(images.entries):
            place = draft / f"{index // copies:05d}"
            if index % copies == 0:
                line = lines[index // copies] | ({} if entry.plan is None else {"plan": entry.plan})
                make_folder(place / geneval.SAMPLES)
                write_bytes(place / geneval.METADATA, (json.dumps(line) + "\n").encode("utf-8"))
            write_bytes(place / geneval.SAMPLES / f"{index % copies:04d}.png", artifact.file(entry.name).read_bytes())
    (ui or Ui()).say(f"{folder}: {len(lines)} prompts, {copies} images each, for GenEval's evaluate_images.py")
    return folder


def import_geneval(
    results: Path | str, *, output: Path | str | None = None, workspace: Path | str = "runs", ui: Ui | None = None
) -> Artifact:
    """The original scorer's results.jsonl as a report artifact, with intervals. DataError: `geneval.read_results`."""
    ui, path = ui or Ui(), Path(results)
    lines = [{"name": result["filename"], "prompt": result["prompt"], "plan": _plan(result), "seed": None,
              "category": result["tag"], "right": result["correct"], "why": str(result.get("reason") or "")}
             for result in geneval.read_results(path)]  # fmt: skip
    plans = [line["plan"] for line in lines]
    require_one_kind(plans, str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    identity = {"schema": SCHEMA, "geneval": digest, "protocol": geneval.PROTOCOL}
    place = Path(output) if output else default_path(workspace, "report", identity_id("report", identity, []))
    with Draft.open(place, "report", identity) as draft:
        if draft.complete:
            ui.say(f"{place} holds these results already")
            return draft.complete
        source, warnings = planned(plans, known=False)
        sentence = (
            f"Read from {path.name} (sha256 {digest[:12]}), which GenEval's own evaluate_images.py wrote: mean of the "
            f"tasks' means over {len(lines)} images. Generated from {source}."
        )
        result = geneval.geneval_row(lines, "by the original scorer", sentence, painted_from=source)
        parts = {"title": "GenEval, by the original scorer", "summary": f"{len(lines)} images", "n_gen": len(lines),
                 "results": [result], "pictures": lines, "warnings": warnings,
                 "command": f"bifrost geneval import {path}",
                 "settings": {"results": path.name, "results, sha256": digest}}  # fmt: skip
        artifact, said = write_report(draft, parts, {})
    ui.say(said[0])
    return artifact


def _plan(result: Mapping[str, Any]) -> str | None:
    """The plan that an exported folder said its images were generated from: the scorer copies a prompt's line."""
    try:
        plan = json.loads(result.get("metadata") or "{}")["plan"]
    except (TypeError, ValueError, KeyError, RecursionError):
        return None
    return plan if isinstance(plan, str) else None
