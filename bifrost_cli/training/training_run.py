"""What `train branch` and `train controlnet` share: choosing the store, its rows, planning, running, committing. The
artifact holds `model.safetensors` (averaged weights, only what was trained; with `ema_warmup` the live ones in
`raw.safetensors`), `config.json`, `losses.csv`, `validation.csv` and `samples/`."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from bifrost_cli.artifacts import Artifact, Draft, default_path, identity_id, newest, resolve
from bifrost_cli.artifacts.files import make_folder, sweep, write_bytes, write_json
from bifrost_cli.config.schema import Recipe, Train
from bifrost_cli.config.section import identity_of
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.data.png import contact_sheet, png_bytes
from bifrost_cli.data.safetensors_io import save_tensors
from bifrost_cli.data.sources.remote import is_remote
from bifrost_cli.errors import BifrostError, DataError, DiskFull, RecipeError, memory_errors
from bifrost_cli.loading.compatibility import require_latents
from bifrost_cli.loading.open_clip_models import features_name
from bifrost_cli.models.transfer import pinned, to_device
from bifrost_cli.runtime import distributed
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.training.checkpoint import Checkpoints
from bifrost_cli.training.continuation import Origin, begin_with, copy_tables, require_origin, resumed
from bifrost_cli.training.data_order import batch_indices, derive, held_out, image_of
from bifrost_cli.training.loop import FitResult, fit, stays_until

SHOWN = 8  # images of a sample grid
_LOOKED_AT = 2000  # rows whose texts are measured before the training; a store may have millions


@dataclass(frozen=True)
class HostBatch:
    """What of a batch is read ahead, in main memory: arrays of the store by name, and what is read of the texts.
    `total` rows are drawn together; the `first` of them belong to the processes before this one."""

    rows: list[int]
    stored: Mapping[str, Tensor]
    tokens: Any
    first: int
    total: int


@dataclass(frozen=True)
class Batch:
    """Rows of the store, their float32 arrays on the device, and what a frozen model makes of their texts; `first` and
    `total` as in `HostBatch`."""

    rows: list[int]
    stored: Mapping[str, Tensor]
    text: Any
    first: int
    total: int

    @property
    def latents_BPC(self) -> Tensor:
        return self.stored["latents"]

    @property
    def vae_Bchw(self) -> Tensor:
        return self.stored["vae"]


class StoreTask(ABC):
    """A `loop.Task` on the rows of a store, whose batches are functions of (seed, step, row)."""

    section: ClassVar[str]  # of the recipe
    arrays: ClassVar[tuple[str, ...]] = ("latents",)  # of the store, that a step reads

    def __init__(self, module: nn.Module, store: LatentsStore, settings: Any, device: torch.device) -> None:
        self.module, self._store, self._settings, self._device = module, store, settings, device
        self.train_rows, self.held_rows = held_out(store.keys, settings.train.validation_rows)

    def batch(self, step: int, micro: int) -> Batch:
        return self.assemble(self.fetch(step, micro))

    def fetch(self, step: int, micro: int) -> HostBatch:
        """Rows and tokens of a batch; threads call it ahead of the step, several at once."""
        train = self._settings.train
        number = step * train.accumulate + micro
        indices = batch_indices(train.seed, number, train.batch_size, len(self.train_rows))
        mine = distributed.share(train.batch_size, f"{self.section}.train.batch_size")
        rows = [self.train_rows[index] for index in indices[mine]]
        return self._host(rows, [self._text(row, number) for row in rows], mine.start, train.batch_size)

    @torch.no_grad()
    def assemble(self, fetched: HostBatch) -> Batch:
        """On the device, with what a frozen model makes of the texts."""
        stored = {name: to_device(value, self._device).float() for name, value in fetched.stored.items()}
        return Batch(fetched.rows, stored, self._encode(fetched.tokens), fetched.first, fetched.total)

    def keys(self, batch: Batch) -> list[str]:
        return [self._store.keys[row] for row in batch.rows]

    @abstractmethod
    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]: ...

    def samples(self, folder: Path, step: int) -> None:
        """A sheet of pairs of held-out rows; see `_pairs`."""
        if rows := self.held_rows[:SHOWN]:
            make_folder(folder)
            sheet = contact_sheet([np.concatenate(pair, axis=1) for pair in zip(*self._pairs(rows), strict=True)])
            write_bytes(folder / f"step-{step:07d}.png", png_bytes(sheet))

    @abstractmethod
    def _pairs(self, rows: list[int]) -> Sequence[np.ndarray]:
        """Two uint8 (B, H, W, 3): what is true, and what is made."""

    @abstractmethod
    def _text(self, row: int, number: int) -> str:
        """What is read of the row in the batch of this number."""

    def _tokenize(self, texts: Sequence[str]) -> Any:
        """What of reading texts needs no device; several threads call it at once."""
        return texts

    @abstractmethod
    def _encode(self, tokens: Any) -> Any:
        """What a frozen model makes of what `_tokenize` gave."""

    def _stored(self, name: str, rows: list[int]) -> Tensor:
        """Rows of an array of the store, in main memory."""
        values: np.ndarray = getattr(self._store, name)(rows)
        if self._device.type == "cuda":  # half the bytes over the bus; the device makes them float32
            return pinned(torch.from_numpy(values), self._device)
        return torch.from_numpy(values.astype(np.float32))  # numpy: torch's own would start its threads in this one

    def _loaded(self, name: str, rows: list[int]) -> Tensor:
        """The same on the device, float32."""
        return to_device(self._stored(name, rows), self._device).float()

    def _host(self, rows: list[int], texts: Sequence[str], first: int, total: int) -> HostBatch:
        stored = {name: self._stored(name, rows) for name in self.arrays}
        return HostBatch(rows, stored, self._tokenize(texts), first, total)

    def _batch(self, rows: list[int], texts: Sequence[str]) -> Batch:
        return self.assemble(self._host(rows, texts, 0, len(rows)))

    def _held(self, suffix: str, texts: Sequence[str], latents_of: list[int] | None = None) -> dict[str, float]:
        """Means over the held-out rows, with these texts and these rows' latents; with a suffix the loss alone."""
        size, seed = self._settings.train.batch_size, self._settings.train.seed
        total: defaultdict[str, float] = defaultdict(float)
        for start in range(0, len(self.held_rows), size):
            part = slice(start, start + size)
            batch = self._batch(self.held_rows[part], texts[part])
            if latents_of is not None:
                batch = replace(batch, stored={**batch.stored, "latents": self._loaded("latents", latents_of[part])})
            loss, metrics = self.loss(batch, torch.Generator().manual_seed(derive(seed, "validate", start)))
            for name, value in {"loss": loss, **({} if suffix else metrics)}.items():
                total[name + suffix] += float(value) * len(batch.rows) / len(self.held_rows)
        return dict(total)


