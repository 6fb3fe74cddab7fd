"""How a stage talks to whoever started it.

In: lines and counts. Out: nothing (`Ui`, the Python API), or stderr (`TerminalUi`, the command line): a bar on a
terminal, else one plain line every 30 s. Results are returned, not said. Does not know what is counted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bifrost_cli.errors import printable

PLAIN_EVERY = 30.0


def counted(number: int, what: str) -> str:
    """`1 image`, `2 images`: a count with its noun, which takes an s."""
    return f"{number:,} {what}" + "s" * (number != 1)


class Counter:
    """Counts and shows nothing; the base of the two that show."""

    def advance(self, n: int = 1) -> None:
        """`n` more are done."""


class Ui:
    """Silent."""

    def say(self, line: str) -> None:
        """One line for a person: what was chosen and why, what to type next."""

    @contextmanager
    def progress(self, total: int, what: str) -> Iterator[Counter]:
        """Count up to `total` of `what`."""
        yield Counter()


class TerminalUi(Ui):
    """Lines and progress on stderr."""

    def say(self, line: str) -> None:
        print(printable(line), file=sys.stderr, flush=True)

    @contextmanager
    def progress(self, total: int, what: str) -> Iterator[Counter]:
        if sys.stderr.isatty():
            with _Bar(total, what) as bar:
                yield bar
        else:
            plain = _Plain(total, what, self)
            yield plain
            plain.close()


class _Plain(Counter):
    def __init__(self, total: int, what: str, ui: Ui) -> None:
        self.done, self.total, self.what, self.ui = 0, total, what, ui
        self.started = self.shown = time.monotonic()

    def advance(self, n: int = 1) -> None:
        self.done += n
        if time.monotonic() - self.shown >= PLAIN_EVERY:
            self.shown = time.monotonic()
            self.ui.say(self._line())

    def close(self) -> None:
        self.ui.say(self._line())

    def _line(self) -> str:
        seconds = time.monotonic() - self.started
        return f"{self.what}: {self.done}/{self.total}, {self.done / max(seconds, 1e-3):.1f}/s"


class _Bar(Counter):
    def __init__(self, total: int, what: str) -> None:
        from rich.console import Console  # 0.1 s that only a terminal pays
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._started = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task(what, total=total, rate="")
        self._done = 0

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.stop()

    def advance(self, n: int = 1) -> None:
        self._done += n
        rate = self._done / max(time.monotonic() - self._started, 1e-3)
        self._progress.update(self._task, advance=n, rate=f"{rate:.1f}/s")
