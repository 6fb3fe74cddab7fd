"""An evaluation's report.json: its identity, settings, warnings, versions, and the command that makes it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bifrost_cli.artifacts import Artifact
from bifrost_cli.config.schema import Evaluate
from bifrost_cli.data.image_sets import ImageSet
from bifrost_cli.evaluation.metrics.metric import Metric
from bifrost_cli.evaluation.reference import Reference
from bifrost_cli.evaluation.request import EvalRequest
from bifrost_cli.reports.artifact_pages import lineage_plots
from bifrost_cli.reports.page import flat, image_lines, lineage_lines
from bifrost_cli.runtime.ui import Ui

SCHEMA = "bifrost.eval/3"


@dataclass(frozen=True)
class Evaluation:
    """What a report is made of; together it is the report's identity."""

    images: ImageSet
    reference: Reference | None
    metrics: tuple[Metric, ...]

    def identity(self) -> dict[str, Any]:
        """Metrics that read the same features are one entry."""
        measures: list[dict[str, Any]] = []
        for metric in self.metrics:
            if not any(metric.identity is known for known in measures):
                measures.append(metric.identity)
        return {
            "schema": SCHEMA,
            "samples": {"digest": self.images.digest, "n": len(self.images.entries)},
            "reference": None if self.reference is None else self.reference.identity,
            "measures": measures,
        }

    def parents(self) -> list[Artifact]:
        """The artifacts of the images and of the reference."""
        sets = [self.images, self.reference.images if self.reference else None]
        return [images.artifact for images in sets if images is not None and images.artifact is not None]

    def report(self, recipe_name: str, minimum: int, again: str, workspace: Path, ui: Ui) -> dict[str, Any]:
        """Compute the metrics; the JSON value of report.json. `again`: the command; `minimum`: --min-samples."""
        images, reference, lines = self.images, self.reference, image_lines(self.images)
        results = [result for metric in self.metrics for result in metric.compute(images, lines, ui)]
        warnings = [warning for metric in self.metrics for warning in metric.warnings(images, lines)]
        if images.skipped:
            warnings.append(f"{images.skipped} images could not be read and were left out.")
        return report_json(
            title="Evaluation of " + (images.artifact.id if images.artifact else images.what),
            summary=f"{len(images.entries)} images; recipe {recipe_name}",
            gen=f"sha256:{images.digest}",
            ref=None if reference is None else f"sha256:{reference.digest}",
            n_gen=len(images.entries),
            n_ref=None if reference is None else reference.count or None,
            seeds=sorted({entry.seed for entry in images.entries if entry.seed is not None}),
            results=results,
            pictures=lines,
            plots=lineage_plots(images.artifact, workspace) if images.artifact else [],
            skipped={"unreadable": images.skipped},
            warnings=list(dict.fromkeys(warnings)),
            settings=self._settings(recipe_name, minimum),
            lineage=lineage_lines(self.parents(), workspace),
            env=self._environment(),
            command=again,
        )

    def _settings(self, recipe_name: str, minimum: int) -> dict[str, str]:
        """Everything that decides the numbers, with the hashes of what was read."""
        facts = {"recipe": recipe_name, "samples": self.images.what, "samples, sha256": self.images.digest}
        if self.reference is not None:
            facts |= {"reference": self.reference.what, "reference, sha256": self.reference.digest}
        for metric in self.metrics:
            facts |= metric.settings()
        if any(metric.needs_many for metric in self.metrics):
            facts["at least"] = f"{minimum} images"
        made = self.images.artifact.info.get("settings") if self.images.artifact else None
        return facts | {f"generate: {name}": str(value) for name, value in flat(made or {})}

    def _environment(self) -> dict[str, str]:
        """The versions behind the numbers."""
        packages = ["torch", "numpy", "scipy", "pillow"]
        packages += sorted({package for metric in self.metrics for package in metric.packages})
        devices = {metric.device for metric in self.metrics}
        return {name: version(name) for name in packages} | {"device": ", ".join(sorted(devices))}


def report_json(**parts: Any) -> dict[str, Any]:
    """A report.json; what is not given is empty."""
    empty: dict[str, Any] = {"gen": None, "ref": None, "n_ref": None, "seeds": [], "plots": [], "warnings": [],
                             "skipped": {"unreadable": 0}, "lineage": [], "env": {}}  # fmt: skip
    return {"schema": SCHEMA, **empty, **parts}


def command_of(request: EvalRequest, settings: Evaluate, images: ImageSet, workspace: Path | str) -> str:
    """The command that makes a report again; nothing is left to a default that may change."""
    words = ["bifrost", "eval", *(f"--{name}" for name in request.metrics)]
    words += [word for ref in request.fd for word in ("--fd", ref)]
    if not request.reconstructs:
        words += ["--samples", images.artifact.id if images.artifact else str(request.samples)]
    words += ["--workspace", str(workspace)]
    if request.min_samples == request.needed:
        words += ["--min-samples", str(request.min_samples)]
    for key in dict.fromkeys(key for metric in request.classes for key in metric.keys):
        if (value := getattr(settings, key)) is not None:
            words += ["--set", f"evaluate.{key}={value}"]
    words += ["--reference", str(request.reference)] if request.reference is not None else []
    words += ["--quarters"] * request.quarters
    for name, value in request.used_options.items():
        words += [] if value is None else [f"--{name}", str(value)]
    return shlex.join(words)


def headline(result: Mapping[str, Any]) -> str:
    """A result in one line."""
    value = f"{result['value']:.1%}" if result["format"] == "share" else f"{result['value']:.4g}"
    return "; ".join([f"{result['label']}: {value} ({result['spread']})", *result["details"]])
