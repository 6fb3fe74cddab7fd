"""A bounded queue before one thread, which alone touches the pipeline; an asyncio loop follows what it does."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

from bifrost_cli.serve.answers import Refusal

Report = Callable[[dict[str, Any]], None]
Work = Callable[[Report], Iterator[Any]]  # yields results; reports steps in between, and ends when reporting raises


class Cancelled(Exception):
    """Whoever asked has gone: raised by a report, it leaves the pipeline."""


class Job:
    """One request's work. Made, followed and cancelled on the loop; run by the worker.

    Args:
        work: called in the worker's thread.
    """

    def __init__(self, work: Work) -> None:
        self.work, self.cancelled = work, threading.Event()
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        self._results: list[Any] = []
        self._step: dict[str, Any] | None = None
        self._error: BaseException | None = None
        self._finished = False

    async def follow(self) -> AsyncIterator[tuple[str, Any]]:
        """("step", what was reported last), ("result", each result), and ("wait", None) after 10 s of nothing. What the
        work raises is raised here."""
        sent = 0
        while True:
            try:
                await asyncio.wait_for(self._news.wait(), 10)
            except TimeoutError:
                yield "wait", None
            self._news.clear()
            step, self._step = self._step, None
            if step is not None:
                yield "step", step
            while sent < len(self._results):
                sent += 1
                yield "result", self._results[sent - 1]
            if self._finished and sent == len(self._results):
                if self._error is not None:
                    raise self._error
                return

    def run(self) -> None:
        """Do the work, in the thread that calls."""
        try:
            for result in self.work(self.report):
                self._tell(partial(self._results.append, result))
                if self.cancelled.is_set():
                    raise Cancelled
        except BaseException as error:  # noqa: B036 the worker goes on, and whoever asked is told
            self.end(error)
            raise
        self.end(None)

    def report(self, step: dict[str, Any]) -> None:
        """Say how far it is; only the newest step is kept for a reader that is slower. Raises Cancelled."""
        if self.cancelled.is_set():
            raise Cancelled
        self._tell(lambda: setattr(self, "_step", step))

    def end(self, error: BaseException | None) -> None:
        """It is over, by `error` where there is one."""

        def tell() -> None:
            self._error, self._finished = error, True

        self._tell(tell)

    def _tell(self, change: Callable[[], None]) -> None:
        def tell() -> None:
            change()
            self._news.set()

        try:
            self._loop.call_soon_threadsafe(tell)
        except RuntimeError:  # the loop has ended, and with it everyone who could listen
            self.cancelled.set()


class Worker:
    """The thread and its queue.

    Args:
        size: jobs that may wait, beside the one that runs.
        on_end: called in the thread with the seconds that a job took and what it raised, if anything.
    """

    def __init__(self, size: int, on_end: Callable[[float, BaseException | None], None]) -> None:
        self.size, self._on_end = size, on_end
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._running: Job | None = None
        self._closed, self._mean = False, 1.0  # seconds a job
        self._thread = threading.Thread(target=self._work, name="pipeline", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Jobs that wait or run."""
        with self._changed:
            return len(self._jobs) + (self._running is not None)

    def require_room(self) -> None:
        """Refusal: 429 with Retry-After when the queue is full, 503 when it is closed."""
        with self._changed:
            if self._closed:
                raise Refusal(503, "the server is stopping", code="BF-SERVE-009", fix="ask again later")
            if len(self._jobs) >= self.size:
                seconds = max(1, math.ceil(self._mean * len(self._jobs) / 2))
                raise Refusal(
                    429,
                    f"{self.size} requests are waiting already",
                    code="BF-SERVE-002",
                    fix=f"ask again in {seconds} s",
                    headers={"Retry-After": str(seconds)},
                )

    def submit(self, job: Job) -> int:
        """Put a job at the end of the queue; how many are before it. Refusal as `require_room`."""
        with self._changed:
            self.require_room()
            self._jobs.append(job)
            self._changed.notify()
            return len(self) - 1

    def cancel(self, job: Job) -> None:
        """A job that waits is removed at once; one that runs ends after its step; one that has ended stays so."""
        job.cancelled.set()
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)

    def close(self) -> None:
        """Refuse what comes, end what waits with 503, and let the job that runs finish."""
        with self._changed:
            self._closed = True
            waiting, self._jobs = list(self._jobs), deque()
            self._changed.notify()
        for job in waiting:
            job.end(Refusal(503, "the server is stopping", code="BF-SERVE-009", fix="ask again later"))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                self._running = job = self._jobs.popleft()
            start, failed = time.monotonic(), None
            try:
                job.run()
            except BaseException as error:  # noqa: B036 told to whoever asked; the next job does not suffer
                failed = error
            seconds = time.monotonic() - start
            with self._changed:
                self._running, self._mean = None, 0.8 * self._mean + 0.2 * seconds
            self._on_end(seconds, failed)
            del job, failed
