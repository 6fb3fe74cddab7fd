"""The pictures that eval measures and what they are compared with; what is not there is made.

Comes in: a recipe and a wish. Goes out: a picture set and a reference, or with a dry run what they would be. Does not
know what is measured of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bifrost_cli.config import Recipe
from bifrost_cli.data.picture_set import Entry, PictureSet, from_samples
from bifrost_cli.stages.measures.distribution import LAYERS
from bifrost_cli.stages.prompts import read_prompts
from bifrost_cli.stages.reference import Reference, originals_for, reference_for
from bifrost_cli.stages.sample_set import found_samples, require_enough, require_one_kind, samples_for
from bifrost_cli.stages.ui import Ui
from bifrost_cli.stages.wish import OF_PROMPTS, Wish


def inputs_of(
    recipe: Recipe, wish: Wish, workspace: Path | str, device: str, ui: Ui
) -> tuple[PictureSet, Reference | None]:
    """What is measured, and what it is compared with. Errors as `evaluate`."""
    if wish.again:
        from bifrost_cli.stages.reconstruct_set import reconstruct_set  # and with it the painter's library

        compared = originals_for(recipe, wish.reference, wish.needed, workspace)
        require_enough(compared.pictures, wish.needed)
        made = reconstruct_set(recipe, compared.pictures, workspace=workspace, device=device, ui=ui)
        return from_samples(made, recipe.latents), compared
    pictures = samples_for(recipe, wish.pictures, wish.needed, workspace, device, ui)
    require_enough(pictures, wish.needed)
    if set(wish.measures) & set(OF_PROMPTS):
        require_one_kind(pictures)
    if not wish.compares:
        return pictures, None
    return pictures, reference_for(recipe, wish.reference, len(pictures.entries), workspace)


def plan_of(
    recipe: Recipe, wish: Wish, output: Path | str | None, workspace: Path | str, ui: Ui
) -> dict[str, Any]:
    """What would be measured, on what, against what; nothing is made."""
    plan = {
        "output": str(output or f"a new report in {workspace}"),
        "measures": [*wish.measures, *(f"fid in {ref}" for ref in wish.fd)],
        "features": recipe.evaluate.features if set(wish.measures) & set(LAYERS) else None,
    }
    if wish.again:
        originals = originals_for(recipe, wish.reference, wish.needed, workspace)
        return {**plan, "samples": f"reconstructions of {originals.what}, made first", "pictures": originals.count,
                "reference": originals.what}  # fmt: skip
    if wish.pictures.prompts is not None:
        count = len(read_prompts(Path(wish.pictures.prompts), ui)) * wish.pictures.copies
        told = f"{count} pictures of {wish.pictures.prompts}, made first where they are not there"
    else:
        found = found_samples(recipe, wish.pictures, wish.needed, workspace, ui)
        if found is not None:
            require_enough(found, wish.needed)
        count = len(found.entries) if found else wish.needed
        told = found.what if found else f"{wish.needed} pictures of held-out prompts, made first"
    compared = reference_for(recipe, wish.reference, count, workspace).what if wish.compares else None
    return {**plan, "samples": told, "pictures": count, "reference": compared}


def beside_originals(pictures: PictureSet, compared: Reference | None) -> Sequence[Entry]:
    """The pictures as the report shows them: reconstructions on the right of their originals."""
    if compared is None or not compared.originals:
        return pictures.entries
    pairs = zip(pictures.entries, compared.pictures.entries, strict=True)
    return [replace(made, load=partial(_side_by_side, true, made)) for made, true in pairs]


def _side_by_side(left: Entry, right: Entry) -> np.ndarray:
    return np.concatenate([left.load(), right.load()], axis=1)
