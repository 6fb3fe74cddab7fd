"""Batches that are read ahead of the step that trains on them, each in a thread of its own.

In: a task, whose batches are pure functions of (step, micro-batch). Out: the same batches in the same order, however
far ahead they were read; an error of a read is raised in the step that the batch belongs to. What a batch is made of
is the task's affair.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from bifrost_cli.errors import BifrostError

LEFT_ALONE = 5.0  # seconds that reads in flight get when a training ends early


class BatchLoader:
    """The batches of a training from any step on; a context manager, whose end waits for reads in flight.

    Args:
        task: with `fetch(step, micro)`, which needs neither device nor trained weights, and `assemble(fetched)`,
            the rest; one that has only `batch(step, micro)` is never read ahead.
        steps: of the whole training; nothing beyond is read.
        accumulate: micro-batches of a step.
        ahead: how many batches may lie read, or be read, beyond the one in use; 0 reads in the step.
        device: where batches are assembled.
        overlap: assemble the next batch, too, before this one is handed out; on a GPU on a stream of its own, so that
            the frozen models' work on it runs beside the step.

    Attributes:
        waited: seconds that steps have waited for reads.
    """

    def __init__(
        self, task: Any, steps: int, accumulate: int, ahead: int, device: torch.device, overlap: bool = False
    ) -> None:
        self._task, self._accumulate, self._total = task, accumulate, steps * accumulate
        self._splits = hasattr(task, "fetch")
        self._ahead = ahead if self._splits else 0
        self._overlap = overlap and self._ahead > 0
        self._stream = torch.cuda.Stream(device) if self._overlap and device.type == "cuda" else None
        self._reads: deque[_Read] = deque()
        self._ready: tuple[int, Any] | None = None
        self.waited = 0.0

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        until = time.monotonic() + LEFT_ALONE  # a disk that hangs must not hold the end of the process
        while self._reads:
            self._reads.popleft().join(max(0.0, until - time.monotonic()))
        self._ready = None

    def get(self, step: int, micro: int) -> Any:
        """The batch of a step's micro-batch.

        Raises:
            BifrostError: the thread that read it is gone without a word.
            Exception: what the task raised in reading it.
        """
        if not self._splits:
            return self._task.batch(step, micro)
        number = step * self._accumulate + micro
        if self._ready is not None and self._ready[0] == number:
            batch, self._ready = self._ready[1], None
        else:
            batch = self._assemble(self._fetched(number))
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        if self._overlap and number + 1 < self._total and self._reads and not self._reads[0].is_alive():
            self._ready = number + 1, self._assemble(self._fetched(number + 1))
        return batch

    def _assemble(self, fetched: Any) -> Any:
        if self._stream is None:
            return self._task.assemble(fetched)
        # The wait makes it safe to use the memory of earlier batches again: the step that read them is queued before.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            return self._task.assemble(fetched)

    def _fetched(self, number: int) -> Any:
        """What was read for a batch; reads of those that follow are under way afterwards."""
        began = time.monotonic()
        if not self._ahead:
            fetched = self._task.fetch(*divmod(number, self._accumulate))
        else:
            while self._reads and self._reads[0].number != number:
                self._reads.popleft().join()
            if not self._reads:  # alone, because a store may fill its memory at the first read
                self._start(number)
            fetched = self._reads.popleft().result()
            following = self._reads[-1].number + 1 if self._reads else number + 1
            for later in range(following, min(number + 1 + self._ahead, self._total)):
                self._start(later)
        self.waited += time.monotonic() - began
        return fetched

    def _start(self, number: int) -> None:
        step, micro = divmod(number, self._accumulate)
        read = _Read(number, lambda: self._task.fetch(step, micro))
        read.start()
        self._reads.append(read)


class _Read(threading.Thread):
    """One batch being read: a thread for each, so that none can wait for a thread that is gone."""

    def __init__(self, number: int, work: Callable[[], Any]) -> None:
        super().__init__(name=f"batch {number}", daemon=True)
        self.number, self._work = number, work
        self._results: list[Any] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._results.append(self._work())
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        """Wait for the end of the thread; what it read, or the error that it met."""
        self.join()
        if isinstance(self._error, Exception):
            raise self._error
        if not self._results:
            raise BifrostError(f"the thread that read batch {self.number} ahead ended before it was done",
                               at=repr(self._error), fix="give the same command again to continue; "
                               "--set SECTION.train.read_ahead=0 reads without threads") from self._error  # fmt: skip
        return self._results.pop()
