"""What a report says besides its numbers: settings, warnings, lineage, costs, versions, the command, thumbnails.

Comes in: what was asked for, with its artifacts. Goes out: JSON values and PNG bytes. Does not know how a number is
computed or a page is written.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bifrost_cli.artifacts import Artifact, lineage
from bifrost_cli.config import Recipe
from bifrost_cli.data.picture_set import Entry, PictureSet
from bifrost_cli.data.png import png_bytes
from bifrost_cli.stages.measures.distribution import LAYERS
from bifrost_cli.stages.measures.measure import Measure
from bifrost_cli.stages.page import SMALL
from bifrost_cli.stages.reference import Reference

SCHEMA = "bifrost.eval/3"
GALLERY_SMALL, GALLERY_LARGE = 240, 48  # pictures shown


@dataclass(frozen=True)
class Asked:
    """What the report is made of; together it is the report's identity."""

    samples: PictureSet
    reference: Reference | None
    measures: tuple[Measure, ...]

    @property
    def many(self) -> bool:
        """Whether a number here is biased by how few the pictures are."""
        return any(measure.needs_many for measure in self.measures)

    def identity(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "samples": {"digest": self.samples.digest, "n": len(self.samples.entries)},
            "reference": None if self.reference is None else self.reference.identity,
            "measures": [measure.identity for measure in self.measures],
        }

    def parents(self) -> list[Artifact]:
        sets = [self.samples, self.reference.pictures if self.reference else None]
        return [pictures.artifact for pictures in sets if pictures is not None and pictures.artifact is not None]


def warnings(asked: Asked, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader of the numbers must know; `lines` are those of the pictures, with their verdicts."""
    found = [told for measure in asked.measures for told in measure.warnings(asked.samples, lines)]
    if asked.samples.skipped:
        found.append(f"{asked.samples.skipped} pictures could not be read and were left out.")
    return found


def settings(recipe: Recipe, asked: Asked, needed: int) -> dict[str, str]:
    """Everything that decides the numbers, with the hashes of what was read."""
    facts = {"recipe": recipe.name, "samples": asked.samples.what, "samples, sha256": asked.samples.digest}
    if asked.reference is not None:
        facts |= {"reference": asked.reference.what, "reference, sha256": asked.reference.digest}
    for measure in asked.measures:
        facts |= measure.settings()
    if asked.many:
        facts["at least"] = f"{needed} pictures"
    made = asked.samples.artifact.info.get("settings") if asked.samples.artifact else None
    return facts | {f"generate: {name}": str(value) for name, value in flat(made or {})}


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as dotted names and values, sorted."""
    for key, value in sorted(settings.items()):
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def lineage_lines(artifacts: Sequence[Artifact], workspace: Path) -> list[dict[str, Any]]:
    """The artifacts and what they were made from, depth first, and what each cost; None where one is gone."""
    lines = [line for artifact in artifacts for line in lineage(artifact, workspace)]
    return [{"depth": line.depth, "id": line.id, "kind": line.kind, "cost": _cost(line.artifact)} for line in lines]


def _cost(artifact: Artifact | None) -> dict[str, Any] | None:
    if artifact is None:
        return None
    cost, made = artifact.manifest["cost"], artifact.manifest["made"]
    return {"device": made.get("device"), **{key: value for key, value in cost.items() if key != "stages"}}


def environment(asked: Asked) -> dict[str, str]:
    """The versions behind the numbers."""
    packages = ["torch", "numpy", "scipy", "pillow"]
    packages += sorted({package for measure in asked.measures for package in measure.packages})
    devices = {measure.device for measure in asked.measures}
    return {name: version(name) for name in packages} | {"device": ", ".join(sorted(devices))}


def command(
    recipe: Recipe,
    measures: Sequence[str],
    fd: Sequence[str],
    pictures: PictureSet,
    samples: Path | str | None,
    reference: Path | str | None,
    needed: int,
    workspace: Path | str,
    **given: Path | str | bool | None,
) -> str:
    """The command that makes this report again; nothing is left to a default that may change. `given`: further options
    by name; True for a flag."""
    rules = recipe.evaluate
    words = ["bifrost", "eval", *(f"--{name}" for name in measures)]
    words += [word for ref in fd for word in ("--fd", ref)]
    if "reconstruction" not in measures:
        words += ["--samples", pictures.artifact.id if pictures.artifact else str(samples)]
    words += ["--workspace", str(workspace)]
    if any(name in LAYERS for name in measures):
        words += ["--min-samples", str(needed), "--set", f"evaluate.features={rules.features}"]
    words += ["--set", f"evaluate.clip={rules.clip}"] if {"clipscore", "geneval"} & set(measures) else []
    words += ["--reference", str(reference)] if reference is not None else []
    for name, value in given.items():
        words += [] if value is None else [f"--{name}", *([] if value is True else [str(value)])]
    return shlex.join(words)


def thumbnails(entries: Sequence[Entry]) -> dict[str, tuple[bytes, int]]:
    """PNG bytes and original width of the pictures that are shown: all, or evenly spaced ones of many."""
    width = entries[0].load().shape[1]
    step = -(-len(entries) // (GALLERY_SMALL if width <= SMALL else GALLERY_LARGE))
    return {entry.name: _thumbnail(entry.load()) for entry in entries[::step]}


def _thumbnail(rgb: np.ndarray) -> tuple[bytes, int]:
    image = Image.fromarray(rgb)
    image.thumbnail((SMALL, SMALL))
    return png_bytes(np.asarray(image)), rgb.shape[1]


def picture_lines(pictures: PictureSet) -> list[dict[str, Any]]:
    """A line a picture, not judged yet."""
    return [{"name": e.name, "prompt": e.prompt, "plan": e.plan, "seed": e.seed, "right": None}
            for e in pictures.entries]  # fmt: skip
