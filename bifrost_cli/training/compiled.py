"""torch.compile with a way back: what cannot be compiled here runs as it was written, and one line says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bifrost_cli.runtime.ui import Ui

BACKEND = "inductor"


class Compiled:
    """`function`, compiled at its first call for shapes of any size, so that texts of all lengths share one graph."""

    def __init__(self, function: Callable[..., Any], what: str, ui: Ui) -> None:
        self._plain, self._what, self._ui = function, what, ui
        self._compiled: Callable[..., Any] | None = torch.compile(function, dynamic=True, backend=BACKEND)

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self._compiled is not None:
            from torch._dynamo.exc import TorchDynamoException  # a second that only this option pays

            try:
                return self._compiled(*args, **options)
            except TorchDynamoException as error:  # no compiler, or an operation that it does not know
                self._compiled = None
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                self._ui.say(f"{self._what} is not compiled, and runs without: {reason}")
        return self._plain(*args, **options)
