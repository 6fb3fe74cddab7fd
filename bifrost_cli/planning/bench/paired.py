"""The frame of every benchmark: two ways of doing one thing, timed in turns in one run.

On a CPU the clock is that of the processor, which does not count what other processes of a busy machine take; on a GPU
it is the wall's, with the device's work waited for. Both are kept.
"""

from __future__ import annotations

import gc
import importlib
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from bifrost_cli.config.load import load_recipe
from bifrost_cli.config.schema import Recipe
from bifrost_cli.errors import memory_errors
from bifrost_cli.loading.resolve import resolve_device
from bifrost_cli.planning.bench import BENCHES
from bifrost_cli.runtime.ui import Ui

Clock = Literal["cpu", "wall"]
Side = Literal["ours", "theirs"]
FULL_RECIPE = "bifrost1-7b"  # of which a GPU is given the widths, where no recipe is named
REPEATS, SECONDS = 3, 60.0  # pairs, and how long they may take together; one pair is timed in any case
_SIDES: tuple[Side, ...] = ("ours", "theirs")
T = TypeVar("T")


@dataclass(frozen=True)
class BenchSetup:
    """What a benchmark is run on.

    Attributes:
        recipe: whose widths a GPU is given.
        device: where it computes.
        sizes: those of the table on a CPU, and in any case those that were given.
        ui: hears how far it is.
    """

    recipe: Recipe
    device: torch.device
    sizes: Mapping[str, int] = field(default_factory=dict)
    ui: Ui = field(default_factory=Ui)

    @property
    def full(self) -> bool:
        """True: the recipe's own widths, with random weights. False: scaled down."""
        return self.device.type != "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """The recipe's number format on a GPU, float32 on a CPU."""
        return getattr(torch, self.recipe.models.dtype) if self.full else torch.float32


class Timing(NamedTuple):
    """Seconds of one run on both clocks, and the most memory that it held beyond what was there (bytes, or None)."""

    cpu: float
    wall: float
    memory: int | None


@dataclass(frozen=True)
class BenchRow:
    """Both ways of one thing.

    Attributes:
        what: the thing.
        baseline: the name of what ours is compared with.
        clock: the one that counts.
        ours: a `Timing` of each run; `theirs` of the baseline's run beside it.
        difference: the largest difference of the two results; None where they are not compared.
        work: how much one run does, as (amount, unit), such as (512, "images").
        flops: operations of one run of ours; `matrix_rate` is what a product of large matrices reaches here.
    """

    what: str
    baseline: str
    clock: Clock
    ours: tuple[Timing, ...]
    theirs: tuple[Timing, ...]
    difference: float | None = None
    work: tuple[float, str] | None = None
    flops: float | None = None
    matrix_rate: float | None = None

    def seconds(self, side: Side = "ours", clock: Clock | None = None) -> float:
        """The median of one side's seconds."""
        return statistics.median(getattr(timing, clock or self.clock) for timing in getattr(self, side))

    def ratios(self, clock: Clock | None = None) -> list[float]:
        """Of each pair how many times the baseline's speed ours has, in order of size."""
        name = clock or self.clock
        pairs = zip(self.ours, self.theirs, strict=True)
        return sorted(getattr(theirs, name) / max(getattr(ours, name), 1e-9) for ours, theirs in pairs)

    @property
    def ratio(self) -> float:
        """The median of `ratios`."""
        return statistics.median(self.ratios())

    @property
    def share(self) -> float | None:
        """How much of `matrix_rate` our way reaches."""
        return self.flops / self.seconds() / self.matrix_rate if self.flops and self.matrix_rate else None

    def memory(self, side: Side = "ours") -> int | None:
        """The most that any run of one side held, in bytes."""
        return max((timing.memory for timing in getattr(self, side) if timing.memory is not None), default=None)

    def values(self) -> dict[str, Any]:
        """Everything as JSON values."""
        clocks: tuple[Clock, ...] = ("cpu", "wall")
        spread = {clock: {"median": statistics.median(found), "min": found[0], "max": found[-1]}
                  for clock in clocks for found in (self.ratios(clock),)}  # fmt: skip
        sides: dict[str, Any] = {}
        for name in _SIDES:
            runs = [timing._asdict() for timing in getattr(self, name)]
            sides[name] = {"seconds": self.seconds(name), "peak_memory": self.memory(name), "runs": runs}
        facts = {name: getattr(self, name) for name in ("what", "baseline", "clock", "ratio", "difference", "work")}
        share = {"flops": self.flops, "matrix_rate": self.matrix_rate, "share_of_matrix_rate": self.share}
        return {**facts, "ratios": spread, **sides, **share}

    def __str__(self) -> str:
        found, (ours, theirs) = self.ratios(), (self.seconds("ours"), self.seconds("theirs"))
        clock = {"cpu": "CPU s", "wall": "s"}[self.clock]
        spread = f"{found[0]:.3g} to {found[-1]:.3g} in {len(found)} pairs"
        parts = [f"{self.what}: {self.ratio:.3g} times the speed of {self.baseline} ({spread})"]
        parts.append(f"{ours:.3g} against {theirs:.3g} {clock}")
        if self.work:
            amount, unit = self.work
            parts.append(f"{amount / ours:.4g} against {amount / theirs:.4g} {unit} a {clock}")
        memories = [self.memory("ours"), self.memory("theirs")]
        if None not in memories:
            parts.append("peak memory " + " against ".join(f"{size / 1e6:.0f}" for size in memories if size is not None)
                         + " MB")  # fmt: skip
        if self.share is not None:
            parts.append(f"{self.share:.0%} of the measured matrix rate")
        if self.difference is not None:
            parts.append(f"results within {self.difference:.1g}")
        return "; ".join(parts)


