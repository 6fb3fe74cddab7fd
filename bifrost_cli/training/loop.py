"""The training loop: AdamW, warm-up, schedule, clipping, accumulation, EMA, exact resume. One loop for every training.
In the folder of a training it keeps `checkpoints/`, `losses.csv`, `validation.csv`, `train.log` and `samples/`.
Everything random is a function of (seed, step), so 20 steps give the same bits as 10, a kill, and 10 more."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bifrost_cli.artifacts.files import make_folder, write_json
from bifrost_cli.artifacts.identity import provenance
from bifrost_cli.config.schema import Train
from bifrost_cli.errors import ArtifactError, Diverged, Stopped, UsageError
from bifrost_cli.runtime import distributed
from bifrost_cli.runtime.launch import StopFlag
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.training.background import BackgroundWork
from bifrost_cli.training.batch_loader import BatchLoader
from bifrost_cli.training.checkpoint import Checkpoint, Checkpoints, SavedCheckpoint, module_tensors, restore_module
from bifrost_cli.training.data_order import derive, micro_seed
from bifrost_cli.training.optimizer import EMA, make_optimizer, optimizer_tensors, restore_optimizer
from bifrost_cli.training.parallel import Parallel, full_tensor, local
from bifrost_cli.training.train_log import TrainingLogger

# What changes the weights; a checkpoint made under other values of these does not continue.
SETTINGS = (
    "steps", "batch_size", "accumulate", "optimizer", "lr", "betas", "weight_decay", "warmup", "clip", "ema",
    "ema_warmup", "ema_every", "precision", "seed", "schedule", "decay_steps", "compile",
    "fsdp_precision",
)  # fmt: skip
_BEFORE = {  # what checkpoints had before there was a choice
    "optimizer": "adamw", "ema_warmup": False, "ema_every": 1, "schedule": "cosine", "decay_steps": None,
    "compile": False, "fsdp_precision": "fp32",
}  # fmt: skip
_SCHEDULE = {"steps", "schedule", "decay_steps"}


class Task(Protocol):
    """What is trained. Optional methods: `fetch(step, micro)` and `assemble(fetched)`, the two halves of `batch`, of
    which the first is called ahead of the step, in threads; `keys(batch) -> list[str]` for error reports;
    `weights(step) -> list[float]`, how much each micro-batch counts in the mean of a step (all 1 without it);
    `validate() -> dict[str, float]` and `samples(folder, step)`, which run under EMA weights, in eval mode, without
    gradients."""

    @property
    def module(self) -> nn.Module: ...

    def batch(self, step: int, micro: int) -> Any:
        """A pure function of its arguments."""

    def loss(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """A scalar loss and numbers to record; random numbers come from `generator`, on the CPU on any device."""


@dataclass(frozen=True)
class FitResult:
    """`ema_state` has all weights that are not frozen (the raw ones when `ema` is 0), and `raw_state` with `ema_warmup`
    the raw ones; both are {} in all processes but the first."""

    step: int
    metrics: dict[str, float]
    seconds: float
    samples_seen: int
    ema_state: dict[str, Tensor]
    raw_state: dict[str, Tensor]


@dataclass
class _State:
    task: Task
    train: Train
    device: torch.device
    parallel: Parallel
    ema: EMA
    optimizer: torch.optim.Optimizer
    loader: BatchLoader
    saving: BackgroundWork = field(default_factory=BackgroundWork)
    step: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.train.precision == "bf16")

    def due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0


def fit(
    task: Task, train: Train, folder: Path, *, device: str | torch.device = "cpu", ui: Ui | None = None,
    resume: bool = True, before: Path | None = None,
) -> FitResult:  # fmt: skip
    """Train `task.module` in place for `train.steps` steps, continuing from the newest checkpoint in `folder`, or where
    it has none from that of the training in the folder `before`, whose tables stand in `folder`.
    Diverged: before an optimizer step with a number that is not finite; Stopped: after a signal, with a checkpoint;
    ArtifactError: a damaged checkpoint, or one of other settings; UsageError: any checkpoint when `resume` is False."""
    folder = Path(folder)
    make_folder(folder)
    checkpoints = Checkpoints(folder / "checkpoints", train.keep, stays_until(train))
    with (
        _deterministic(train),
        StopFlag() as stop,
        _records(folder, train, ui) as records,
        nullcontext(_start(task, train, torch.device(device))) as state,
        state.loader,
        state.saving,
    ):
        note = _continue(state, checkpoints, records, resume, before)
        if records:
            records.begin(state.step, state.seconds)
            if note:
                records.tell(note)
        while state.step < train.steps:
            row, stopping = _step(state, folder, stop)
            if records:
                records.step(state.step, row, state.loader.waited)
            _examine(state, folder, records)
            last = state.step == train.steps
            if last or stopping or state.due(train.checkpoint_every) or state.step == stays_until(train):
                digests = records.sync() if records else {}
                state.seconds = records.seconds() if records else 0.0
                _save(state, checkpoints, digests, wait=last or stopping)
                if records:
                    records.saved(max(records.seconds() - state.seconds, state.saving.seconds))
            if records and (stopping or last):
                records.end()
            if stopping and not last:
                raise Stopped(f"stopped at step {state.step} of {train.steps}; a checkpoint is written",
                              at=str(checkpoints.path(state.step)), fix="run the same command again to continue",
                              code="BF-STOP-001")  # fmt: skip
    seen = state.step * train.batch_size * train.accumulate
    raw = state.ema.whole(raw=True) if train.ema and train.ema_warmup else {}
    return FitResult(state.step, state.metrics, state.seconds, seen, state.ema.whole(), raw)


@contextmanager
def _deterministic(train: Train) -> Iterator[None]:
    """With `train.deterministic` no kernel whose sums depend on chance; what has no other raises RuntimeError."""
    before = torch.are_deterministic_algorithms_enabled()
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _records(folder: Path, train: Train, ui: Ui | None) -> AbstractContextManager[TrainingLogger | None]:
    """None in all processes but the first, which alone writes anything down."""
    return nullcontext() if distributed.rank() else TrainingLogger(folder, train, ui)


def _start(task: Task, train: Train, device: torch.device) -> _State:
    module = task.module.to(device)
    parallel = Parallel(module, train.parallel, device, train.fsdp_precision)
    module.train()
    ema = EMA(module, train.ema, train.ema_warmup, train.ema_every)
    loader = BatchLoader(task, train.steps, train.accumulate, train.read_ahead, device, train.overlap)
    return _State(task, train, device, parallel, ema, make_optimizer(module, train), loader)


def _continue(
    state: _State, checkpoints: Checkpoints, records: TrainingLogger | None, resume: bool, before: Path | None
) -> str | None:
    """Restore the newest checkpoint; what is to be said of it, if anything."""
    saved = distributed.run_on_main(lambda: _find(state.train, checkpoints, records, resume, before))
    if saved is None:
        return None
    module = state.task.module
    restore_module(module, saved.read("model", module))
    state.ema.restore(saved.read("ema", module))
    restore_optimizer(state.optimizer, module, saved.read("optimizer", module))
    state.step, state.seconds, state.metrics = saved.step, saved.state["seconds"], saved.state["metrics"]
    begun, now = saved.state.get("versions", {}), provenance()["versions"]
    other = [f"{name} {begun[name]} -> {now[name]}" for name in now if begun.get(name, now[name]) != now[name]]
    return f"goes on under other versions, so the last digits may differ: {', '.join(other)}" if other else None


def _find(
    train: Train, checkpoints: Checkpoints, records: Any, resume: bool, before: Path | None
) -> SavedCheckpoint | None:
    """The newest checkpoint, when it is whole and of our settings; the tables are cut back to its step."""
    checkpoints.prepare()
    if not resume and checkpoints.steps():
        raise UsageError(f"{checkpoints.folder} already holds checkpoints", at=f"steps {checkpoints.steps()}",
                         fix="let it resume, or train into a new folder", code="BF-USE-002")  # fmt: skip
    saved = checkpoints.newest() or (Checkpoints(before / "checkpoints").newest() if before else None)
    if saved is None:
        records.cut(0, {})
        return None
    if changed := changed_settings(saved.state.get("train", {}), train, saved.step):
        raise ArtifactError(f"checkpoint {saved.path} was made with other training settings", at="; ".join(changed),
                            fix="set them back, or train into a new folder", code="BF-ART-003")  # fmt: skip
    records.cut(saved.step, saved.state.get("records", {}))
    return saved


def _settings(train: Train) -> dict[str, Any]:
    return json.loads(json.dumps({name: getattr(train, name) for name in SETTINGS}))


def changed_settings(recorded: Mapping[str, Any], train: Train, step: int) -> list[str]:
    """`name before -> now` for each setting under which the weights at `step` would be others than a checkpoint's, made
    under the `recorded` ones. Another end of the schedule is none as long as the rates before `step` are the same."""
    before, now = {**_BEFORE, **recorded}, _settings(train)
    changed = {name for name in now if before.get(name) != now[name]}
    if changed and changed <= _SCHEDULE:
        other = SimpleNamespace(**before)
        if all(learning_rate(done, other) == learning_rate(done, train) for done in range(step)):
            return []
    return [f"{name} {before.get(name)} -> {now[name]}" for name in now if name in changed]


def learning_rate(step: int, train: Any) -> float:
    """The rate of a step.

    Args:
        step: 0, 1, ...
        train: has lr, warmup, steps, schedule and decay_steps as `config.schema.Train`.

    Returns:
        Linear over `warmup` steps up to `lr`; then as `schedule` says, of those that transformers has by these names: a
        cosine down to 0 at `steps`, lr, or lr and over the last `decay_steps` a cosine down to 0 (arXiv 2404.06395).
    """
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    falls = {"cosine": train.warmup, "constant_with_warmup": train.steps}.get(train.schedule, stays_until(train) or 0)
    return train.lr * 0.5 * (1 + math.cos(math.pi * max(0, step - falls) / max(1, train.steps - falls)))


def stays_until(train: Any) -> int | None:
    """The step up to which the rate, once warm, stays: a training with more steps can go on from its checkpoint."""
    ends = {"constant_with_warmup": train.steps, "warmup_stable_decay": train.steps - (train.decay_steps or 0)}
    return ends.get(train.schedule)


def _step(state: _State, folder: Path, stop: StopFlag) -> tuple[dict[str, float], bool]:
    """One optimizer step: the row for losses.csv, and whether any process was asked to stop."""
    train, module, rate = state.train, state.task.module, learning_rate(state.step, state.train)
    totals: dict[str, Tensor] = {}
    weights = state.task.weights(state.step) if hasattr(state.task, "weights") else [1.0] * train.accumulate
    for micro, weight in enumerate(weights):
        with state.parallel.summing(last=micro == train.accumulate - 1):
            loss, metrics = _micro(state, micro)
            (loss * weight / train.accumulate).backward()
        for name, value in {"loss": loss, **metrics}.items():
            value = torch.as_tensor(value, dtype=torch.float32, device=state.device).detach() * weight
            totals[name] = totals[name] + value if name in totals else value
    # ---- a bad number stops here, before any weight changes; this is the only wait for the device in a step
    norm = full_tensor(nn.utils.clip_grad_norm_(module.parameters(), train.clip or math.inf, foreach=True))
    stopping = torch.full((), float(stop.requested), device=state.device)
    means = distributed.all_reduce_mean(torch.stack([*totals.values(), stopping]))
    loss, *rest, stopping, norm = torch.cat([means, norm[None]]).tolist()
    mean = [value / train.accumulate for value in (loss, *rest)]
    if not (math.isfinite(loss) and math.isfinite(norm)):
        _diverged(state, folder, mean[0], norm)
    # ---- update
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.ema.update(state.step)
    state.step += 1
    names = list(totals)
    row = {"loss": mean[0], "grad_norm": norm, "lr": rate, **dict(zip(names[1:], mean[1:], strict=True))}
    return row, stopping > 0


def _micro(state: _State, micro: int) -> tuple[Tensor, Mapping[str, Tensor | float]]:
    seed, rank = micro_seed(state.train.seed, state.step, micro), distributed.rank()
    torch.manual_seed(derive(seed, rank) if rank else seed)  # dropout draws from the global generator
    generator = torch.Generator().manual_seed(seed)  # equal in all processes: each takes its part of a draw for all
    batch = state.loader.get(state.step, micro)
    with state.autocast():
        return state.parallel.run(state.task.loss, batch, generator)


def _diverged(state: _State, folder: Path, loss: float, norm: float) -> None:
    keys: Callable[[Any], list[str]] = getattr(state.task, "keys", lambda batch: [])
    batches = [keys(state.task.batch(state.step, micro)) for micro in range(state.train.accumulate)]
    batches = sum(distributed.all_gather_object(batches), [])
    report = {"step": state.step + 1, "loss": str(loss), "grad_norm": str(norm), "keys": sum(batches, [])}
    distributed.run_on_main(lambda: write_json(folder / "nonfinite.json", report))
    raise Diverged(f"loss {loss} or gradient norm {norm} is not finite at step {state.step + 1}", code="BF-NAN-001",
                   at=f"batch keys in {folder / 'nonfinite.json'}; the last checkpoint is intact",
                   fix="look at those rows, or lower the learning rate (lr) and train into a new folder")  # fmt: skip


def _examine(state: _State, folder: Path, records: TrainingLogger | None) -> None:
    """Validation and sample grids. All processes compute the same, because what is in parts needs all of them in step;
    the first writes."""
    train, task, last = state.train, state.task, state.step == state.train.steps
    if hasattr(task, "validate") and (last or state.due(train.validate_every)):
        with _averaged(state):
            metrics = {name: float(value) for name, value in state.parallel.run(task.validate).items()}
        if not all(map(math.isfinite, metrics.values())):
            raise Diverged(
                f"a validation number is not finite at step {state.step}: {metrics}",
                code="BF-NAN-001",
                fix="check the held-out rows, or lower the learning rate (lr) and train into a new folder",
            )
        state.metrics = metrics
        if records:
            records.validation(state.step, metrics)
    if hasattr(task, "samples") and train.sample_every and (last or state.due(train.sample_every)):
        unread = tempfile.TemporaryDirectory(prefix="bifrost-") if distributed.rank() else nullcontext()
        with _averaged(state), unread as other:
            state.parallel.run(task.samples, Path(other or folder / "samples"), state.step)


@contextmanager
def _averaged(state: _State) -> Iterator[None]:
    """EMA weights inside the trained module, eval mode, no gradients, seeded by the step; all undone at the end."""
    torch.manual_seed(derive(state.train.seed, state.step, "examine"))
    state.ema.exchange()
    state.task.module.eval()
    try:
        with torch.no_grad(), state.autocast(), state.parallel.whole():
            yield
    finally:
        state.task.module.train()
        state.ema.exchange()


def _save(state: _State, checkpoints: Checkpoints, digests: dict[str, str | None], wait: bool) -> None:
    """A checkpoint of this step; with `save_in_background` it is written while the training goes on, unless `wait`."""
    module, parts = state.task.module, bool(state.parallel.sharded)
    groups = {"model": module_tensors(module), "optimizer": optimizer_tensors(state.optimizer, module)}
    if state.ema.tensors:
        groups["ema"] = {**groups["model"], **state.ema.tensors}
    bad = [name for tensors in groups.values() for name, t in tensors.items() if not torch.isfinite(local(t)).all()]
    error = None
    if bad:
        error = Diverged(f"{bad[0]} is not finite after step {state.step}; no checkpoint was written of it",
                         fix="lower the learning rate (lr) and train into a new folder", code="BF-NAN-001")  # fmt: skip
    distributed.raise_if_any_failed(error or state.saving.wait())
    facts = {"train": _settings(state.train), "seconds": state.seconds, "metrics": state.metrics, "records": digests}
    facts["versions"] = provenance()["versions"]
    if wait or parts or not state.train.save_in_background:
        checkpoints.save(Checkpoint(state.step, groups, facts), parts=parts)
    elif distributed.rank() == 0:
        copied = {group: {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
                  for group, tensors in groups.items()}  # fmt: skip
        state.saving.start(partial(checkpoints.save_alone, Checkpoint(state.step, copied, facts)))
