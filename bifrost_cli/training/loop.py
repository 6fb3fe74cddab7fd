"""The training loop: AdamW, warm-up and cosine, clipping, accumulation, EMA, exact resume. One loop for every training.

In: a `Task` (a module, batches, a loss), the training settings of a recipe, a folder. Out: `FitResult` and, in the
folder, `checkpoints/`, `losses.csv`, `validation.csv`, `train.log`, `samples/`. Everything random is a function of
(seed, step), so 20 steps give the same bits as 10, a kill, and 10 more. Knows no model, no maths and no store.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bifrost_cli.artifacts.files import make_folder, write_json
from bifrost_cli.errors import ArtifactError, Diverged, Stopped, UsageError
from bifrost_cli.training.averaging import Averaged
from bifrost_cli.training.checkpoint import Checkpoint, Checkpoints, module_tensors, restore_module
from bifrost_cli.training.optimizer import make_optimizer, optimizer_tensors, restore_optimizer
from bifrost_cli.training.order import derive
from bifrost_cli.training.records import Journal, Table
from bifrost_cli.training.signals import StopFlag

# What changes the weights; a checkpoint made under other values of these does not continue.
SETTINGS = ("steps", "batch_size", "accumulate", "optimizer", "lr", "betas", "weight_decay", "warmup", "clip", "ema",
            "precision", "seed")


class Task(Protocol):
    """What is trained. Optional methods: `keys(batch) -> list[str]` (for error reports), `validate() -> dict[str,
    float]` and `samples(folder, step)`; the last two run under EMA weights, in eval mode, without gradients."""

    module: nn.Module

    def batch(self, step: int, micro: int) -> Any:
        """The batch of a step; a pure function of its arguments."""

    def loss(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor | float]]:
        """A scalar loss and numbers to record; random numbers come from `generator`, on the CPU on any device."""


@dataclass(frozen=True)
class FitResult:
    """What a training made. `ema_state` has all weights that are not frozen (the raw ones when `ema` is 0)."""

    step: int
    metrics: dict[str, float]
    seconds: float
    samples_seen: int
    ema_state: dict[str, Tensor]


@dataclass
class _State:
    task: Task
    train: Any
    device: torch.device
    ema: Averaged | None
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)


def fit(task: Task, train: Any, folder: Path, *, device: str | torch.device = "cpu", ui: Any = None,
        resume: bool = True) -> FitResult:
    """Train `task.module` in place for `train.steps` steps, continuing from the newest checkpoint in `folder`.

    Raises Diverged (7) at the first loss or gradient that is not finite, before the optimizer step; Stopped (75) after
    a signal, with a checkpoint written; ArtifactError (5) for a damaged checkpoint or one made under other settings;
    UsageError (2) for any checkpoint when `resume` is False; DiskFull (3).
    """
    folder = Path(folder)
    make_folder(folder)
    checkpoints = Checkpoints(folder / "checkpoints", train.keep)
    losses, validation = Table(folder / "losses.csv"), Table(folder / "validation.csv")
    with StopFlag() as stop, Journal(folder, train, ui) as journal:
        # ---- start, or continue
        state = _start(task, train, torch.device(device))
        _continue(state, checkpoints, losses, validation, resume)
        journal.begin(state.step, state.seconds)
        # ---- train
        while state.step < train.steps:
            row = _step(state, folder)
            losses.add(state.step, row)
            journal.step(state.step, row)
            _examine(state, folder, validation, journal)
            last = state.step == train.steps
            if last or stop.requested or _due(state.step, train.checkpoint_every):
                losses.sync()
                validation.sync()
                state.seconds = journal.seconds()
                _save(state, checkpoints)
            if stop.requested and not last:
                raise Stopped(f"stopped at step {state.step} of {train.steps}; a checkpoint is written",
                              at=str(checkpoints.path(state.step)), fix="run the same command again to continue",
                              code="BF-STOP-001")
    averaged = state.ema.module if state.ema else task.module
    frozen = {name for name, parameter in averaged.named_parameters() if not parameter.requires_grad}
    weights = {name: tensor.clone() for name, tensor in averaged.state_dict().items() if name not in frozen}
    seen = state.step * train.batch_size * train.accumulate
    return FitResult(state.step, state.metrics, state.seconds, seen, weights)


# ---- start and resume --------------------------------------------------------------------------------------------


def _start(task: Task, train: Any, device: torch.device) -> _State:
    module = task.module.to(device)
    optimizer = make_optimizer(module, train)
    ema = Averaged(module, train.ema) if train.ema else None
    module.train()
    return _State(task, train, device, ema, optimizer)


def _continue(state: _State, checkpoints: Checkpoints, losses: Table, validation: Table, resume: bool) -> None:
    # 1. leftovers of a killed save go; 2. the newest checkpoint must verify; 3. its settings must be ours;
    # 4. weights, EMA, optimizer; 5. the tables are cut back to its step. Step 0 is reached only with no checkpoint.
    checkpoints.prepare()
    if not resume and checkpoints.steps():
        raise UsageError(f"{checkpoints.folder} already holds checkpoints", at=f"steps {checkpoints.steps()}",
                         fix="let it resume, or train into a new folder", code="BF-USE-002")
    found = checkpoints.load_newest()
    if found is not None:
        _same_settings(found.state.get("train", {}), _settings(state.train), checkpoints.path(found.step))
        restore_module(state.task.module, found.groups["model"])
        if state.ema is not None:
            restore_module(state.ema.module, found.groups["ema"])
            state.ema.begun = True
        restore_optimizer(state.optimizer, state.task.module, found.groups["optimizer"])
        state.step, state.seconds, state.metrics = found.step, found.state["seconds"], found.state["metrics"]
    losses.cut(state.step, complete=True)
    validation.cut(state.step, complete=False)


def _settings(train: Any) -> dict[str, Any]:
    return json.loads(json.dumps({name: getattr(train, name) for name in SETTINGS}))


def _same_settings(before: dict, now: dict, path: Path) -> None:
    before = {"optimizer": "adamw", **before}  # checkpoints from before there was a choice
    changed = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
    if changed:
        raise ArtifactError(f"checkpoint {path} was made with other training settings", at="; ".join(changed),
                            fix="set them back, or train into a new folder", code="BF-ART-003")


# ---- one step ----------------------------------------------------------------------------------------------------


def learning_rate(step: int, train: Any) -> float:
    """The rate of step 0, 1, ...: linear over `warmup` steps up to `lr`, then a cosine down to 0 at `steps`."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    return train.lr * 0.5 * (1 + math.cos(math.pi * (step - train.warmup) / max(1, train.steps - train.warmup)))


