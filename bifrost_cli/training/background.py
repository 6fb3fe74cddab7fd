"""Work that goes on in a thread beside a training's steps, one piece at a time; its error arrives with the next."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType


class BackgroundWork:
    """A context manager; its end waits for what is under way, whose error it raises unless another one is.

    Attributes:
        seconds: how long the last finished piece took.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.seconds = 0.0

    def __enter__(self) -> BackgroundWork:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        found = self.wait()
        if error is None and found is not None:
            raise found

    def start(self, work: Callable[[], object]) -> None:
        """Begin `work`; what was begun before must have been waited for."""

        def run() -> None:
            began = time.monotonic()
            try:
                work()
            except BaseException as error:
                self._error = error
            self.seconds = time.monotonic() - began

        assert self._thread is None
        self._thread = threading.Thread(target=run, name="background work")
        self._thread.start()

    def wait(self) -> BaseException | None:
        """Wait for what was begun; the error that it met."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        return error