@dataclass(frozen=True)
class TrainingRun:
    """One training: `frozen` hashes the weights that must not change, `frozen_hash` is what it gave before."""

    kind: str
    recipe: Recipe
    train: Train
    store: LatentsStore
    identity: dict[str, Any]
    task: StoreTask
    config: dict[str, Any]
    frozen: Callable[[], str]
    frozen_hash: str
    device: torch.device
    origin: Origin | None = None

    @property
    def parents(self) -> list[Artifact]:
        """What the artifact is made from."""
        return [self.store.artifact, *([self.origin.artifact] if self.origin else [])]

    @property
    def id(self) -> str:
        return identity_id(self.kind, self.identity, self.parents)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.task.module.parameters() if parameter.requires_grad)


def choose_store(recipe: Recipe, latents: Path | str | None, workspace: Path | str, ui: Ui) -> LatentsStore:
    """The given latents artifact, else the newest of the workspace; checked before any weight is loaded."""
    if is_remote(str(latents)):
        store = LatentsStore.open(str(latents))
        artifact = store.artifact
        ui.say(f"latents: {latents} ({artifact.id}), as given")
    else:
        artifact = resolve(workspace, latents, "latents") if latents is not None else newest(workspace, "latents")
        why = "as given" if latents is not None else f"the newest in {workspace}"
        ui.say(f"latents: {artifact.path} ({artifact.id}), {why}")
        store = LatentsStore.open(artifact)
    require_latents(store, recipe.name, name=features_name(recipe.latents.encoder))
    if store.rows < 3 and len({image_of(key) for key in store.keys}) < 2:
        raise DataError(f"{artifact.path} has {store.rows} rows: too few to train on and validate", code="BF-DATA-008",
                        fix="extract more images: bifrost extract-latents")  # fmt: skip
    return store


