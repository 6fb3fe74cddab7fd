"""The metrics of `bifrost eval`: the built-in ones, and those that installed packages add as `bifrost.metrics`."""

from __future__ import annotations

from collections.abc import Sequence

from bifrost_cli.errors import BifrostError, EnvironmentProblem
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
    "shapes": f"{_ROOM}.shapes_accuracy:ShapesAccuracy",
    "clipscore": f"{_ROOM}.clip_score:ClipScore",
    "reconstruction": f"{_ROOM}.reconstruction:Reconstruction",
}
REGISTRY = Plugins(GROUP, BUILTIN, base=Metric)


def metric_class(name: str) -> type[Metric]:
    """The class of a metric.

    Raises:
        UsageError: an unknown name (BF-USE-003).
        EnvironmentProblem: two metrics of one name (BF-ENV-003), or one that does not load (BF-ENV-004).
    """
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
