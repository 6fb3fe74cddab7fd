"""generate: prompts -> images, through the branch, the ControlNet and the diffusion model.

In: a recipe, prompts, and a branch and a ControlNet (given, or found). Out: one PNG file, or a samples artifact of
many, restartable image by image. Every PNG carries what made it. Does not know how the parts were trained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bifrost_cli import __version__
from bifrost_cli.artifacts import Artifact, Draft, default_path, identity_id
from bifrost_cli.artifacts.files import make_folder, write_bytes
from bifrost_cli.artifacts.identity import digest_of, provenance
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.png import contact_sheet, png_bytes, png_pixels
from bifrost_cli.errors import UsageError
from bifrost_cli.generation.offloaded import LatentsCache, Pipeline, latents_bytes
from bifrost_cli.generation.pipeline import timing_line
from bifrost_cli.generation.requests import ImageRequest, destination, image_requests, read_prompts
from bifrost_cli.generation.resume_log import ResumeLog, stopped, tidy
from bifrost_cli.loading.compatibility import GenerationModels, choose_models, has_own_conditioner, require_one_step
from bifrost_cli.loading.offload import deciding
from bifrost_cli.loading.resolve import resolve_device
from bifrost_cli.runtime.signals import StopFlag
from bifrost_cli.runtime.ui import Ui

SHEET = 256


@dataclass(frozen=True)
class GenerationRun:
    """What is asked for, apart from where it goes."""

    recipe: Recipe
    prompts: list[str]
    copies: int
    seed: int
    save_latents: bool
    grid: bool
    pair: GenerationModels

    @property
    def settings(self) -> dict[str, Any]:
        """What decides an image beside prompt, seed and weights (which the parents' ids stand for)."""
        recipe = self.recipe
        sizes = {"paint_size": recipe.images.output_size, "max_text_tokens": recipe.branch.max_text_tokens}
        small = {"weights": recipe.models.weights} if recipe.models.weights != "dtype" else {}
        return {**deciding(recipe), **sizes, "dtype": recipe.models.dtype, **small}

    @property
    def parents(self) -> tuple[Artifact, ...]:
        both = (self.pair.branch, self.pair.controlnet)
        return both[:1] if has_own_conditioner(self.pair.branch) else both

    @property
    def identity(self) -> dict[str, Any]:
        asked = {"prompts": digest_of(self.prompts), "count": len(self.prompts), "copies": self.copies}
        extras = {"save_latents": self.save_latents, "grid": self.grid}
        return {**asked, "seed": self.seed, "settings": self.settings, **extras}

    def image_requests(self) -> list[ImageRequest]:
        return list(image_requests(self.prompts, self.copies, self.seed))

    def plan(self, file: Path | None, folder: Path, device: str) -> dict[str, Any]:
        """What would be generated from what, and how much of it is there."""
        settings, wanted = self.recipe.generate, self.image_requests()
        return {
            "output": str(file or folder),
            "branch": self.pair.branch.id,
            "controlnet": self.pair.controlnet.id,
            "prompts": len(self.prompts),
            "pictures": len(wanted),
            "pictures_there": 0 if file else len({order.name for order in wanted} & _names(folder)),
            "plan_tokens": settings.plan_tokens if settings.plan else 0,
            "branch_passes": settings.decode_steps * (1 if settings.branch_guidance == 1.0 else 2),
            "diffusion_steps": settings.steps,
            "weights": self.recipe.models.weights,
            "offload": settings.offload,
            "device": str(resolve_device(device)),
        }

    def png(self, order: ImageRequest, plan: str | None, pixels_HWC: np.ndarray) -> bytes:
        """The image with everything that made it in its text chunks; no time, no host, no position in a batch."""
        facts = {
            "settings": self.settings,
            "artifacts": {parent.kind: parent.id for parent in self.parents},
            "versions": provenance()["versions"],
        }
        planned = {} if plan is None else {"plan": plan}
        text = {"prompt": order.prompt, **planned, "seed": str(order.seed), "Software": f"bifrost {__version__}"}
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
    """Generate `n` images of each prompt: one (str), a list, or a file with one a line (Path). A call loads the models
    once, so that many prompts belong into one.

    `output` FILE.png (one image) returns that path; a folder, or None (workspace/samples-HASH), returns a samples
    artifact: 00000.png, ..., prompts.jsonl, with `grid` grid.png, with `save_latents` latents/00000.safetensors.
    Image i of a prompt has seed `seed + i`; (prompt, seed, settings, weights) decide its bytes on one machine.
    UsageError: an empty prompt, an output that exists. ArtifactError: parts that do not fit. Stopped (75): a signal
    between images; the same call again goes on. With `dry_run` the plan is returned; no weight is read, nothing made.
    """
    ui = ui or Ui()
    if n < 1:
        raise UsageError(f"{n} images of each prompt is not a number of pictures", fix="-n 1")
    found = read_prompts(prompts, ui)
    file = destination(output, len(found) * n)
    if file and grid:
        raise UsageError("--grid needs several pictures", fix="give a folder: -o DIR; or leave --grid out")
    pair = choose_models(branch, controlnet, workspace)
    require_one_step(pair.branch, recipe.generate.decode_steps)
    ui.say(pair.why)
    job = GenerationRun(recipe, found, n, seed, save_latents, grid, pair)
    own = default_path(workspace, "samples", identity_id("samples", job.identity, job.parents))
    if dry_run:
        return job.plan(file, Path(output or own), device)
    pipeline = Pipeline(recipe, pair, device, ui)
    if file:
        made: Artifact | Path = _generate_file(job, pipeline, file, ui)
    else:
        made = _generate_folder(job, pipeline, Path(output or own), device, ui)
    if timings:
        ui.say(f"time: {timing_line(pipeline.seconds) or 'nothing was painted'}")
    return made


def _names(folder: Path) -> set[str]:
    """What a folder holds; nothing where there is none."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


# ---- one file -----------------------------------------------------------------------------------------------------


def _generate_file(job: GenerationRun, pipeline: Pipeline, file: Path, ui: Ui) -> Path:
    latents = file.with_suffix(".safetensors")
    if job.save_latents and latents.exists():
        raise UsageError(f"{latents} exists already", fix="choose another name with -o", code="BF-USE-002")
    (order,) = job.image_requests()
    predict = pipeline.predict(order)
    pixels_HWC, cut = pipeline.render(order, predict)
    make_folder(file.parent)
    if job.save_latents:
        write_bytes(latents, latents_bytes(predict))
    write_bytes(file, job.png(order, predict.plan, pixels_HWC))
    _say_cut(int(cut), ui)
    ui.say(f"{file}: seed {order.seed}; another: --seed {order.seed + 1}")
    return file


# ---- a samples artifact -------------------------------------------------------------------------------------------


def _generate_folder(job: GenerationRun, pipeline: Pipeline, folder: Path, device: str, ui: Ui) -> Artifact:
    with StopFlag() as stop, Draft.open(folder, "samples", job.identity, job.parents) as draft:
        if draft.complete:
            draft.complete.check()
            tidy(folder)
            ui.say(f"{folder} holds these images already; they were verified")
            return draft.complete
        log, wanted = ResumeLog(draft.path), job.image_requests()
        if found := sum(log.there(order.index) for order in wanted):
            ui.say(f"{found} of {len(wanted)} images are there already")
        for finished in (log.there, log.done):  # first what is missing, then what is damaged
            _generate_missing(job, pipeline, draft, log, [o for o in wanted if not finished(o.index)], stop, ui)
        artifact = _commit(job, draft, log, wanted, pipeline, device)
    tidy(folder)
    _say_cut(artifact.info["cut"], ui)
    ui.say(f"{folder}: {len(wanted)} images; judge them: bifrost eval --samples {folder}")
    return artifact


def _generate_missing(
    job: GenerationRun,
    pipeline: Pipeline,
    draft: Draft,
    log: ResumeLog,
    missing: list[ImageRequest],
    stop: StopFlag,
    ui: Ui,
) -> None:
    """Sketch and generate each; with `offload` all are predicted first, and the predicted latents kept in the unfinished folder."""
    total = job.copies * len(job.prompts)

    def check(rendered: int = 0) -> None:
        if stop.requested:
            raise stopped(total - len(missing) + rendered, total, draft.path)

    if not missing:
        return
    cache = LatentsCache(draft.path) if pipeline.apart else None
    with ui.progress(len(missing), "pictures") as bar:
        if cache:
            cache.make(missing, pipeline.predict, check)
        for done, order in enumerate(missing):
            check(done)
            predict = cache.of(order) if cache else pipeline.predict(order)
            pixels_HWC, cut = pipeline.render(order, predict)
            files = {order.name: job.png(order, predict.plan, pixels_HWC)}
            if job.save_latents:
                files[f"latents/{order.index:05d}.safetensors"] = latents_bytes(predict)
            log.add(order.index, files, {"plan": predict.plan, "cut": cut})
            bar.advance(1)


def _commit(
    job: GenerationRun, draft: Draft, log: ResumeLog, wanted: list[ImageRequest], pipeline: Pipeline, device: str
) -> Artifact:
    lines = [
        {"index": o.index, "file": o.name, "prompt": o.prompt, "plan": log.facts[o.index]["plan"], "seed": o.seed}
        for o in wanted
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_bytes(draft.path / "prompts.jsonl", text.encode("utf-8"))
    if job.grid:
        shown = [png_pixels((draft.path / order.name).read_bytes()) for order in wanted[:SHEET]]
        write_bytes(draft.path / "grid.png", png_bytes(contact_sheet(shown)))
    cut = sum(log.facts[order.index]["cut"] for order in wanted)
    info = {"settings": job.settings, "cut": cut, "recipe": job.recipe.model_dump(mode="json")}
    stages = {stage: round(value, 3) for stage, value in pipeline.seconds.items()}
    cost = {"samples": len(wanted), "stages": stages}
    return draft.commit(info, made={"seed": job.seed, "device": device}, cost=cost)


def _say_cut(count: int, ui: Ui) -> None:
    if count:
        ui.say(f"{count} of the images had a prompt or a plan longer than the models read; its end was cut")