def _step(state: _State, folder: Path) -> dict[str, float]:
    train, module, rate = state.train, state.task.module, learning_rate(state.step, state.train)
    totals: dict[str, Tensor] = {}
    for micro in range(train.accumulate):
        loss, metrics = _micro(state, micro)
        (loss / train.accumulate).backward()
        for name, value in {"loss": loss, **metrics}.items():
            value = torch.as_tensor(value, dtype=torch.float32, device=state.device).detach()
            totals[name] = totals[name] + value if name in totals else value
    # ---- a bad number stops here, before any weight changes; this is the only wait for the device in a step
    norm = nn.utils.clip_grad_norm_(module.parameters(), train.clip or math.inf, foreach=True)
    loss, *rest, norm = torch.stack([*totals.values(), norm]).tolist()
    mean = [value / train.accumulate for value in (loss, *rest)]
    if not (math.isfinite(loss) and math.isfinite(norm)):
        _diverged(state, folder, mean[0], norm)
    # ---- update
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.update(module)
    state.step += 1
    names = list(totals)
    return {"loss": mean[0], "grad_norm": norm, "lr": rate, **dict(zip(names[1:], mean[1:], strict=True))}


def _micro(state: _State, micro: int) -> tuple[Tensor, dict[str, Tensor | float]]:
    seed = derive(state.train.seed, state.step, micro)
    torch.manual_seed(seed)  # dropout draws from the global generator
    generator = torch.Generator().manual_seed(seed)
    batch = state.task.batch(state.step, micro)
    with _autocast(state):
        return state.task.loss(batch, generator)


def _autocast(state: _State) -> torch.autocast:
    return torch.autocast(state.device.type, torch.bfloat16, enabled=state.train.precision == "bf16")


def _diverged(state: _State, folder: Path, loss: float, norm: float) -> None:
    keys = getattr(state.task, "keys", lambda batch: [])
    batches = [keys(state.task.batch(state.step, micro)) for micro in range(state.train.accumulate)]
    report = {"step": state.step + 1, "loss": str(loss), "grad_norm": str(norm), "keys": sum(batches, [])}
    write_json(folder / "nonfinite.json", report)
    raise Diverged(f"loss {loss} or gradient norm {norm} is not finite at step {state.step + 1}", code="BF-NAN-001",
                   at=f"batch keys in {folder / 'nonfinite.json'}; the last checkpoint is intact",
                   fix="look at those rows, or lower the learning rate (lr) and train into a new folder")


# ---- between steps -----------------------------------------------------------------------------------------------


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _examine(state: _State, folder: Path, validation: Table, journal: Journal) -> None:
    train, last = state.train, state.step == state.train.steps
    if hasattr(state.task, "validate") and (last or _due(state.step, train.validate_every)):
        with _averaged(state):
            found = {name: float(value) for name, value in state.task.validate().items()}
        if not all(map(math.isfinite, found.values())):
            raise Diverged(f"a validation number is not finite at step {state.step}: {found}", code="BF-NAN-001",
                           fix="check the held-out rows, or lower the learning rate (lr) and train into a new folder")
        state.metrics = found
        validation.add(state.step, found)
        journal.validation(state.step, found)
    if hasattr(state.task, "samples") and train.sample_every and (last or _due(state.step, train.sample_every)):
        with _averaged(state):
            state.task.samples(folder / "samples", state.step)


@contextmanager
def _averaged(state: _State) -> Iterator[None]:
    """EMA weights inside the trained module, eval mode, no gradients, seeded by the step; all undone at the end."""
    swap = state.ema is not None
    torch.manual_seed(derive(state.train.seed, state.step, "examine"))
    if swap:
        _exchange(state.task.module, state.ema.module)
    state.task.module.eval()
    try:
        with torch.no_grad(), _autocast(state):
            yield
    finally:
        state.task.module.train()
        if swap:
            _exchange(state.task.module, state.ema.module)


def _exchange(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = [*one.parameters(), *one.buffers()], [*other.parameters(), *other.buffers()]
    for a, b in zip(mine, theirs, strict=True):
        a.data, b.data = b.data, a.data


def _save(state: _State, checkpoints: Checkpoints) -> None:
    groups = {"model": module_tensors(state.task.module),
              "optimizer": optimizer_tensors(state.optimizer, state.task.module)}
    if state.ema is not None:
        groups["ema"] = module_tensors(state.ema.module)
    bad = [name for tensors in groups.values() for name, t in tensors.items() if not torch.isfinite(t).all()]
    if bad:
        raise Diverged(f"{bad[0]} is not finite after step {state.step}; no checkpoint was written of it",
                       fix="lower the learning rate (lr) and train into a new folder", code="BF-NAN-001")
    told = {"train": _settings(state.train), "seconds": state.seconds, "metrics": state.metrics}
    checkpoints.save(Checkpoint(state.step, groups, told))
