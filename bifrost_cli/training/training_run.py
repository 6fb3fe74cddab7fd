"""What `train branch` and `train controlnet` share: choosing the store, planning, running the loop, committing.

In: a `Job` (a task, its identity, what is frozen). Out: an artifact with `model.safetensors` (averaged weights, only
what was trained), `config.json`, `losses.csv`, `validation.csv` and `samples/`. Does not know which model is trained.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bifrost_cli.artifacts import Artifact, Draft, default_path, identity_id, newest, resolve
from bifrost_cli.artifacts.files import make_folder, remove, sweep, write_bytes, write_json
from bifrost_cli.config.schema import Recipe, Train, identity_of
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.data.safetensors_io import save_tensors
from bifrost_cli.errors import ArtifactError, BifrostError, DataError, DiskFull, RecipeError, UsageError, memory_errors
from bifrost_cli.loading.compatibility import require_latents_named
from bifrost_cli.loading.open_clip_models import features_name
from bifrost_cli.runtime import distributed
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.training.checkpoint import Checkpoints
from bifrost_cli.training.data_order import image_of
from bifrost_cli.training.loop import FitResult, Task, fit

RECORDS = ("losses.csv", "validation.csv")


@dataclass(frozen=True)
class TrainingRun:
    """One training: `frozen` hashes the weights that must not change, `frozen_hash` is what it gave before."""

    kind: str
    recipe: Recipe
    train: Train
    store: LatentsStore
    identity: dict[str, Any]
    task: Task
    config: dict[str, Any]
    frozen: Callable[[], str]
    frozen_hash: str
    device: torch.device

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        return sum(parameter.numel() for parameter in self.task.module.parameters() if parameter.requires_grad)


def choose_store(recipe: Recipe, latents: Path | str | None, workspace: Path | str, ui: Ui) -> LatentsStore:
    """The given latents artifact, else the newest of the workspace; checked. ArtifactError or StoreError (5).

    BF-ART-004 when its encoder has not the recipe's name: found before any weight is loaded.
    """
    found = resolve(workspace, latents, "latents") if latents is not None else newest(workspace, "latents")
    why = "as given" if latents is not None else f"the newest in {workspace}"
    ui.say(f"latents: {found.path} ({found.id}), {why}")
    store = LatentsStore.open(found)
    require_latents_named(store, features_name(recipe.latents.encoder), recipe.name)
    if store.rows < 3 and len({image_of(key) for key in store.keys}) < 2:
        raise DataError(
            f"{found.path} has {store.rows} rows: too few to train on and validate",
            code="BF-DATA-008",
            fix="extract more images: bifrost extract-latents",
        )
    return store


def shared_identity(store: LatentsStore, section: Any) -> dict[str, Any]:
    """What any part trained on a store is: the kind of latents, and the recipe's section without run-only keys."""
    settings = identity_of(section)
    return {"encoder": store.encoder, "grid": list(store.grid), "channels": store.channels, "settings": settings}


def run_training(
    job: TrainingRun, *, output: Path | str | None, workspace: Path | str, resume: Path | str, dry_run: bool, ui: Ui
) -> Artifact | dict[str, Any]:
    """Train, or continue, or say that it is done; with `dry_run` return the plan and touch nothing.

    `resume`: "auto" continues what the same command left, a run folder or a checkpoint in it names that place.
    """
    parents = [job.store.artifact]
    chosen = output if str(resume) == "auto" else _run_folder(resume, output)
    path = Path(chosen or default_path(workspace, job.kind, identity_id(job.kind, job.identity, parents)))
    plan = _plan(job, path)
    if dry_run:
        return plan
    _require_rows(job)
    distributed.share(job.train.batch_size, f"{job.kind}.train.batch_size")
    with distributed.main_context(lambda: Draft.open(path, job.kind, job.identity, parents)) as draft:
        if distributed.run_on_main(lambda: _is_made(draft, plan)):
            ui.say(f"{path} holds this {job.kind} already")
            return Artifact.open(path)
        ui.say(
            f"{job.kind}: {job.parameters:,} trained parameters, {job.train.steps} steps on {plan['rows']} rows, "
            f"in {path}{_processes(job)}"
        )
        with memory_errors(f"a step of the {job.kind}'s training", _needs_less(job)):
            result = fit(job.task, job.train, path / "work", device=job.device, ui=ui)
        _require_untouched(job)
        distributed.run_on_main(lambda: _commit(job, draft, result))
    return Artifact.open(path)


def _is_made(draft: Draft, plan: dict[str, Any]) -> bool:
    if draft.complete:
        _tidy(draft.path / "work")
    elif not draft.continued and plan["disk_needed"] > plan["disk_free"]:
        raise DiskFull(
            f"a {draft.kind} training does not fit on the disk of {draft.path}",
            at=f"need {plan['disk_needed']:,} bytes, free {plan['disk_free']:,}",
            fix=f"free some space, or --set {draft.kind}.train.keep=1",
        )
    return draft.complete is not None


