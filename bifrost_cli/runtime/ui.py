"""How a stage talks to whoever started it: not at all (`Ui`, the Python API), or on stderr (`TerminalUi`).

Progress is a bar on a terminal, else one plain line every 30 s. Results are returned, not said.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bifrost_cli.errors import printable, public


def counted(number: int, what: str) -> str:
    """`1 image`, `2 images`: a count with its noun, which takes an s."""
    return f"{number:,} {what}" + "s" * (number != 1)


class Counter:
    """Counts what is done; `show(done, rate)` is called after each step that comes `every` seconds after the last."""

    def __init__(self, show: Callable[[int, str], None] | None = None, every: float = 0) -> None:
        self.done, self._show, self._every = 0, show, every
        self._started = self._shown = time.monotonic()

    def advance(self, n: int = 1) -> None:
        """`n` more are done."""
        self.done += n
        if time.monotonic() - self._shown >= self._every:
            self.show()

    def show(self) -> None:
        """Show how far it is."""
        self._shown = time.monotonic()
        if self._show is not None:
            self._show(self.done, f"{self.done / max(self._shown - self._started, 1e-3):.1f}/s")


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
        print(printable(public(line)), file=sys.stderr, flush=True)

    @contextmanager
    def progress(self, total: int, what: str) -> Iterator[Counter]:
        if not sys.stderr.isatty():
            counter = Counter(lambda done, rate: self.say(f"{what}: {done}/{total}, {rate}"), 30)
            yield counter
            counter.show()
            return
        from rich.console import Console  # 0.1 s that only a terminal pays
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        name, speed = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[rate]}")
        columns = (name, BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bars:
            task = bars.add_task(what, total=total, rate="")
            yield Counter(lambda done, rate: bars.update(task, completed=done, rate=rate))
