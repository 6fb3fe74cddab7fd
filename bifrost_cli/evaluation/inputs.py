"""The images that are evaluated and their reference; images that are missing are generated first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bifrost_cli.artifacts import Artifact, find, resolve
from bifrost_cli.config.schema import Images
from bifrost_cli.data.image_sets import EvalImage, ImageSet, from_folder, from_samples, image_count, quartered
from bifrost_cli.errors import DataError, UsageError
from bifrost_cli.evaluation.benchmarks.geneval_files import from_layout, is_layout
from bifrost_cli.evaluation.reference import Reference, originals_for, reference_for
from bifrost_cli.evaluation.request import EvalRequest
from bifrost_cli.generation.requests import read_prompts
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.shapes.captions import held_out_prompts


@dataclass(frozen=True)
class ImageProvider:
    """Finds the images of an evaluation, or has them generated.

    Args:
        rules: how images are read, the recipe's images section.
        recipe_name: for messages; `builtin_world`: whether its diffusion model generates the built-in world.
        generate: prompts (a list or a file) to a samples artifact; `reconstruct`: images to one.
    """

    rules: Images
    workspace: Path
    recipe_name: str
    builtin_world: bool
    generate: Callable[..., Any]
    reconstruct: Callable[[ImageSet], Artifact]
    ui: Ui

    def inputs(self, request: EvalRequest) -> tuple[ImageSet, Reference | None]:
        """The images, generated where they are missing, and what they are compared with.

        Raises:
            DataError: too few or mixed images, images that cannot be read.
            UsageError: no reference, where the recipe does not generate the built-in world.
        """
        if request.reconstructs:
            originals = self._originals(request)
            assert originals.images is not None
            require_enough(originals.images, request.needed)
            return from_samples(self.reconstruct(originals.images), self.rules), originals
        images = self._images(request)
        require_enough(images, request.needed)
        if any(metric.needs_prompts for metric in request.classes):
            require_one_kind(images)
        return images, self._reference(request, len(images.entries))

    def plan(self, request: EvalRequest) -> dict[str, Any]:
        """What would be measured against what; nothing is made."""
        if request.reconstructs:
            originals = self._originals(request)
            return {"samples": f"reconstructions of {originals.what}, made first", "pictures": originals.count,
                    "reference": originals.what}  # fmt: skip
        if request.prompts is not None:
            count = len(read_prompts(Path(request.prompts), self.ui)) * request.copies
            what = f"{count} images of {request.prompts}, made first where they are not there"
        elif images := self._existing(request):
            require_enough(images, request.needed)
            count, what = len(images.entries), images.what
        else:
            count, what = request.needed, f"{request.needed} images of held-out prompts, made first"
        reference = self._reference(request, count)
        return {"samples": what, "pictures": count, "reference": reference and reference.what}

    def _reference(self, request: EvalRequest, count: int) -> Reference | None:
        if not request.compares:
            return None
        self._require_reference(request)
        return reference_for(request.reference, count, self.rules, self.workspace)

    def _originals(self, request: EvalRequest) -> Reference:
        self._require_reference(request)
        return originals_for(request.reference, request.needed, self.rules, self.workspace)

    def _require_reference(self, request: EvalRequest) -> None:
        if request.reference is None and not self.builtin_world:
            raise UsageError(
                f"recipe {self.recipe_name} does not generate the built-in world, so there is no default reference",
                fix="give --reference FOLDER, a samples artifact, or a saved statistics file",
            )

    def _images(self, request: EvalRequest) -> ImageSet:
        if request.prompts is not None:
            made = self.generate(Path(request.prompts), n=request.copies, output=None)
        elif images := self._existing(request):
            return images
        else:
            prompts = [prompt.text for prompt in held_out_prompts(request.needed)]
            self.ui.say(f"making {len(prompts)} images from held-out prompts first; the same command continues where "
                        "it stopped")  # fmt: skip
            made = self.generate(prompts)
        return from_samples(made, self.rules)

    def _existing(self, request: EvalRequest) -> ImageSet | None:
        """The images as far as none must be generated; None when a default set would be. DataError: none can be."""
        if request.samples is not None:
            images = self._named(request.samples)
            return quartered(images) if request.quarters else images
        if artifact := self._newest(request.needed):
            return from_samples(artifact, self.rules)
        if not self.builtin_world:
            raise DataError(
                f"no samples artifact in {self.workspace} has at least {request.needed} images of what is trained now",
                at=f"recipe {self.recipe_name} does not generate the built-in world, so there is no default set of "
                "prompts",
                fix="make them: bifrost generate --prompts FILE -o DIR",
                code="BF-DATA-008",
            )
        return None

    def _named(self, samples: Path | str) -> ImageSet:
        folder = Path(samples)
        if is_layout(folder):
            return from_layout(folder, self.rules)[0]
        if folder.is_dir() and not (folder / "manifest.json").exists():
            return from_folder(folder, self.rules)
        return from_samples(resolve(self.workspace, samples, "samples"), self.rules)

    def _newest(self, needed: int) -> Artifact | None:
        """The newest samples artifact with enough images, unless something was trained after it was made."""
        for artifact in find(self.workspace):
            if artifact.kind in ("branch", "controlnet"):
                self.ui.say(f"no samples with at least {needed} images since {artifact.id} was trained")
                return None
            if artifact.kind == "samples" and (count := image_count(artifact)) >= needed:
                self.ui.say(f"samples: {artifact.id}, the newest with at least {needed} images ({count})")
                return artifact
        self.ui.say(f"no samples artifact in {self.workspace} has at least {needed} images")
        return None


def beside_originals(images: ImageSet, reference: Reference | None) -> Sequence[EvalImage]:
    """The images as the report shows them: reconstructions on the right of their originals."""
    if reference is None or reference.images is None or not reference.originals:
        return images.entries
    pairs = zip(images.entries, reference.images.entries, strict=True)
    return [replace(made, load=partial(_side_by_side, true, made)) for made, true in pairs]


def _side_by_side(left: EvalImage, right: EvalImage) -> np.ndarray:
    return np.concatenate([left.load(), right.load()], axis=1)


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
    """DataError, with how many images there are and how to get more."""
    if len(images.entries) < needed:
        raise DataError(
            f"{images.what} has {len(images.entries)} images; at least {needed} are needed",
            at="with few images the Frechet distance is mostly bias: it halves when their number doubles",
            fix="make more: bifrost generate --prompts FILE -o DIR; or lower the limit: --min-samples N",
            code="BF-DATA-008",
        )
