"""Problems of a source, collected: the first five are shown, all of them can be written to a file.

In: problems of one kind. Out: one error. Does not know where the file goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from bifrost_cli.errors import DataError

_SHOWN = 5


@dataclass(frozen=True)
class Problem:
    """What kind (caption, image, ...), where, and why."""

    event: str
    where: str
    reason: str

    def as_json(self) -> dict[str, str]:
        return asdict(self)


class SourceError(DataError):
    """Problems of one kind that stop the command; `problems` holds every one."""

    def __init__(self, message: str, problems: Sequence[Problem], *, code: str, fix: str | None = None) -> None:
        lines = [f"{problem.where}: {problem.reason}" for problem in problems[:_SHOWN]]
        if len(problems) > _SHOWN:
            lines.append(f"and {len(problems) - _SHOWN} more")
        super().__init__(message, at="\n".join(lines), fix=fix or "mend or remove them", code=code)
        self.problems = tuple(problems)
        self.all_shown = len(problems) <= _SHOWN
