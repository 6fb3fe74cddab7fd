"""The images that eval measures and what they are compared with; what is not there is made.

Comes in: a recipe and a wish. Goes out: an image set and a reference, or with a dry run what they would be. Does not
know what is measured of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.image_sets import EvalImage, ImageSet, from_samples
from bifrost_cli.evaluation.image_selection import found_samples, require_enough, require_one_kind, samples_for
from bifrost_cli.evaluation.metrics.distribution import LAYERS
from bifrost_cli.evaluation.reference import Reference, originals_for, reference_for
from bifrost_cli.evaluation.request import OF_PROMPTS, EvalRequest
from bifrost_cli.generation.requests import read_prompts
from bifrost_cli.runtime.ui import Ui


def inputs_of(
    recipe: Recipe, request: EvalRequest, workspace: Path | str, device: str, ui: Ui
) -> tuple[ImageSet, Reference | None]:
    """What is measured, and what it is compared with. Errors as `evaluate`."""
    if request.again:
        from bifrost_cli.generation.reconstruct_set import reconstruct_set  # and with it the diffusion model's library

        compared = originals_for(recipe, request.reference, request.needed, workspace)
        require_enough(compared.images, request.needed)
        made = reconstruct_set(recipe, compared.images, workspace=workspace, device=device, ui=ui)
        return from_samples(made, recipe.images), compared
    images = samples_for(recipe, request.images, request.needed, workspace, device, ui)
    require_enough(images, request.needed)
    if set(request.metrics) & set(OF_PROMPTS):
        require_one_kind(images)
    if not request.compares:
        return images, None
    return images, reference_for(recipe, request.reference, len(images.entries), workspace)


def plan_of(
    recipe: Recipe, request: EvalRequest, output: Path | str | None, workspace: Path | str, ui: Ui
) -> dict[str, Any]:
    """What would be measured, on what, against what; nothing is made."""
    plan = {
        "output": str(output or f"a new report in {workspace}"),
        "measures": [*request.metrics, *(f"fid in {ref}" for ref in request.fd)],
        "features": recipe.evaluate.features if set(request.metrics) & set(LAYERS) else None,
    }
    if request.again:
        originals = originals_for(recipe, request.reference, request.needed, workspace)
        return {**plan, "samples": f"reconstructions of {originals.what}, made first", "pictures": originals.count,
                "reference": originals.what}  # fmt: skip
    if request.images.prompts is not None:
        count = len(read_prompts(Path(request.images.prompts), ui)) * request.images.copies
        told = f"{count} images of {request.images.prompts}, made first where they are not there"
    else:
        found = found_samples(recipe, request.images, request.needed, workspace, ui)
        if found is not None:
            require_enough(found, request.needed)
        count = len(found.entries) if found else request.needed
        told = found.what if found else f"{request.needed} images of held-out prompts, made first"
    compared = reference_for(recipe, request.reference, count, workspace).what if request.compares else None
    return {**plan, "samples": told, "pictures": count, "reference": compared}


def beside_originals(images: ImageSet, compared: Reference | None) -> Sequence[EvalImage]:
    """The images as the report shows them: reconstructions on the right of their originals."""
    if compared is None or not compared.originals:
        return images.entries
    pairs = zip(images.entries, compared.images.entries, strict=True)
    return [replace(made, load=partial(_side_by_side, true, made)) for made, true in pairs]


def _side_by_side(left: EvalImage, right: EvalImage) -> np.ndarray:
    return np.concatenate([left.load(), right.load()], axis=1)
