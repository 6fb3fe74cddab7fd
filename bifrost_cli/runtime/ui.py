"""How a stage talks to whoever started it: not at all (`Ui`, the Python API), or on stderr (`TerminalUi`).

Progress is a bar on a terminal, else one plain line every 30 s. Results are returned, not said.
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
        if not sys.stderr.isatty():
            plain = _Plain(total, what, self)
            yield plain
            plain.show()
            return
        from rich.console import Console  # 0.1 s that only a terminal pays
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        name, rate = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[rate]}")
        columns = (name, BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bars:
            yield _Bar(bars, bars.add_task(what, total=total, rate=""))


class _Plain(Counter):
    def __init__(self, total: int, what: str, ui: Ui) -> None:
        self.done, self.total, self.what, self.ui = 0, total, what, ui
        self.started = self.shown = time.monotonic()

    def advance(self, n: int = 1) -> None:
        self.done += n
        if time.monotonic() - self.shown >= PLAIN_EVERY:
            self.show()

    def show(self) -> None:
        self.shown = time.monotonic()
        rate = self.done / max(self.shown - self.started, 1e-3)
        self.ui.say(f"{self.what}: {self.done}/{self.total}, {rate:.1f}/s")


class _Bar(Counter):
    def __init__(self, bars: Any, task: Any) -> None:
        self.bars, self.task, self.done, self.started = bars, task, 0, time.monotonic()

    def advance(self, n: int = 1) -> None:
        self.done += n
        rate = self.done / max(time.monotonic() - self.started, 1e-3)
        self.bars.update(self.task, advance=n, rate=f"{rate:.1f}/s")
