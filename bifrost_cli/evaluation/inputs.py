"""What an evaluation measures: the request, validated; its images, generated where missing; and their reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bifrost_cli.artifacts import find, resolve
from bifrost_cli.artifacts.files import sha256_file
from bifrost_cli.config.schema import Evaluate, Images, Recipe
from bifrost_cli.data.image_sets import ImageSet, drawn, from_folder, from_samples, image_count, quartered, squared
from bifrost_cli.errors import ArtifactError, DataError, RecipeError, UsageError
from bifrost_cli.evaluation.feature_statistics import Statistics, load_adm, load_statistics, statistics_of
from bifrost_cli.evaluation.metrics.geneval import from_layout, is_layout
from bifrost_cli.evaluation.metrics.metric import Metric
from bifrost_cli.evaluation.networks import FeatureNetwork
from bifrost_cli.evaluation.registry import REGISTRY, metric_class, metric_flags
from bifrost_cli.extraction.source import images_of_store
from bifrost_cli.generation.requests import read_prompts
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.shapes.world import world

STATISTICS = (".safetensors", ".npz")  # suffixes of files of statistics
WORLD_SEED, FLOOR_SEED = 1, 2  # 0 is the seed of the prompts a default set is made from


@dataclass(frozen=True)
class EvalRequest:
    """What `evaluate` was asked for, made by `request_of`."""

    metrics: tuple[str, ...]
    fd: tuple[str, ...]  # further networks for a Frechet distance each
    features: str  # the network of the others
    options: Mapping[str, Any]  # the metrics' own, by name
    min_samples: int
    samples: Path | str | None
    prompts: Path | str | None
    copies: int  # images of each of `prompts`
    quarters: bool
    reference: Path | str | None

    @cached_property
    def named(self) -> list[type[Metric]]:
        """The classes of `metrics` in the report's order: those that judge single images come first."""
        known = [metric_class(name) for name in REGISTRY if name in self.metrics]
        return sorted(known, key=lambda metric: metric.needs_many)

    @property
    def classes(self) -> list[type[Metric]]:
        """`named`, and those of `fd`."""
        return [*self.named, *[metric_class("fid")] * len(self.fd)]

    @property
    def reconstructs(self) -> bool:
        return any(metric.reconstructs for metric in self.named)

    @property
    def needed(self) -> int:
        """How many images there must be."""
        return self.min_samples if any(metric.needs_many for metric in self.classes) else 1


def request_of(
    settings: Evaluate, *, metrics: Sequence[str], fd: Sequence[str], min_samples: int | None,
    options: Mapping[str, Any], **given: Any,
) -> EvalRequest:  # fmt: skip
    """Validate a request; `given` are the other fields of EvalRequest. Nothing is loaded or read."""
    chosen = [metric_class(name) for name in metrics]
    if any(metric.reconstructs for metric in chosen) and not any(metric.needs_many for metric in chosen):
        metrics = [*metrics, "fid"]  # the distance to the originals
    minimum = settings.min_samples if min_samples is None else min_samples
    values = {option.name: option.default for metric in chosen for option in metric.options}
    set_values = {name: value for name, value in options.items() if value is not None}
    values |= {name: value for name, value in set_values.items() if name in values}
    request = EvalRequest(tuple(metrics), tuple(fd), settings.features, values, minimum, **given)
    if not request.classes:
        raise UsageError("nothing to measure", fix=f"give one or more of --{', --'.join(REGISTRY)}")
    if minimum < 4:
        raise UsageError(f"--min-samples {minimum} is too small: the error of a distance needs at least 4 images")
    if settings.inception_weights and "inception" not in (settings.features, *fd):
        raise RecipeError(f"evaluate.inception_weights would be ignored: the features are {settings.features}",
                          fix="--features inception, or leave the weights out", code="BF-RECIPE-005")  # fmt: skip
    if request.samples is not None and request.prompts is not None:
        raise UsageError("--samples and --prompts both say what is measured", fix="give one of them")
    if request.quarters and request.samples is None:
        raise UsageError("--quarters cuts grids of 2x2, and none are given", fix="--samples FOLDER")
    for metric in request.classes:
        metric.check(request)
    if unused := sorted(set_values.keys() - values.keys()):
        owners = {option.name: name for name, _, options in metric_flags() for option in options}
        if unused[0] not in owners:
            raise UsageError(f"no metric has an option {unused[0]}", at=f"options: {', '.join(sorted(owners))}")
        raise UsageError(f"--{unused[0]} is an option of --{owners[unused[0]]}, which is not measured",
                         fix=f"--{owners[unused[0]]}, or leave out --{unused[0]}")  # fmt: skip
    return request


