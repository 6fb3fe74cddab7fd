"""What pages and reports say of artifacts and images: settings by dotted names, lineage with costs, thumbnails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bifrost_cli.artifacts import Artifact, lineage
from bifrost_cli.data.image_sets import EvalImage, ImageSet
from bifrost_cli.data.png import png_bytes
from bifrost_cli.reports.page import SMALL

GALLERY_SMALL, GALLERY_LARGE = 240, 48  # images shown


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


def thumbnails(entries: Sequence[EvalImage]) -> dict[str, tuple[bytes, int]]:
    """PNG bytes and original width of the images that are shown: all, or evenly spaced ones of many."""
    width = entries[0].load().shape[1]
    step = -(-len(entries) // (GALLERY_SMALL if width <= SMALL else GALLERY_LARGE))
    return {entry.name: _thumbnail(entry.load()) for entry in entries[::step]}


def _thumbnail(rgb: np.ndarray) -> tuple[bytes, int]:
    image = Image.fromarray(rgb)
    image.thumbnail((SMALL, SMALL))
    return png_bytes(np.asarray(image)), rgb.shape[1]


def image_lines(images: ImageSet) -> list[dict[str, Any]]:
    """A line an image, not judged yet."""
    return [{"name": e.name, "prompt": e.prompt, "plan": e.plan, "seed": e.seed, "right": None}
            for e in images.entries]  # fmt: skip
