"""generate: prompts to one PNG file, or to a samples artifact that an interrupted run continues image by image.

Every PNG carries what made it. The heavy libraries are imported after what needs no model was checked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import numpy as np

from bifrost_cli import __version__
from bifrost_cli.artifacts import Artifact, Draft, default_path, identity_id
from bifrost_cli.artifacts.files import exists, make_folder, write_bytes, write_new
from bifrost_cli.artifacts.identity import digest_of, provenance
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.png import contact_sheet, png_bytes, png_pixels
from bifrost_cli.errors import UsageError
from bifrost_cli.generation.requests import ImageRequest, destination, image_requests, image_settings, read_prompts
from bifrost_cli.runtime.ui import Ui, counted

if TYPE_CHECKING:
    from bifrost_cli.generation.choose_models import GenerationModels
    from bifrost_cli.generation.pipeline import BifrostPipeline
    from bifrost_cli.generation.prior import PredictedLatents

SHEET = 256  # images of a grid


@dataclass(frozen=True)
class GenerationRun:
    """What is to be generated from what, apart from where it goes."""

    recipe: Recipe
    prompts: list[str]
    copies: int
    seed: int
    save_latents: bool
    grid: bool
    models: GenerationModels

    @property
    def settings(self) -> dict[str, Any]:
        """What decides an image beside prompt, seed and weights (which the parents' ids stand for)."""
        return image_settings(self.recipe, max_text_tokens=self.recipe.branch.max_text_tokens)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the samples artifact."""
        requested = {"prompts": digest_of(self.prompts), "count": len(self.prompts), "copies": self.copies}
        extras = {"save_latents": self.save_latents, "grid": self.grid}
        return {**requested, "seed": self.seed, "settings": self.settings, **extras}

    def image_requests(self) -> list[ImageRequest]:
        """One for each image, in order."""
        return list(image_requests(self.prompts, self.copies, self.seed))

    def plan(self, file: Path | None, folder: Path, device: str) -> dict[str, Any]:
        """What a dry run says: what would be generated from what, and how much of it is there."""
        from bifrost_cli.loading.resolve import resolve_device

        settings, requests = self.recipe.generate, self.image_requests()
        there = {path.name for path in folder.iterdir()} if folder.is_dir() and not file else set()
        return {
            "output": str(file or folder),
            "branch": self.models.branch.id,
            "controlnet": self.models.controlnet.id,
            "prompts": len(self.prompts),
            "pictures": len(requests),
            "pictures_there": len({request.name for request in requests} & there),
            "plan_tokens": settings.plan_tokens if settings.plan else 0,
            "branch_passes": settings.decode_steps * (1 if settings.branch_guidance == 1.0 else 2),
            "diffusion_steps": settings.steps,
            "weights": self.recipe.models.weights,
            "offload": settings.offload,
            "device": str(resolve_device(device)),
        }

    def png(self, request: ImageRequest, plan: str | None, pixels_HWC: np.ndarray) -> bytes:
        """The image with everything that made it in its text chunks; no time, no host, no position in a batch."""
        facts = {
            "settings": self.settings,
            "artifacts": {parent.kind: parent.id for parent in self.models.parents},
            "versions": provenance()["versions"],
        }
        planned = {} if plan is None else {"plan": plan}
        text = {"prompt": request.prompt, **planned, "seed": str(request.seed), "Software": f"bifrost {__version__}"}
        return png_bytes(pixels_HWC, text | {key: json.dumps(value) for key, value in facts.items()})


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
    device: str = "auto",
    dry_run: bool = False,
    ui: Ui | None = None,
) -> Artifact | Path | dict[str, Any]:
    """Generate images of prompts, as the command does. A call loads the models once; `BifrostPipeline` keeps them.

    Args:
        recipe: models and settings.
        prompts: one (str), a list, or a file with one a line (Path).
        output: FILE.png for one image, or a folder; None is workspace/samples-HASH.
        branch: a branch artifact; None chooses (`choose_models`).
        controlnet: a ControlNet artifact likewise.
        workspace: where artifacts are looked up and made.
        n: images of each prompt; image i has seed `seed + i`.
        seed: (prompt, seed, settings, weights) decide an image's bytes on one machine.
        grid: also put all images into grid.png.
        save_latents: also keep the predicted patch latents.
        timings: say how long each stage took.
        device: where to compute.
        dry_run: return the plan; no weight is read, nothing is written.
        ui: hears what was chosen, the plans, and progress.

    Returns:
        The path of FILE.png, or the samples artifact: 00000.png, ..., prompts.jsonl; or the plan of a dry run.

    Raises:
        UsageError: an empty prompt, an output that exists.
        ArtifactError: parts that do not fit.
        Stopped: (75) a signal between images; the same call again continues.
    """
    ui = ui or Ui()
    if n < 1:
        raise UsageError(f"{n} images of each prompt is not a number of images", fix="-n 1")
    texts = read_prompts(prompts, ui)
    file = destination(output, len(texts) * n)
    if file and grid:
        raise UsageError("--grid needs several images", fix="give a folder: -o DIR; or leave --grid out")
    from bifrost_cli.generation.choose_models import choose_models
    from bifrost_cli.generation.pipeline import BifrostPipeline
    from bifrost_cli.generation.stages import timing_line
    from bifrost_cli.loading.compatibility import require_one_step

    models = choose_models(branch, controlnet, workspace)
    require_one_step(models.branch, recipe.generate.decode_steps)
    ui.say(models.why)
    run = GenerationRun(recipe, texts, n, seed, save_latents, grid, models)
    default = default_path(workspace, "samples", identity_id("samples", run.identity, models.parents))
    if dry_run:
        return run.plan(file, Path(output or default), device)
    one_half = recipe.generate.offload != "none"
    pipe = BifrostPipeline(recipe, models.branch, models.controlnet, device=device, one_half=one_half, ui=ui)
    result = _to_file(run, pipe, file, ui) if file else _to_folder(run, pipe, Path(output or default), device, ui)
    if timings:
        ui.say(f"time: {timing_line(pipe.seconds) or 'nothing was generated'}")
    return result


def _to_file(run: GenerationRun, pipe: BifrostPipeline, file: Path, ui: Ui) -> Path:
    from bifrost_cli.generation.samples_folder import latents_bytes

    latents = file.with_suffix(".safetensors")
    (request,) = run.image_requests()
    predicted = pipe.predict(request)
    data = latents_bytes(predicted) if run.save_latents else b""
    kept = run.save_latents and os.path.lexists(latents)
    if kept and not (latents.is_file() and latents.read_bytes() == data):  # the same: a run was killed before its image
        raise exists(latents)
    pixels_HWC = pipe.render(request, predicted)
    make_folder(file.parent)
    if run.save_latents and not kept:
        write_new(latents, data)
    write_new(file, run.png(request, predicted.plan, pixels_HWC))
    _say_cut(int(pipe.cuts(request, predicted)), ui)
    ui.say(f"{file}: seed {request.seed}; another: --seed {request.seed + 1}")
    return file


def _to_folder(run: GenerationRun, pipe: BifrostPipeline, folder: Path, device: str, ui: Ui) -> Artifact:
    from bifrost_cli.generation.samples_folder import SamplesFolder, latents_bytes

    requests = run.image_requests()

    def render(request: ImageRequest, predicted: PredictedLatents) -> tuple[dict[str, bytes], dict[str, Any]]:
        files = {request.name: run.png(request, predicted.plan, pipe.render(request, predicted))}
        if run.save_latents:
            files[f"latents/{request.index:05d}.safetensors"] = latents_bytes(predicted)
        return files, {"plan": predicted.plan, "cut": pipe.cuts(request, predicted)}

    def commit(draft: Draft, facts: Mapping[int, dict[str, Any]]) -> Artifact:
        lines = [{"index": r.index, "file": r.name, "prompt": r.prompt, "plan": facts[r.index]["plan"], "seed": r.seed}
                 for r in requests]  # fmt: skip
        write_lines(draft.path / "prompts.jsonl", lines)
        if run.grid:
            shown = [png_pixels((draft.path / request.name).read_bytes()) for request in requests[:SHEET]]
            write_bytes(draft.path / "grid.png", png_bytes(contact_sheet(shown)))
        cut = sum(facts[request.index]["cut"] for request in requests)
        info = {"settings": run.settings, "cut": cut, "recipe": run.recipe.model_dump(mode="json")}
        stages = {stage: round(value, 3) for stage, value in pipe.seconds.items()}
        cost = {"samples": len(requests), "stages": stages}
        return draft.commit(info, made={"seed": run.seed, "device": device}, cost=cost)

    samples = SamplesFolder(folder, run.identity, run.models.parents, requests, ui)
    artifact = samples.fill(pipe.predict, render, commit, latents_first=pipe.one_half)
    _say_cut(artifact.info["cut"], ui)
    ui.say(f"{folder}: {counted(len(requests), 'image')}; evaluate them: bifrost eval --samples {quote(str(folder))}")
    return artifact


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON lines."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_bytes(path, text.encode("utf-8"))


def _say_cut(count: int, ui: Ui) -> None:
    if count:
        ui.say(f"{count} of the images had a prompt or a plan longer than the models read or write; its end was cut")
