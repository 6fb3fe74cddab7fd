"""generate: prompts to one image file, or to a samples artifact that an interrupted run continues image by image.

Every image carries what made it. The heavy libraries are imported after what needs no model was checked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from bifrost_cli.artifacts import Artifact, Draft, default_path, identity_id
from bifrost_cli.artifacts.files import exists, make_folder, write_bytes, write_new
from bifrost_cli.artifacts.identity import digest_of
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.png import contact_sheet, image_bytes, png_pixels
from bifrost_cli.errors import EnvironmentProblem, UsageError
from bifrost_cli.generation.requests import destination, image_requests, image_settings, png_facts, read_prompts
from bifrost_cli.runtime.launch import together
from bifrost_cli.runtime.ui import Ui, counted

if TYPE_CHECKING:
    from bifrost_cli.generation.pipeline import BifrostPipeline
    from bifrost_cli.generation.requests import ImageRequest
    from bifrost_cli.generation.stages import PredictedLatents

SHEET = 256  # images of a grid


@dataclass(frozen=True)
class _Run:
    """What is generated from what, with the loaded pipeline; `settings` decide an image beside prompt and seed."""

    recipe: Recipe
    requests: list[ImageRequest]
    settings: dict[str, Any]
    identity: dict[str, Any]
    parents: Sequence[Artifact]
    pipe: BifrostPipeline
    ui: Ui

    def images(
        self, requests: Sequence[ImageRequest], predicted: Sequence[PredictedLatents], suffix: str = ".png"
    ) -> list[bytes]:
        made = zip(self.pipe.render_batch(requests, predicted), requests, predicted, strict=True)
        return [
            image_bytes(pixels_HWC, png_facts(request, self.settings, self.parents, latents.plan), suffix=suffix)
            for pixels_HWC, request, latents in made
        ]


@together
def generate(
    recipe: Recipe,
    prompts: str | Path | Sequence[str],
    *,
    output: Path | str | None = None,
    branch: Path | str | None = None,
    controlnet: Path | str | None = None,
    workspace: Path | str = "runs",
    n: int = 1,
    seed: int = 0,
    grid: bool = False,
    save_latents: bool = False,
    timings: bool = False,
    batch: int = 1,
    device: str = "auto",
    dry_run: bool = False,
    ui: Ui | None = None,
    sets: Sequence[str] | None = None,
) -> Artifact | Path | dict[str, Any]:
    """Generate images of prompts, as the command does. A call loads the models once; `BifrostPipeline` keeps them.

    Args:
        recipe: models and settings; see `sets`.
        prompts: one (str), a list, or a file with one a line (Path).
        output: FILE.png, .jpg or .webp for one image, or a folder; None is workspace/samples-HASH.
        branch: a branch artifact; None chooses (`choose_models`).
        controlnet: a ControlNet artifact likewise.
        workspace: where artifacts are looked up and made.
        n: images of each prompt; image i has seed `seed + i`.
        seed: (prompt, seed, settings, weights) decide an image's bytes on one machine.
        grid: also put all images into grid.png.
        save_latents: also keep the predicted patch latents.
        timings: say how long each stage took.
        batch: images at a time. From 2 on, the last bits of an image depend on those beside it, the samples' settings
            say so, and they continue no samples of another batch.
        device: where to compute.
        dry_run: return the plan; no weight is read, nothing is written.
        ui: hears what was chosen, the plans, and progress.
        sets: not None: by the recipe that trained the branch, with these `section.key=value` settings, instead.

    Returns:
        The path of the file, or the samples artifact: 00000.png, ..., prompts.jsonl; or the plan of a dry run.

    Raises:
        UsageError: an empty prompt, an output that exists.
        ArtifactError: parts that do not fit.
        Stopped: (75) a signal between images; the same call again continues.
    """
    ui = ui or Ui()
    if n < 1:
        raise UsageError(f"{n} images of each prompt is not a number of images", fix="-n 1")
    if batch < 1:
        raise UsageError(f"{batch} images at a time is not a number of images", fix="--batch 1")
    texts = read_prompts(prompts, ui)
    file = destination(output, len(texts) * n)
    if file and grid:
        raise UsageError("--grid needs several images", fix="give a folder: -o DIR; or leave --grid out")
    from bifrost_cli.generation.choose_models import choose_models
    from bifrost_cli.generation.pipeline import BifrostPipeline
    from bifrost_cli.loading.compatibility import has_own_conditioner, require_one_step
    from bifrost_cli.loading.loaders import decisive_files
    from bifrost_cli.loading.resolve import resolve_device
    from bifrost_cli.runtime import distributed

    models = distributed.run_on_main(lambda: choose_models(branch, controlnet, workspace))
    if sets is not None:
        recipe = models.own_recipe(sets)
    wanted = recipe.generate
    require_one_step(models.branch, wanted.decode_steps)
    ui.say(models.why)
    parents = [models.branch] if has_own_conditioner(models.branch) else [models.branch, models.controlnet]
    requests = list(image_requests(texts, n, seed))
    files: dict[str, str] = {}
    with suppress(*((EnvironmentProblem,) if dry_run else ())):  # of a plan the models need not be here
        files = {**decisive_files("mllm", recipe.models), **decisive_files("diffusion", recipe.models)}
    settings = image_settings(recipe, max_text_tokens=recipe.branch.max_text_tokens, **files)
    settings |= {"batch": batch} if batch > 1 else {}
    requested = {"prompts": digest_of(texts), "count": len(texts), "copies": n, "seed": seed}
    identity = {**requested, "settings": settings, "save_latents": save_latents, "grid": grid}
    folder = Path(output or default_path(workspace, "samples", identity_id("samples", identity, parents)))
    if dry_run:
        there = {path.name for path in folder.iterdir()} if folder.is_dir() and not file else set()
        return {
            "output": str(file or folder), "branch": models.branch.id, "controlnet": models.controlnet.id,
            "prompts": len(texts), "pictures": len(requests),
            "pictures_there": len({request.name for request in requests} & there),
            "plan_tokens": wanted.plan_tokens if wanted.plan else 0,
            "branch_passes": wanted.decode_steps * (1 if wanted.branch_guidance == 1.0 else 2),
            "diffusion_steps": wanted.steps, "batch": batch, "weights": recipe.models.weights,
            "offload": wanted.offload, "device": str(resolve_device(device)),
        }  # fmt: skip
    one_half = wanted.offload != "none"
    pipe = BifrostPipeline(recipe, models.branch, models.controlnet, device=device, one_half=one_half, ui=ui)
    run = _Run(recipe, requests, settings, identity, parents, pipe, ui)
    result: Artifact | Path
    if file:
        result, cut, told = distributed.run_on_main(lambda: _to_file(run, file, save_latents))
    else:
        result, cut, told = _to_folder(run, folder, seed, device, batch)
    if cut:
        ui.say(f"{cut} of the images had a prompt or a plan longer than the models read or write; its end was cut")
    ui.say(told)
    if timings:
        spent = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in pipe.seconds.items())
        ui.say(f"time: {spent or 'nothing was generated'}")
    return result


def _to_file(run: _Run, file: Path, save_latents: bool) -> tuple[Path, int, str]:
    """The image; how many were cut; what to say of it."""
    from bifrost_cli.generation.samples_folder import latents_bytes

    latents, (request,) = file.with_suffix(".safetensors"), run.requests
    predicted = run.pipe.predict(request)
    data = latents_bytes(predicted) if save_latents else b""
    kept = save_latents and os.path.lexists(latents)
    if kept and not (latents.is_file() and latents.read_bytes() == data):  # the same: a run was killed before its image
        raise exists(latents)
    (image,) = run.images([request], [predicted], file.suffix.lower())
    make_folder(file.parent)
    if save_latents and not kept:
        write_new(latents, data)
    write_new(file, image)
    told = f"{file}: seed {request.seed}; another: --seed {request.seed + 1}"
    return file, int(run.pipe.cuts(request, predicted)), told


def _to_folder(run: _Run, folder: Path, seed: int, device: str, batch: int) -> tuple[Artifact, int, str]:
    from bifrost_cli.generation.samples_folder import Work, fill_folder, latents_bytes
    from bifrost_cli.runtime import distributed

    pipe, requests = run.pipe, run.requests

    def render(
        requests: Sequence[ImageRequest], predicted: Sequence[PredictedLatents]
    ) -> list[tuple[dict[str, bytes], dict[str, Any]]]:
        made = []
        for request, latents, png in zip(requests, predicted, run.images(requests, predicted), strict=True):
            files = {request.name: png}
            if run.identity["save_latents"]:
                files[f"latents/{request.index:05d}.safetensors"] = latents_bytes(latents)
            made.append((files, {"plan": latents.plan, "cut": pipe.cuts(request, latents)}))
        return made

    def commit(draft: Draft, facts: Mapping[int, dict[str, Any]]) -> Artifact:
        lines = [{"index": r.index, "file": r.name, "prompt": r.prompt, "plan": facts[r.index]["plan"], "seed": r.seed}
                 for r in requests]  # fmt: skip
        write_lines(draft.path / "prompts.jsonl", lines)
        if run.identity["grid"]:
            shown = [png_pixels((draft.path / request.name).read_bytes()) for request in requests[:SHEET]]
            write_bytes(draft.path / "grid.png", image_bytes(contact_sheet(shown), {}))
        cut = sum(facts[request.index]["cut"] for request in requests)
        info = {"settings": run.settings, "cut": cut, "recipe": run.recipe.model_dump(mode="json")}
        stages = {stage: round(value, 3) for stage, value in pipe.seconds.items()}
        several = {"processes": distributed.world()} if distributed.world() > 1 else {}
        cost = {"samples": len(requests), "stages": stages, **several}
        return draft.commit(info, made={"seed": seed, "device": device}, cost=cost)

    work = Work(pipe.predict_batch, render, commit, latents_first=pipe.one_half, batch=batch)
    artifact = fill_folder(folder, run.identity, run.parents, requests, work, run.ui)
    count = counted(len(requests), "image")
    told = f"{folder}: {count}; evaluate them: bifrost eval --samples {quote(str(folder))}"
    return artifact, artifact.info["cut"], told


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON lines."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_bytes(path, text.encode("utf-8"))