def say_cut(too_long: Callable[[int], bool], store: LatentsStore, tokens: int, ui: Ui) -> None:
    """Count the store's first texts of which the training does not read the end; `too_long` says it of a row."""
    rows = min(store.rows, _LOOKED_AT)
    if cut := sum(map(too_long, range(rows))):
        ui.say(f"{cut} of the first {rows} texts are longer than {tokens} tokens and are cut")


def shared_identity(store: LatentsStore, section: Any) -> dict[str, Any]:
    """What any part trained on a store is: the kind of latents, and the recipe's section without run-only keys."""
    settings = identity_of(section)
    return {"encoder": store.encoder, "grid": list(store.grid), "channels": store.channels, "settings": settings}


def run_training(
    run: TrainingRun, *, output: Path | str | None, workspace: Path | str, resume: Path | str, dry_run: bool, ui: Ui,
    init: Path | str | None = None,
) -> Artifact | dict[str, Any]:  # fmt: skip
    """Train, or continue, or say that it is done; with `dry_run` return the plan and touch nothing. The other arguments
    are those of `train_branch`."""
    run, folder = _started(run, output, workspace, resume, init, ui)
    path = Path(folder or output or default_path(workspace, run.kind, run.id))
    plan = _plan(run, path)
    if dry_run:
        return plan
    rows, size = plan["rows"], run.train.batch_size
    if size > rows:
        raise RecipeError(f"{run.kind}.train.batch_size {size} is more than the {rows} rows to train on",
                          at=f"{run.store.artifact.path} has {run.store.rows} rows, {run.store.rows - rows} held out",
                          fix=f"--set {run.kind}.train.batch_size={rows}", code="BF-RECIPE-005")  # fmt: skip
    distributed.share(size, f"{run.kind}.train.batch_size")
    with distributed.main_context(lambda: Draft.open(path, run.kind, run.identity, run.parents)) as draft:
        if distributed.run_on_main(lambda: _is_made(run, draft, plan)):
            ui.say(f"{path} holds this {run.kind} already")
            return Artifact.open(path)
        count = distributed.world()
        shared = f", by {count} processes ({run.train.parallel}), {size // count} rows each" if count > 1 else ""
        trained = f"{run.parameters:,} trained parameters, {run.train.steps} steps on {rows} rows"
        ui.say(f"{run.kind}: {trained}, in {path}{shared}")
        before = _begin(run, path / "work", ui)
        with memory_errors(f"a step of the {run.kind}'s training", _needs_less(run)):
            result = fit(run.task, run.train, path / "work", device=run.device, ui=ui, before=before)
        if (now := run.frozen()) != run.frozen_hash:
            raise BifrostError(f"training the {run.kind} changed weights that are frozen",
                               at=f"sha256 {run.frozen_hash[:12]} -> {now[:12]}", fix="please report this")  # fmt: skip
        distributed.run_on_main(lambda: _commit(run, draft, result))
    return Artifact.open(path)


def _started(
    run: TrainingRun, output: Path | str | None, workspace: Path | str, resume: Path | str, init: Path | str | None,
    ui: Ui,
) -> tuple[TrainingRun, Path | None]:  # fmt: skip
    """The run with what it begins with, and the folder that is continued as it is."""
    bases = {"mllm": run.recipe.models.mllm, "painter": run.recipe.models.diffusion}
    if init is not None:
        artifact = resolve(workspace, init, run.kind)
        require_origin(artifact, run.kind, run.identity, bases)
        run = replace(run, origin=Origin(artifact))
    if str(resume) == "auto":
        return run, None
    header = {"kind": run.kind, "identity": run.identity, "parents": [{"id": run.store.artifact.id}]}
    start = resumed(resume, output, run.kind, header, run.train, run.id)
    if start.origin is None:
        return run, start.folder
    require_origin(start.origin.artifact, run.kind, run.identity, bases)
    if left := run.train.steps - start.steps:
        ui.say(f"the schedule of {start.origin.artifact.path} has come to its end after {left} steps: the other "
               f"{start.steps} begin with its weights, a new warm-up and a new schedule")  # fmt: skip
    return _with_steps(replace(run, origin=start.origin), start.steps), None


def _with_steps(run: TrainingRun, steps: int) -> TrainingRun:
    """The run with so many steps, wherever they are recorded."""
    train = run.train.model_copy(update={"steps": steps})
    section = getattr(run.recipe, run.kind).model_copy(update={"train": train})
    return replace(run, train=train, recipe=run.recipe.model_copy(update={run.kind: section}),
                   identity={**run.identity, "settings": identity_of(section)})  # fmt: skip


