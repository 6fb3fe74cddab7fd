"""Gates: limits that a report's numbers must keep, for a pipeline that stops when they do not (`--gate 'fid<12.5'`).

A gate holds when it holds for the worse end of the value's 95 % interval; a value without one is compared as it is.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bifrost_cli.errors import UsageError
from bifrost_cli.evaluation.registry import REGISTRY, metric_class

Z95 = 1.959963984540054  # 97.5 % point of the normal distribution; `stats` would import torch
_SIGNS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_FORM = re.compile(r"\s*([a-z0-9_-]+?)\s*(<=|>=|<|>)\s*(-?[0-9.]+(?:e-?[0-9]+)?)\s*")


@dataclass(frozen=True)
class Gate:
    """`metric`: a flag's name, or a metric of report.json; `sign`: <, <=, > or >=."""

    metric: str
    sign: str
    limit: float

    @classmethod
    def of(cls, text: str) -> Gate:
        """Read a gate. UsageError: a text that is none."""
        match = _FORM.fullmatch(text)
        try:
            return cls(match[1], match[2], float(match[3]))  # type: ignore[index]
        except (TypeError, ValueError):
            raise UsageError(f"invalid gate {text!r}",
                             fix="a metric, <, <=, > or >=, and a number: --gate 'fid<12.5'") from None  # fmt: skip

    def check(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The gate, the value, the end of its interval that counts, and whether it holds. UsageError: not measured."""
        names = (metric_class(self.metric).gates if self.metric in REGISTRY else ()) or (self.metric,)
        gated = [result for result in results if result["metric"] in names]
        if not gated:
            measured = ", ".join(result["metric"] for result in results)
            raise UsageError(f"invalid gate {str(self)!r}: {self.metric} was not measured", at=f"measured: {measured}")
        lows, highs = zip(*(_interval(result) for result in gated), strict=True)
        end = max(highs) if self.sign.startswith("<") else min(lows)
        holds = _SIGNS[self.sign](end, self.limit)
        return {"gate": str(self), "value": gated[0]["value"], "end": end, "holds": holds}

    def __str__(self) -> str:
        return f"{self.metric}{self.sign}{self.limit:g}"


def _interval(result: Mapping[str, Any]) -> tuple[float, float]:
    if "interval95" in result:
        return result["interval95"][0], result["interval95"][1]
    half = Z95 * result.get("standard_error", 0.0)
    return result["value"] - half, result["value"] + half
