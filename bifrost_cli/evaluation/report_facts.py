"""What a report says besides its numbers: settings, warnings, lineage, costs, versions, the command, thumbnails.

Comes in: what was asked for, with its artifacts. Goes out: JSON values and PNG bytes. Does not know how a number is
computed or a page is written.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bifrost_cli.artifacts import Artifact
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.image_sets import ImageSet
from bifrost_cli.evaluation.metrics.distribution import LAYERS
from bifrost_cli.evaluation.metrics.metric import Metric
from bifrost_cli.evaluation.reference import Reference
from bifrost_cli.reports.facts import flat

SCHEMA = "bifrost.eval/3"


@dataclass(frozen=True)
class EvalInputs:
    """What the report is made of; together it is the report's identity."""

    samples: ImageSet
    reference: Reference | None
    metrics: tuple[Metric, ...]

    @property
    def many(self) -> bool:
        """Whether a number here is biased by how few the images are."""
        return any(measure.needs_many for measure in self.metrics)

    def identity(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "samples": {"digest": self.samples.digest, "n": len(self.samples.entries)},
            "reference": None if self.reference is None else self.reference.identity,
            "measures": [measure.identity for measure in self.metrics],
        }

    def parents(self) -> list[Artifact]:
        sets = [self.samples, self.reference.images if self.reference else None]
        return [images.artifact for images in sets if images is not None and images.artifact is not None]


def warnings(asked: EvalInputs, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader of the numbers must know; `lines` are those of the images, with their verdicts."""
    found = [told for measure in asked.metrics for told in measure.warnings(asked.samples, lines)]
    if asked.samples.skipped:
        found.append(f"{asked.samples.skipped} images could not be read and were left out.")
    return found


def settings(recipe: Recipe, asked: EvalInputs, needed: int) -> dict[str, str]:
    """Everything that decides the numbers, with the hashes of what was read."""
    facts = {"recipe": recipe.name, "samples": asked.samples.what, "samples, sha256": asked.samples.digest}
    if asked.reference is not None:
        facts |= {"reference": asked.reference.what, "reference, sha256": asked.reference.digest}
    for measure in asked.metrics:
        facts |= measure.settings()
    if asked.many:
        facts["at least"] = f"{needed} pictures"
    made = asked.samples.artifact.info.get("settings") if asked.samples.artifact else None
    return facts | {f"generate: {name}": str(value) for name, value in flat(made or {})}


def environment(asked: EvalInputs) -> dict[str, str]:
    """The versions behind the numbers."""
    packages = ["torch", "numpy", "scipy", "pillow"]
    packages += sorted({package for measure in asked.metrics for package in measure.packages})
    devices = {measure.device for measure in asked.metrics}
    return {name: version(name) for name in packages} | {"device": ", ".join(sorted(devices))}


def command(
    recipe: Recipe,
    metrics: Sequence[str],
    fd: Sequence[str],
    images: ImageSet,
    samples: Path | str | None,
    reference: Path | str | None,
    needed: int,
    workspace: Path | str,
    **given: Path | str | bool | None,
) -> str:
    """The command that makes this report again; nothing is left to a default that may change. `given`: further options
    by name; True for a flag."""
    rules = recipe.evaluate
    words = ["bifrost", "eval", *(f"--{name}" for name in metrics)]
    words += [word for ref in fd for word in ("--fd", ref)]
    if "reconstruction" not in metrics:
        words += ["--samples", images.artifact.id if images.artifact else str(samples)]
    words += ["--workspace", str(workspace)]
    if any(name in LAYERS for name in metrics):
        words += ["--min-samples", str(needed), "--set", f"evaluate.features={rules.features}"]
    words += ["--set", f"evaluate.clip={rules.clip}"] if {"clipscore", "geneval"} & set(metrics) else []
    words += ["--reference", str(reference)] if reference is not None else []
    for name, value in given.items():
        words += [] if value is None else [f"--{name}", *([] if value is True else [str(value)])]
    return shlex.join(words)