def _begin(run: TrainingRun, work: Path, ui: Ui) -> Path | None:
    """Give the run what it begins with; the folder of the training that goes on in it, if one does."""
    if run.origin is None:
        return None
    origin, artifact, step = run.origin, run.origin.artifact, run.origin.step
    if not step:
        ui.say(f"{run.kind}: begins with the weights of {artifact.path} ({artifact.id})")
        begin_with(run.task.module, artifact)
        return None
    ui.say(f"{run.kind}: goes on from step {step} of {artifact.path} ({artifact.id})")
    distributed.run_on_main(lambda: copy_tables(origin, work))
    return origin.work


def _plan(run: TrainingRun, path: Path) -> dict[str, Any]:
    """What the training will do and need, in bytes: weights, gradients and averaged weights are float32, AdamW's two
    averages float32 or 8 bits with a scale for each block of 256."""
    kept = 4 + (2 * (1 + 4 / 256) if run.train.optimizer == "adamw8bit" else 8) + 4 * bool(run.train.ema)
    raw = bool(run.train.ema) and run.train.ema_warmup  # kept beside the averages
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    rows, begins_at = len(run.task.train_rows), run.origin.step if run.origin else 0
    return {
        "output": str(path),
        "latents": run.store.artifact.id,
        "rows": rows,
        "held_out": len(run.task.held_rows),
        "steps": run.train.steps,
        "epochs": round(run.train.steps * run.train.batch_size * run.train.accumulate / rows, 2),
        "continues_at": max(Checkpoints(path / "work" / "checkpoints").steps(), default=begins_at),
        "parameters": run.parameters,
        "memory_of_the_trained_part": round(run.parameters * (kept + 4)),
        "disk_needed": round(run.parameters * (kept * (run.train.keep + 1) + 4 * (1 + raw))),
        "disk_free": shutil.disk_usage(existing).free,
        "device": str(run.device),
    }


def _is_made(run: TrainingRun, draft: Draft | None, plan: dict[str, Any]) -> bool:
    assert draft is not None  # in the first process
    if draft.complete:
        _tidy(run, draft.path / "work")
    elif not draft.continued and plan["disk_needed"] > plan["disk_free"]:
        raise DiskFull(f"a {draft.kind} training does not fit on the disk of {draft.path}",
                       at=f"need {plan['disk_needed']:,} bytes, free {plan['disk_free']:,}",
                       fix=f"free some space, or --set {draft.kind}.train.keep=1")  # fmt: skip
    return draft.complete is not None


def _needs_less(run: TrainingRun) -> str:
    """The next setting to try: first the one that changes no byte of the result, so that the run goes on with it."""
    train, key = run.train, f"--set {run.kind}.train."
    if not train.gradient_checkpointing:
        return f"{key}gradient_checkpointing=true (the same bytes; it continues from the last checkpoint)"
    if train.batch_size > 1:
        return f"{key}batch_size={train.batch_size // 2} {key}accumulate={2 * train.accumulate}, into a new folder"
    return f"{key}optimizer=adamw8bit, into a new folder; or a GPU with more memory"


def _commit(run: TrainingRun, draft: Draft | None, result: FitResult) -> None:
    assert draft is not None  # in the first process
    work = draft.path / "work"
    for name, state in (("model", result.ema_state), ("raw", result.raw_state)):
        if state:
            save_tensors(draft.path / f"{name}.safetensors", state, {"kind": run.kind})
    write_json(draft.path / "config.json", run.config)
    sheets = sorted(work.glob("samples/*"))
    if sheets:
        make_folder(draft.path / "samples")
    for made in (*(path for path in (work / "losses.csv", work / "validation.csv") if path.exists()), *sheets):
        write_bytes(draft.path / made.relative_to(work), made.read_bytes())
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else str(run.device)
    draft.commit(
        {"recipe": run.recipe.model_dump(mode="json"), "metrics": result.metrics, "parameters": run.parameters},
        made={"device": device, "seed": run.train.seed},
        cost={"seconds": round(result.seconds, 1), "device": device, "samples": result.samples_seen},
    )
    _tidy(run, work)


def _tidy(run: TrainingRun, work: Path) -> None:
    """The artifact is whole: no checkpoint is left but the one from which its schedule can go on, also if the last run
    was killed in this."""
    Checkpoints(work / "checkpoints", pinned=stays_until(run.train)).tidy()
    sweep(work)
