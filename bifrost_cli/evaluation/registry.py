"""The metrics of `bifrost eval`, those of installed packages (`bifrost.metrics`) too, and gates on their numbers."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bifrost_cli.errors import BifrostError, EnvironmentProblem, UsageError
from bifrost_cli.evaluation.metrics.metric import Metric, MetricOption
from bifrost_cli.runtime.plugins import Plugins

GROUP = "bifrost.metrics"
_ROOM = "bifrost_cli.evaluation.metrics"
BUILTIN = {  # a report's identity lists its metrics in this order
    "fid": f"{_ROOM}.feature_metrics:Fid",
    "sfid": f"{_ROOM}.feature_metrics:SpatialFid",
    "kid": f"{_ROOM}.feature_metrics:Kid",
    "is": f"{_ROOM}.feature_metrics:InceptionScore",
    "prdc": f"{_ROOM}.feature_metrics:Prdc",
    "geneval": f"{_ROOM}.geneval:GenEval",
    "dpg": f"{_ROOM}.dpg:Dpg",
    "shapes": f"{_ROOM}.image_metrics:ShapesAccuracy",
    "clipscore": f"{_ROOM}.image_metrics:ClipScore",
    "reconstruction": f"{_ROOM}.image_metrics:Reconstruction",
}
REGISTRY = Plugins(GROUP, BUILTIN, base=Metric)
Z95 = 1.959963984540054  # 97.5 % point of the normal distribution; `stats` would import torch
_SIGNS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_GATE = re.compile(r"\s*([a-z0-9_-]+?)\s*(<=|>=|<|>)\s*(-?[0-9.]+(?:e-?[0-9]+)?)\s*")


def metric_class(name: str) -> type[Metric]:
    """The class of a metric. UsageError: an unknown name. EnvironmentProblem: two of one name, or a broken one."""
    metric: type[Metric] = REGISTRY[name]
    if metric.name != name:
        raise EnvironmentProblem(f"the plug-in {name} in {GROUP} calls itself {metric.name}", code="BF-ENV-004",
                                 fix=f"its entry point and its class need one name; leave out --{name}")  # fmt: skip
    return metric


def metric_flags() -> list[tuple[str, str, tuple[MetricOption, ...]]]:
    """Name, help line and options of every metric; one that does not load is named with the reason."""
    found = []
    for name in REGISTRY:
        try:
            metric = metric_class(name)
            found.append((name, metric.help, metric.options))
        except BifrostError as error:
            found.append((name, f"(cannot be used: {error.message})", ()))
    return found


def explained(metrics: Sequence[str], fd: Sequence[str]) -> list[str]:
    """How each metric is measured, a line each, for `--explain`."""
    measured = [f"{name}: {metric_class(name).protocol}" for name in metrics]
    return measured + [f"fd {ref}: as fid, in its features." for ref in fd]


@dataclass(frozen=True)
class Gate:
    """A limit that a report's numbers must keep (`--gate 'fid<12.5'`): with the worse end of their 95 % interval, and a
    value without one as it is."""

    metric: str  # a flag's name, or a metric of report.json
    sign: str
    limit: float

    @classmethod
    def of(cls, text: str) -> Gate:
        """Read a gate. UsageError: a text that is none."""
        try:
            metric, sign, limit = _GATE.fullmatch(text).groups()  # type: ignore[union-attr]
            return cls(metric, sign, float(limit))
        except (AttributeError, ValueError):
            raise UsageError(f"invalid gate {text!r}",
                             fix="a metric, <, <=, > or >=, and a number: --gate 'fid<12.5'") from None  # fmt: skip

    def require_measured(self, metrics: Sequence[type[Metric]]) -> None:
        """UsageError where none of the metrics that are asked for gives this number; a package's own may give any."""
        known = {name for metric in metrics for name in (metric.name, *metric.gates, *metric.rows)}
        if self.metric in known or any(metric.name not in BUILTIN and not metric.rows for metric in metrics):
            return
        fix = f"add --{self.metric}" if self.metric in REGISTRY else f"gates here: {', '.join(sorted(known))}"
        raise UsageError(f"invalid gate {str(self)!r}: {self.metric} is not measured", fix=fix)

    def check(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The gate, the value, the end of its interval that counts, and whether it holds. UsageError: not measured."""
        names = (metric_class(self.metric).gates if self.metric in REGISTRY else ()) or (self.metric,)
        gated = [result for result in results if result["metric"] in names]
        if not gated:
            measured = ", ".join(result["metric"] for result in results)
            raise UsageError(f"invalid gate {str(self)!r}: {self.metric} was not measured", at=f"measured: {measured}")
        ends = []
        for result in gated:
            value, half = result["value"], Z95 * result.get("standard_error", 0.0)
            ends.append(result.get("interval95", (value - half, value + half)))
        end = max(high for _, high in ends) if self.sign.startswith("<") else min(low for low, _ in ends)
        return {"gate": str(self), "value": gated[0]["value"], "end": end, "holds": _SIGNS[self.sign](end, self.limit)}

    def __str__(self) -> str:
        return f"{self.metric}{self.sign}{self.limit:g}"