@dataclass(frozen=True)
class Reference:
    """Images, or a file of statistics."""

    what: str
    digest: str
    count: int
    images: ImageSet | None = None
    file: Path | None = None
    world: str | None = None  # whose drawings they are: any others of it are as good
    originals: bool = False  # the images that the samples are reconstructions of, one by one

    def statistics(self, network: FeatureNetwork, layers: Sequence[str], workspace: Path,
                   ui: Ui) -> dict[str, Statistics]:  # fmt: skip
        """By layer. ArtifactError BF-ART-004: saved statistics of another network or layer, with both identities."""
        if self.images is not None:
            return statistics_of(self.images, network, layers, workspace, ui, "features of the reference")
        assert self.file is not None  # images or a file
        needed, instead = network.identity, "give the images themselves as --reference"
        if self.file.suffix == ".npz":
            if needed["name"] != "inception":
                raise ArtifactError(f"{self.what} are of the Inception network, not {needed['name']}",
                                    fix="--features inception, or " + instead, code="BF-ART-004")  # fmt: skip
            return {layer: load_adm(self.file, layer) for layer in layers}
        statistics, instead = load_statistics(self.file), instead + "; their statistics are computed and kept"
        saved, layer = statistics.identity.get("features"), statistics.identity.get("layer", "pool")
        if saved != needed:
            saved = saved if isinstance(saved, dict) else {}
            changed = [f"{key}: {saved.get(key)} -> {to}" for key, to in needed.items() if saved.get(key) != to]
            raise ArtifactError(f"{self.what} were made with other features", at="; ".join(changed), fix=instead,
                                code="BF-ART-004")  # fmt: skip
        if unlike := [name for name in layers if name != layer]:
            raise ArtifactError(f"{self.what} are of the layer {layer}, not {', '.join(unlike)}", fix=instead,
                                code="BF-ART-004")  # fmt: skip
        return {layer: statistics for layer in layers}


def reference_for(ref: Path | str | None, count: int, rules: Images, workspace: Path | str,
                  originals: bool = False, recursive: bool = False, of: str = "shapes") -> Reference:  # fmt: skip
    """A folder, an artifact (path or id), a file of statistics, or for None `count` drawings of the world `of`;
    `originals` are reconstructed and compared with one by one, as squares of `images.output_size`."""
    if ref is not None and Path(ref).suffix in STATISTICS:
        if originals:
            raise UsageError(f"{ref} holds statistics, and a reconstruction needs the images", fix="--reference FOLDER")
        published = Path(ref).suffix == ".npz"
        count = (load_adm(Path(ref), "pool") if published else load_statistics(Path(ref))).count
        return Reference(f"saved statistics {ref}", sha256_file(Path(ref)), count, file=Path(ref))
    images = images_for(ref, count, rules, workspace, recursive, of)
    if originals:
        images = squared(images, rules.output_size)
    elif len(images.entries) < 4:
        raise DataError(f"the reference, {images.what}, has {len(images.entries)} images; a covariance needs more",
                        fix="give a folder with at least as many images as there are samples",
                        code="BF-DATA-008")  # fmt: skip
    return Reference(images.what, images.content, len(images.entries), images, originals=originals,
                     world=of if ref is None and not originals else None)  # fmt: skip


def images_for(ref: Path | str | None, count: int, rules: Images, workspace: Path | str,
               recursive: bool = False, of: str = "shapes") -> ImageSet:  # fmt: skip
    if ref is None:
        return drawn(count, seed=WORLD_SEED, of=of)
    if Path(ref).is_dir() and not (Path(ref) / "manifest.json").exists():
        return from_folder(Path(ref), rules, recursive)
    artifact = resolve(workspace, ref)
    if artifact.kind == "latents":
        return images_of_store(artifact)
    return from_samples(resolve(workspace, ref, "samples"), rules)


