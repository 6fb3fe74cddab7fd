"""Which pictures are evaluated: the ones named, else the newest, else a set made for it.

Comes in: what the user named, how many pictures are needed. Goes out: a picture set. Does not know what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bifrost_cli.artifacts import Artifact, find, resolve
from bifrost_cli.config import Recipe
from bifrost_cli.data.picture_set import PictureSet, from_folder, from_samples, picture_count, quartered
from bifrost_cli.errors import DataError, UsageError
from bifrost_cli.shapes.captions import held_out_prompts
from bifrost_cli.stages.geneval_files import from_layout, is_layout
from bifrost_cli.stages.ui import Ui


@dataclass(frozen=True)
class Wanted:
    """Which pictures: `samples` (an artifact, path or id, or a folder), or `copies` painted of each line of `prompts`,
    or neither: the newest artifact with enough pictures made since the last training, else a set made for it. With
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
    recipe: Recipe, wanted: Wanted, needed: int, workspace: Path | str, device: str, ui: Ui
) -> PictureSet:
    """The pictures, painted first where they are not there. Errors as `generate`."""
    if wanted.prompts is not None:
        from bifrost_cli.stages.generate import generate

        made = generate(recipe, Path(wanted.prompts), n=wanted.copies, output=None, save_latents=True,
                        workspace=workspace, device=device, ui=ui)  # fmt: skip
        return from_samples(made, recipe.latents)
    found = found_samples(recipe, wanted, needed, workspace, ui)
    return found or from_samples(_make_samples(recipe, needed, workspace, device, ui), recipe.latents)


def found_samples(
    recipe: Recipe, wanted: Wanted, needed: int, workspace: Path | str, ui: Ui
) -> PictureSet | None:
    """`samples_for` as far as nothing must be made; None when a set would be. DataError when none can be."""
    if wanted.samples is None:
        artifact = _newest_enough(workspace, needed, ui)
        if artifact is None:
            _require_default_set(recipe, needed, workspace)
        return artifact and from_samples(artifact, recipe.latents)
    found = _named(recipe, wanted.samples, workspace)
    return quartered(found) if wanted.quarters else found


def _named(recipe: Recipe, samples: Path | str, workspace: Path | str) -> PictureSet:
    folder = Path(samples)
    if is_layout(folder):
        return from_layout(folder, recipe.latents)[0]
    if folder.is_dir() and not (folder / "manifest.json").exists():
        return from_folder(folder, recipe.latents)
    return from_samples(resolve(workspace, samples, "samples"), recipe.latents)


def _newest_enough(workspace: Path | str, needed: int, ui: Ui) -> Artifact | None:
    """The newest samples artifact with enough pictures, unless something was trained after it was made."""
    for artifact in find(workspace):
        if artifact.kind in ("branch", "controlnet"):
            ui.say(f"no samples with at least {needed} pictures since {artifact.id} was trained")
            return None
        if artifact.kind == "samples" and picture_count(artifact) >= needed:
            ui.say(f"samples: {artifact.id}, the newest with at least {needed} pictures ({picture_count(artifact)})")
            return artifact
    ui.say(f"no samples artifact in {workspace} has at least {needed} pictures")
    return None


def _require_default_set(recipe: Recipe, needed: int, workspace: Path | str) -> None:
    if not recipe.models.painter.startswith("builtin:"):
        raise DataError(
            f"no samples artifact in {workspace} has at least {needed} pictures of what is trained now",
            at=f"recipe {recipe.name} does not paint the built-in world, so there is no default set of prompts",
            fix="make them: bifrost generate --prompts FILE -o DIR",
            code="BF-DATA-008",
        )


def _make_samples(recipe: Recipe, needed: int, workspace: Path | str, device: str, ui: Ui) -> Artifact:
    """A default set: held-out prompts of the built-in world through the newest pair. Restartable, as generate is."""
    from bifrost_cli.stages.generate import generate

    prompts = [prompt.text for prompt in held_out_prompts(needed)]
    ui.say(f"making {len(prompts)} pictures from held-out prompts first; the same command continues where it stopped")
    return generate(recipe, prompts, save_latents=True, workspace=workspace, device=device, ui=ui)


def require_one_kind(pictures: PictureSet) -> None:
    """DataError: some pictures were painted from a plan and some from the prompt alone. A rewritten prompt is another
    task: their mean would be a number of neither."""
    require_one_source([entry.plan for entry in pictures.entries], pictures.what)


def require_one_source(plans: Sequence[str | None], what: str) -> None:
    """`require_one_kind` of pictures by their plans, None where one has none."""
    planned = sum(plan is not None for plan in plans)
    if 0 < planned < len(plans):
        raise DataError(
            f"{planned} of {len(plans)} pictures were painted from a plan, the others from the prompt alone",
            at=what,
            fix="measure them apart",
            code="BF-DATA-007",
        )


def require_enough(pictures: PictureSet, needed: int) -> None:
    """DataError, with how many there are and how to get more."""
    if len(pictures.entries) < needed:
        raise DataError(
            f"{pictures.what} has {len(pictures.entries)} pictures; at least {needed} are needed",
            at="with few pictures the Frechet distance is mostly bias: it halves when their number doubles",
            fix="make more: bifrost generate --prompts FILE -o DIR; or lower the bar: --min-samples N",
            code="BF-DATA-008",
        )
