"""SIGTERM and Ctrl-C during a training: the first asks for a stop at the next step, the second stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from bifrost_cli.errors import Interrupted


class StopFlag:
    """Context manager; `requested` becomes True at the first signal, a second one raises `Interrupted` (130).

    Outside the main thread Python does not deliver signals, so there the flag simply stays False.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)
            }
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise Interrupted("stopped by a second signal; the checkpoint before this one is intact")
        self.requested = True
