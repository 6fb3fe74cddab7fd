"""Which images are evaluated: the ones named, else the newest, else a set made for it.

Comes in: what the user named, how many images are needed. Goes out: an image set. Does not know what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bifrost_cli.artifacts import Artifact, find, resolve
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.image_sets import ImageSet, from_folder, from_samples, image_count, quartered
from bifrost_cli.errors import DataError, UsageError
from bifrost_cli.evaluation.benchmarks.geneval_files import from_layout, is_layout
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.shapes.captions import held_out_prompts


@dataclass(frozen=True)
class ImageSelection:
    """Which images: `samples` (an artifact, path or id, or a folder), or `copies` generated of each line of `prompts`,
    or neither: the newest artifact with enough images made since the last training, else a set made for it. With
    `quarters` each of `samples` is a grid of 2x2 pictures."""

    samples: Path | str | None = None
    prompts: Path | str | None = None
    copies: int = 1
    quarters: bool = False

    def __post_init__(self) -> None:
        if self.samples is not None and self.prompts is not None:
            raise UsageError("--samples and --prompts both say what is measured", fix="give one of them")
        if self.quarters and self.samples is None:
            raise UsageError("--quarters cuts grids of 2x2, and none are given", fix="--samples FOLDER")


def samples_for(
    recipe: Recipe, wanted: ImageSelection, needed: int, workspace: Path | str, device: str, ui: Ui
) -> ImageSet:
    """The images, generated first where they are not there. Errors as `generate`."""
    if wanted.prompts is not None:
        from bifrost_cli.generation.generate import generate

        made = generate(recipe, Path(wanted.prompts), n=wanted.copies, output=None, save_latents=True,
                        workspace=workspace, device=device, ui=ui)  # fmt: skip
        return from_samples(made, recipe.images)
    found = found_samples(recipe, wanted, needed, workspace, ui)
    return found or from_samples(_make_samples(recipe, needed, workspace, device, ui), recipe.images)


def found_samples(
    recipe: Recipe, wanted: ImageSelection, needed: int, workspace: Path | str, ui: Ui
) -> ImageSet | None:
    """`samples_for` as far as nothing must be made; None when a set would be. DataError when none can be."""
    if wanted.samples is None:
        artifact = _newest_enough(workspace, needed, ui)
        if artifact is None:
            _require_default_set(recipe, needed, workspace)
        return artifact and from_samples(artifact, recipe.images)
    found = _named(recipe, wanted.samples, workspace)
    return quartered(found) if wanted.quarters else found


def _named(recipe: Recipe, samples: Path | str, workspace: Path | str) -> ImageSet:
    folder = Path(samples)
    if is_layout(folder):
        return from_layout(folder, recipe.images)[0]
    if folder.is_dir() and not (folder / "manifest.json").exists():
        return from_folder(folder, recipe.images)
    return from_samples(resolve(workspace, samples, "samples"), recipe.images)


def _newest_enough(workspace: Path | str, needed: int, ui: Ui) -> Artifact | None:
    """The newest samples artifact with enough images, unless something was trained after it was made."""
    for artifact in find(workspace):
        if artifact.kind in ("branch", "controlnet"):
            ui.say(f"no samples with at least {needed} images since {artifact.id} was trained")
            return None
        if artifact.kind == "samples" and image_count(artifact) >= needed:
            ui.say(f"samples: {artifact.id}, the newest with at least {needed} images ({image_count(artifact)})")
            return artifact
    ui.say(f"no samples artifact in {workspace} has at least {needed} pictures")
    return None


def _require_default_set(recipe: Recipe, needed: int, workspace: Path | str) -> None:
    if not recipe.models.diffusion.startswith("builtin:"):
        raise DataError(
            f"no samples artifact in {workspace} has at least {needed} images of what is trained now",
            at=f"recipe {recipe.name} does not generate the built-in world, so there is no default set of prompts",
            fix="make them: bifrost generate --prompts FILE -o DIR",
            code="BF-DATA-008",
        )


def _make_samples(recipe: Recipe, needed: int, workspace: Path | str, device: str, ui: Ui) -> Artifact:
    """A default set: held-out prompts of the built-in world through the newest pair. Restartable, as generate is."""
    from bifrost_cli.generation.generate import generate

    prompts = [prompt.text for prompt in held_out_prompts(needed)]
    ui.say(f"making {len(prompts)} images from held-out prompts first; the same command continues where it stopped")
    return generate(recipe, prompts, save_latents=True, workspace=workspace, device=device, ui=ui)


def require_one_kind(images: ImageSet) -> None:
    """DataError: some images were generated from a plan and some from the prompt alone. A rewritten prompt is another
    task: their mean would be a number of neither."""
    require_one_source([entry.plan for entry in images.entries], images.what)


def require_one_source(plans: Sequence[str | None], what: str) -> None:
    """`require_one_kind` of images by their plans, None where one has none."""
    planned = sum(plan is not None for plan in plans)
    if 0 < planned < len(plans):
        raise DataError(
            f"{planned} of {len(plans)} images were generated from a plan, the others from the prompt alone",
            at=what,
            fix="measure them apart",
            code="BF-DATA-007",
        )


def require_enough(images: ImageSet, needed: int) -> None:
    """DataError, with how many there are and how to get more."""
    if len(images.entries) < needed:
        raise DataError(
            f"{images.what} has {len(images.entries)} images; at least {needed} are needed",
            at="with few images the Frechet distance is mostly bias: it halves when their number doubles",
            fix="make more: bifrost generate --prompts FILE -o DIR; or lower the bar: --min-samples N",
            code="BF-DATA-008",
        )