@dataclass(frozen=True)
class ImageProvider:
    """Finds the images of an evaluation, or generates them, as the recipe says."""

    recipe: Recipe
    workspace: Path
    device: str
    ui: Ui
    sets: Sequence[str] | None = None  # see `generate`

    def inputs(self, request: EvalRequest) -> tuple[ImageSet, Reference | None]:
        """The images, generated where they are missing, and what they are compared with."""
        if request.reconstructs:
            from bifrost_cli.generation.reconstruct import reconstruct_set

            originals = self._reference(request, request.needed)
            assert originals is not None and originals.images is not None  # a reconstruction has them
            require_enough(originals.images, request.needed)
            made = reconstruct_set(self.recipe, originals.images, workspace=self.workspace, device=self.device,
                                   ui=self.ui)  # fmt: skip
            return from_samples(made, self.recipe.images), originals
        images: ImageSet | None
        if request.prompts is not None:
            images = self._generated(Path(request.prompts), n=request.copies, output=None)
        elif not (images := self._existing(request)):
            prompts = [prompt.text for prompt in world(self.recipe.shapes.world).held_out_prompts(request.needed)]
            self.ui.say(f"making {len(prompts)} images from held-out prompts first; the same command continues where "
                        "it stopped")  # fmt: skip
            images = self._generated(prompts)
        require_enough(images, request.needed)
        if any(metric.needs_prompts for metric in request.classes):
            require_one_kind([entry.plan for entry in images.entries], images.what)
        return images, self._reference(request, len(images.entries))

    def plan(self, request: EvalRequest) -> dict[str, Any]:
        """What would be measured against what; nothing is made."""
        if request.reconstructs:
            originals = self._reference(request, request.needed)
            assert originals is not None  # a reconstruction has them
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
        """What the images are compared with; None where no metric compares them."""
        if not any(metric.needs_reference or metric.reconstructs for metric in request.classes):
            return None
        if request.reference is None and not self.recipe.models.diffusion.startswith("builtin:"):
            raise UsageError(
                f"recipe {self.recipe.name} does not generate the built-in world, so there is no default reference",
                fix="give --reference FOLDER, a samples artifact, or a saved statistics file",
            )
        return reference_for(request.reference, count, self.recipe.images, self.workspace, request.reconstructs,
                             self.recipe.latents.recursive, self.recipe.shapes.world)  # fmt: skip

    def _generated(self, *prompts: Any, **options: Any) -> ImageSet:
        from bifrost_cli.generation.generate import generate

        made: Any = generate(self.recipe, *prompts, save_latents=True, workspace=self.workspace, device=self.device,
                        ui=self.ui, sets=self.sets, **options)  # fmt: skip
        return from_samples(made, self.recipe.images)

    def _existing(self, request: EvalRequest) -> ImageSet | None:
        """The images as far as none must be generated; None when a default set would be. DataError: none can be."""
        rules, needed = self.recipe.images, request.needed
        if request.samples is not None:
            folder = Path(request.samples)
            if is_layout(folder):
                images = from_layout(folder, rules)[0]
            elif folder.is_dir() and not (folder / "manifest.json").exists():
                images = from_folder(folder, rules, self.recipe.latents.recursive)
            else:
                images = from_samples(resolve(self.workspace, request.samples, "samples"), rules)
            return quartered(images) if request.quarters else images
        for artifact in find(self.workspace):  # the newest first
            if artifact.kind in ("branch", "controlnet"):
                self.ui.say(f"no samples with at least {needed} images since {artifact.id} was trained")
                break
            if artifact.kind == "samples" and (count := image_count(artifact)) >= needed:
                self.ui.say(f"samples: {artifact.id}, the newest with at least {needed} images ({count})")
                return from_samples(artifact, rules)
        else:
            self.ui.say(f"no samples artifact in {self.workspace} has at least {needed} images")
        if self.recipe.models.diffusion.startswith("builtin:"):
            return None
        raise DataError(
            f"no samples artifact in {self.workspace} has at least {needed} images of what is trained now",
            at=f"recipe {self.recipe.name} does not generate the built-in world, so there is no default set of prompts",
            fix="make them: bifrost generate --prompts FILE -o DIR", code="BF-DATA-008",
        )  # fmt: skip


def require_one_kind(plans: Sequence[str | None], what: str) -> None:
    """DataError: some are of a plan and some of the prompt alone (None), so that their mean is a number of neither."""
    planned = sum(plan is not None for plan in plans)
    if 0 < planned < len(plans):
        message = f"{planned} of {len(plans)} images were generated from a plan, the others from the prompt alone"
        raise DataError(message, at=what, fix="measure them apart", code="BF-DATA-007")


def require_enough(images: ImageSet, needed: int) -> None:
    """DataError, with how many images there are and how to get more."""
    if len(images.entries) < needed:
        raise DataError(
            f"{images.what} has {len(images.entries)} images; at least {needed} are needed", code="BF-DATA-008",
            at="with few images the Frechet distance is mostly bias: it halves when their number doubles",
            fix="make more: bifrost generate --prompts FILE -o DIR; or lower the limit: --min-samples N",
        )  # fmt: skip
