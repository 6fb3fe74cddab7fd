"""Gates: limits that a report's numbers must keep, for a pipeline that stops when they do not (`--gate 'fid<12.5'`).

One rule for all: a gate holds when it holds for the worse end of the value's 95 % interval. A value without an
uncertainty is compared as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bifrost_cli.errors import UsageError
from bifrost_cli.evaluation.registry import gate_names

Z95 = 1.959963984540054  # 97.5 % point of the normal distribution; `stats` would import torch

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
        """The gate, the value, the end of its interval that counts, and whether it holds.

        Raises:
            UsageError: a metric that was not measured.
        """
        names = gate_names(self.metric)
        gated = [result for result in results if result["metric"] in names]
        if not gated:
            measured = ", ".join(result["metric"] for result in results)
            raise UsageError(f"invalid gate {str(self)!r}: {self.metric} was not measured", at=f"measured: {measured}")
        below = self.sign.startswith("<")
        end = max(_interval(result)[1] for result in gated) if below else min(_interval(result)[0] for result in gated)
        holds = {"<": end < self.limit, "<=": end <= self.limit, ">": end > self.limit, ">=": end >= self.limit}
        return {"gate": str(self), "value": gated[0]["value"], "end": end, "holds": holds[self.sign]}

    def __str__(self) -> str:
        return f"{self.metric}{self.sign}{self.limit:g}"


def _interval(result: Mapping[str, Any]) -> tuple[float, float]:
    if "interval95" in result:
        return result["interval95"][0], result["interval95"][1]
    half = Z95 * result.get("standard_error", 0.0)
    return result["value"] - half, result["value"] + half