def _processes(job: TrainingRun) -> str:
    count = distributed.world()
    return f", by {count} processes ({job.train.parallel}), {job.train.batch_size // count} rows each" * (count > 1)


def _needs_less(job: TrainingRun) -> str:
    """The next setting to try: first the one that changes no byte of the result, so that the run goes on with it."""
    train, key = job.train, f"--set {job.kind}.train."
    if not train.gradient_checkpointing:
        return f"{key}gradient_checkpointing=true (the same bytes; it continues from the last checkpoint)"
    if train.batch_size > 1:
        return f"{key}batch_size={train.batch_size // 2} {key}accumulate={2 * train.accumulate}, into a new folder"
    return f"{key}optimizer=adamw8bit, into a new folder; or a GPU with more memory"


def _commit(job: TrainingRun, draft: Draft, result: FitResult) -> None:
    work = draft.path / "work"
    save_tensors(draft.path / "model.safetensors", result.ema_state, {"kind": job.kind})
    if result.raw_state:
        save_tensors(draft.path / "raw.safetensors", result.raw_state, {"kind": job.kind})
    write_json(draft.path / "config.json", job.config)
    for name in RECORDS:
        if (work / name).exists():
            write_bytes(draft.path / name, (work / name).read_bytes())
    if (work / "samples").is_dir():
        make_folder(draft.path / "samples")
        for sheet in sorted((work / "samples").iterdir()):
            write_bytes(draft.path / "samples" / sheet.name, sheet.read_bytes())
    device = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else str(job.device)
    draft.commit(
        {"recipe": job.recipe.model_dump(mode="json"), "metrics": result.metrics, "parameters": job.parameters},
        made={"device": device, "seed": job.train.seed},
        cost={"seconds": round(result.seconds, 1), "device": device, "samples": result.samples_seen},
    )
    _tidy(work)


def _tidy(work: Path) -> None:
    """The artifact is whole: nothing can be continued from here any more, also if the last run was killed in this."""
    remove(work / "checkpoints")
    sweep(work)


def _plan(job: TrainingRun, path: Path) -> dict[str, Any]:
    """What the training will do and need, in bytes: weights, gradients and averaged weights are float32, AdamW's two
    averages float32 or 8 bits with a scale for each block of 256."""
    kept = 4 + (2 * (1 + 4 / 256) if job.train.optimizer == "adamw8bit" else 8) + 4 * bool(job.train.ema)
    raw = bool(job.train.ema) and job.train.ema_warmup  # kept beside the averages
    steps = Checkpoints(path / "work" / "checkpoints").steps()
    place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    rows = len(job.task.train_rows)
    return {
        "output": str(path),
        "latents": job.store.artifact.id,
        "rows": rows,
        "held_out": len(job.task.held_rows),
        "steps": job.train.steps,
        "epochs": round(job.train.steps * job.train.batch_size * job.train.accumulate / rows, 2),
        "continues_at": steps[-1] if steps else 0,
        "parameters": job.parameters,
        "memory_of_the_trained_part": round(job.parameters * (kept + 4)),
        "disk_needed": round(job.parameters * (kept * (job.train.keep + 1) + 4 * (1 + raw))),
        "disk_free": shutil.disk_usage(place).free,
        "device": str(job.device),
    }


def _require_rows(job: TrainingRun) -> None:
    rows, size = len(job.task.train_rows), job.train.batch_size
    if size > rows:
        raise RecipeError(
            f"{job.kind}.train.batch_size {size} is more than the {rows} rows to train on",
            at=f"{job.store.artifact.path} has {job.store.rows} rows, {job.store.rows - rows} held out",
            fix=f"--set {job.kind}.train.batch_size={rows}",
            code="BF-RECIPE-005",
        )


def _require_untouched(job: TrainingRun) -> None:
    if (now := job.frozen()) != job.frozen_hash:
        raise BifrostError(
            f"training the {job.kind} changed weights that are frozen",
            at=f"sha256 {job.frozen_hash[:12]} -> {now[:12]}",
            fix="please report this",
        )


def _run_folder(resume: Path | str, output: Path | str | None) -> Path:
    """The run folder that `--resume` names, by itself or by its newest checkpoint."""
    if output is not None:
        raise UsageError(
            f"--resume {resume} continues where it is, so -o {output} would be ignored",
            fix="give one",
            code="BF-USE-001",
        )
    named = Path(resume)
    folder = named.parents[2] if named.name.startswith("step-") and len(named.parents) > 2 else named
    steps = Checkpoints(folder / "work" / "checkpoints").steps()
    if not named.is_dir() or not steps:
        raise ArtifactError(
            f"{named} holds no checkpoint to resume from", fix="leave --resume out to start", code="BF-ART-001"
        )
    newest_one = Checkpoints(folder / "work" / "checkpoints").path(steps[-1])
    if folder != named and newest_one.name != named.name:
        raise UsageError(
            f"{named} is not the newest checkpoint of its run",
            at=str(newest_one),
            code="BF-USE-001",
            fix=f"--resume {newest_one}, or remove the newer ones first",
        )
    return folder