def run_bench(
    name: str, *, recipe: Recipe | None = None, sets: list[str] | None = None, device: str = "auto",
    sizes: Mapping[str, int] | None = None, ui: Ui | None = None,
) -> list[BenchRow]:  # fmt: skip
    """Run one benchmark of `BENCHES`.

    Args:
        name: which.
        recipe: whose widths a GPU is given; None is tiny on a CPU and bifrost1-7b on a GPU, with the settings `sets`.
        device: as `--device`.
        sizes: numbers instead of the table's or the recipe's.
        ui: hears what is timed.

    Raises:
        UsageError: a size that cannot be.
        OutOfMemory: the widths are too large for the device.
    """
    ui, bench, where = ui or Ui(), BENCHES[name], resolve_device(device)
    usual = {} if where.type != "cpu" else {key: value for key, (value, _) in bench.sizes.items()}
    chosen = recipe or load_recipe("tiny" if where.type == "cpu" else FULL_RECIPE, sets or ())
    setup = BenchSetup(chosen, where, {**usual, **(sizes or {})}, ui)
    ui.say(
        f"bench {name}: {'random weights at the widths of ' + chosen.name if setup.full else 'scaled down'}, {where}"
    )
    module, _, function = bench.function.partition(":")
    with memory_errors(f"bench {name}", "--recipe bifrost1-3b, or smaller sizes (--help lists them)"):
        return list(getattr(importlib.import_module(module), function)(setup))


def compare(
    what: str, ours: Callable[[], T], theirs: Callable[[], T], *, baseline: str, setup: BenchSetup,
    difference: Callable[[T, T], float] | None = None, before: Callable[[], object] | None = None,
    clock: Clock | None = None, work: tuple[float, str] | None = None, flops: bool = False, warm_up: bool = True,
    memory: bool = True, repeats: int = REPEATS, seconds: float = SECONDS,
) -> BenchRow:  # fmt: skip
    """Time two ways in turns, first one first and then the other, until `repeats` pairs or `seconds` are reached.

    Args:
        what: what is done, for the row.
        ours: our way, and `theirs` the baseline's; what they return is given to `difference`.
        baseline: the name of theirs.
        setup: the device, whose kind chooses the clock where `clock` does not.
        difference: the largest difference of two results.
        before: called before each run and not timed, such as to empty a cache.
        clock: which counts; processes that a run has waited for are counted in.
        work: how much one run does, in words.
        flops: count our operations, for the share of the device's matrix rate.
        warm_up: run both once before, untimed.
        memory: measure how much each run holds.
    """
    setup.ui.say(f"timing {what}")
    counted: float | None = None
    if warm_up or flops:
        with FlopCounterMode(display=False) if flops else nullcontext() as counter:
            ours()
        counted = float(counter.get_total_flops()) if counter is not None else None
    if warm_up:
        theirs()
    timings: dict[bool, list[Timing]] = {True: [], False: []}
    results: dict[bool, Any] = {}
    started = time.monotonic()
    for number in range(repeats):
        for own in (number % 2 == 1, number % 2 == 0):  # in turns, so that neither is always the first
            if before is not None:
                before()
            results[own], timing = _timed(ours if own else theirs, setup.device, memory)
            timings[own].append(timing)
        spent = time.monotonic() - started
        if spent + spent / (number + 1) > seconds:
            break
    kind: Clock = clock or ("cpu" if setup.device.type == "cpu" else "wall")
    apart = difference(results[True], results[False]) if difference is not None else None
    rate = matrix_rate(setup.device, setup.dtype, kind) if counted else None
    return BenchRow(what, baseline, kind, tuple(timings[True]), tuple(timings[False]), apart, work, counted, rate)


@contextmanager
def random_weights(setup: BenchSetup) -> Iterator[None]:
    """What is built inside lies on the benchmark's device in its number format, with the same weights each time."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(setup.dtype)
    try:
        with setup.device:
            yield
    finally:
        torch.set_default_dtype(before)


def _timed(run: Callable[[], T], device: torch.device, memory: bool) -> tuple[T, Timing]:
    gc.collect()
    held = _reset_peak(device) if memory else None
    _wait(device)
    wall, cpu = time.perf_counter(), _cpu_seconds()
    result = run()
    _wait(device)
    cpu, wall = _cpu_seconds() - cpu, time.perf_counter() - wall
    peak = _peak(device) if memory else None
    return result, Timing(cpu, wall, None if held is None or peak is None else max(0, peak - held))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_seconds() -> float:
    """Of this process, its threads, and the processes that it has waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def _reset_peak(device: torch.device) -> int | None:
    """Begin to measure a peak; the bytes that are held now, or None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):  # Linux: the high-water mark of resident memory goes back to what is resident
        descriptor = os.open("/proc/self/clear_refs", os.O_WRONLY)
        try:
            os.write(descriptor, b"5")
        finally:
            os.close(descriptor)
        return _peak(device)
    return None


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return None


@cache
def matrix_rate(device: torch.device, dtype: torch.dtype, clock: Clock) -> float:
    """Operations a second (of `clock`) of a product of large square matrices on this device: the most that a model
    can come near to."""
    side = 8192 if device.type != "cpu" else 1024
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    a @ b
    found = [_timed(lambda: [a @ b for _ in range(4)], device, False)[1] for _ in range(5)]
    return 4 * 2 * side**3 / min(getattr(timing, clock) for timing in found)
