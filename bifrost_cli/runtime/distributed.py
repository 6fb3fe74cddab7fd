"""The processes of one job, as torchrun or srun started them: which this is, and what they must agree on.

Until `join` was called there is one process, and nothing here does anything.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bifrost_cli import errors
from bifrost_cli.errors import BifrostError, EnvironmentProblem, RecipeError

TIMEOUT = timedelta(hours=24)  # the first process may check a million images while the others have nothing to do
_HEARD = timedelta(seconds=3)  # how long another process's last words may take
_store: dist.Store | None = None
_round = 0  # how many times all have worked alone
T = TypeVar("T")


def rank() -> int:
    """0 is the first process: it alone prints and writes, but for its own share of shards."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes the job has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(count: int, what: str) -> slice:
    """This process's part of `count` rows, all of the same length. RecipeError when they cannot be shared equally."""
    if count % world():
        fix = f"--set {what}={count - count % world() or world()}, or another number of processes"
        message = f"{what} {count} cannot be shared equally by {world()} processes"
        raise RecipeError(message, code="BF-RECIPE-005", fix=fix)
    return slice(rank() * count // world(), (rank() + 1) * count // world())


def part(items: Sequence[T]) -> Sequence[T]:
    """This process's run of neighbours among `items`; all parts are as long but for one."""
    return items[rank() * len(items) // world() : (rank() + 1) * len(items) // world()]


def join(number: int, of: int, local: int, device: str) -> None:
    """Meet the other processes (MASTER_ADDR, MASTER_PORT). On a GPU each takes the one of its number on this machine.

    EnvironmentProblem BF-ENV-032 when the port is taken or nobody answers, BF-ENV-001 when there are too few GPUs.
    """
    global _store
    if dist.is_initialized():
        return
    cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        what = f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}"
        raise EnvironmentProblem(what, fix="start fewer processes", code="BF-ENV-001")
    if cuda:
        torch.cuda.set_device(local)
    try:
        _store, _, _ = next(dist.rendezvous("env://", number, of, timeout=timedelta(minutes=5)))
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=_store, rank=number, world_size=of, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        what, at = f"the {of} processes of this job cannot meet at {where}", str(error).splitlines()[0][:200]
        fix = "if the address is in use, export another MASTER_PORT"
        raise EnvironmentProblem(what, code="BF-ENV-032", at=at, fix=fix) from error


def run_on_main(work: Callable[[], T]) -> T:
    """What `work` gives in the first process; the others wait for it. Its error is raised in all of them."""
    if world() == 1:
        return work()
    found: list[Any] = [None, None]
    if rank() == 0:
        try:
            found = [work(), None]
        except Exception as error:
            dist.broadcast_object_list([None, _words(error)])
            raise
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise _again(*found[1])
    return found[0]


@contextmanager
def main_context(make: Callable[[], AbstractContextManager[T]]) -> Iterator[T | None]:
    """`with make() as it`, in the first process; None in the others. What goes wrong in making it is raised in all."""
    made: list[AbstractContextManager[T]] = []
    run_on_main(lambda: made.append(make()))
    with made[0] if made else nullcontext() as it:
        yield it


def raise_if_any_failed(error: BaseException | None = None) -> None:
    """Wait for all; when some bring an error, all raise the first of them."""
    if world() == 1 and error is not None:
        raise error
    problems = all_gather_object(None if error is None else _words(error))
    for number, words in enumerate(problems):
        if words is not None:
            raise error if error is not None and number == rank() else _again(*words)


def all_gather_object(value: T) -> list[T]:
    """Every process's value, in order."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def gather_object(value: T) -> list[T]:
    """Every process's value, in order, in the first process; an empty list in the others."""
    values: list[Any] = [value]
    if world() > 1:
        values = [None] * world() if rank() == 0 else []
        dist.gather_object(value, values or None)
    return values


def all_reduce_mean(values: Tensor) -> Tensor:
    """The mean over the processes, in place."""
    if world() > 1:
        dist.all_reduce(values)
        values /= world()
    return values


def _words(error: BaseException) -> list[Any]:
    """An error as another process reads it."""
    if not isinstance(error, BifrostError):
        error = BifrostError(f"{type(error).__name__}: {error}")
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    return [kind.__name__, error.message, error.at, error.fix, error.code]


def _again(kind: str, message: str, at: str | None, fix: str | None, code: str) -> BifrostError:
    return getattr(errors, kind)(message, at=at, fix=fix, code=code)


@contextmanager
def fail_together() -> Iterator[None]:
    """Around all that a job does: its processes end together, and one of them says why.

    EnvironmentProblem BF-ENV-031 when another process was killed or lost; when it left a last word, that error.
    """
    try:
        yield
    except BifrostError as error:
        _last_word(error)
        raise
    except RuntimeError as error:
        text = str(error)
        if not (isinstance(error, dist.DistError) or "gloo" in text or "onnection" in text and "peer" in text):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what started us is ending all by now; first say why
        what, at = "another process of this job was killed or lost", "finished work and checkpoints are intact"
        fix = "see whether memory ran out (dmesg), then give the same command again to continue"
        loss: BifrostError = EnvironmentProblem(what, code="BF-ENV-031", at=at, fix=fix)
        others = [f"word/{number}" for number in range(world()) if number != rank()]
        with suppress(RuntimeError):
            if _store is not None and (said := next((word for word in others if _store.check([word])), None)):
                loss = _again(*json.loads(_store.get(said)))
        _last_word(loss)
        raise loss from error


@contextmanager
def raise_together() -> Iterator[None]:
    """Work that each process does alone: at its end they wait for each other, and an error of one is that of all."""
    global _round
    _round, error = _round + 1, None
    try:
        yield
    except Exception as problem:
        error = problem
        if _store is not None:
            _store.set(f"trouble/{_round}", "")
    raise_if_any_failed(error)


def other_process_failed() -> bool:
    """True when another process has met an error in its part of `raise_together`."""
    return world() > 1 and _store is not None and _store.check([f"trouble/{_round}"])


def _last_word(error: BifrostError) -> None:
    """Leave it for the others; `error.elsewhere` becomes True when the first process says the same."""
    if world() == 1 or _store is None:
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with suppress(RuntimeError):  # the first process is gone, and the store with it
        _store.set(f"word/{rank()}", json.dumps(_words(error)))
        if rank() == 0:
            return
        _store.wait(["word/0"], _HEARD)
        _, message, _, _, code = json.loads(_store.get("word/0"))
        error.elsewhere = (message, code) == (error.message, error.code)
    if not error.elsewhere:
        error.at = f"process {rank()} of {world()}" + (f": {error.at}" if error.at else "")
