"""Bars that a report's numbers must clear, for a pipeline that stops when they do not.

Comes in: texts such as `fid<12.5` and a report's results. Goes out: whether each holds, with its uncertainty against
it: a gate holds when it holds for the worse end of the value's interval. Does not know how anything was measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bifrost_cli.errors import UsageError

_FORM = re.compile(r"\s*([a-z0-9_]+)\s*(<=|>=|<|>)\s*(-?[0-9.]+(?:e-?[0-9]+)?)\s*")
_SHORT = {"fid": ("fid", "frechet_distance"), "kid": ("kid", "kernel_distance"), "is": ("inception_score",),
          "shapes": ("shapes_accuracy",)}  # fmt: skip


@dataclass(frozen=True)
class Gate:
    """`metric` as in report.json, or its flag's name; `sign` <, <=, > or >=."""

    metric: str
    sign: str
    bar: float

    @classmethod
    def of(cls, text: str) -> Gate:
        """UsageError (2): a text that is no gate."""
        found = _FORM.fullmatch(text)
        try:
            return cls(found[1], found[2], float(found[3]))
        except (TypeError, ValueError):
            raise UsageError(f"--gate {text} is no bar",
                             fix="a metric, <, <=, > or >=, and a number: --gate 'fid<12.5'") from None  # fmt: skip

    def judged(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """For report.json: the bar, the value, the end of its interval that counts, and whether it holds.

        UsageError: a metric that was not measured.
        """
        names = _SHORT.get(self.metric, (self.metric,))
        found = [result for result in results if result["metric"] in names]
        if not found:
            there = ", ".join(result["metric"] for result in results)
            raise UsageError(f"--gate {self.metric}: it was not measured", at=f"measured: {there}")
        below = self.sign.startswith("<")
        end = max(map(_high, found)) if below else min(map(_low, found))
        holds = {"<": end < self.bar, "<=": end <= self.bar, ">": end > self.bar, ">=": end >= self.bar}[self.sign]
        return {"gate": f"{self.metric}{self.sign}{self.bar:g}", "value": found[0]["value"], "end": end, "holds": holds}


def _low(result: Mapping[str, Any]) -> float:
    return result["interval95"][0] if "interval95" in result else result["value"] - result.get("standard_error", 0.0)


def _high(result: Mapping[str, Any]) -> float:
    return result["interval95"][1] if "interval95" in result else result["value"] + result.get("standard_error", 0.0)
