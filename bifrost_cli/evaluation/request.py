"""A validated evaluation request: which metrics of which images, compared with what. Loads and reads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bifrost_cli.config.schema import Evaluate
from bifrost_cli.errors import RecipeError, UsageError
from bifrost_cli.evaluation.metrics.metric import Metric
from bifrost_cli.evaluation.registry import REGISTRY, metric_class, metric_flags, report_order


@dataclass(frozen=True)
class EvalRequest:
    """Made by `request_of`.

    Args:
        metrics: names of metrics; `fd`: further networks for a Frechet distance each; `features`: the others' network.
        samples: an artifact (path or id) or a folder; `prompts`: a file of prompts, `copies` images are generated of
            each; neither: the newest samples since the last training, else a new set.
        quarters: each of `samples` is a grid of 2x2 images.
        reference: what the images are compared with; `options`: the metrics' own options by name.
        min_samples: fewer images are refused where a metric is biased by few.
    """

    metrics: tuple[str, ...]
    fd: tuple[str, ...]
    features: str
    samples: Path | str | None
    prompts: Path | str | None
    copies: int
    quarters: bool
    reference: Path | str | None
    options: Mapping[str, Any]
    min_samples: int

    @cached_property
    def classes(self) -> tuple[type[Metric], ...]:
        """The metrics' classes, in the report's order; of `fd` too."""
        return (*report_order(self.metrics), *[metric_class("fid")] * len(self.fd))

    @property
    def reconstructs(self) -> bool:
        """Whether the reference's images are reconstructed and measured."""
        return any(metric.reconstructs for metric in self.classes)

    @property
    def needed(self) -> int:
        """How many images there must be."""
        return self.min_samples if any(metric.needs_many for metric in self.classes) else 1

    @property
    def compares(self) -> bool:
        """Whether a reference is needed."""
        return any(metric.needs_reference for metric in self.classes)

    @property
    def used_options(self) -> dict[str, Any]:
        """The options of the metrics that are measured."""
        return {option.name: self.options[option.name] for metric in self.classes for option in metric.options}


def request_of(
    settings: Evaluate,
    *,
    metrics: Sequence[str],
    fd: Sequence[str] = (),
    samples: Path | str | None = None,
    prompts: Path | str | None = None,
    copies: int = 1,
    quarters: bool = False,
    reference: Path | str | None = None,
    min_samples: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> EvalRequest:
    """Validate an evaluation request; `settings` is the recipe's evaluate section.

    A reconstruction without a distance gets the Frechet distance to the originals.

    Raises:
        UsageError, RecipeError: what makes no sense, such as an unknown metric.
        EnvironmentProblem: a metric of an installed package that cannot be used.
    """
    minimum = settings.min_samples if min_samples is None else min_samples
    request = EvalRequest(_with_distance(metrics), tuple(fd), settings.features, samples, prompts, copies, quarters,
                          reference, _options(metrics, options or {}), minimum)  # fmt: skip
    if not request.classes:
        raise UsageError("nothing to measure", fix=f"give one or more of --{', --'.join(REGISTRY)}")
    if minimum < 4:
        raise UsageError(f"--min-samples {minimum} is too small: the error of a distance needs at least 4 images")
    if settings.inception_weights and "inception" not in (settings.features, *fd):
        raise RecipeError(
            f"evaluate.inception_weights would be ignored: the features are {settings.features}",
            fix="--features inception, or leave the weights out",
            code="BF-RECIPE-005",
        )
    if samples is not None and prompts is not None:
        raise UsageError("--samples and --prompts both say what is measured", fix="give one of them")
    if quarters and samples is None:
        raise UsageError("--quarters cuts grids of 2x2, and none are given", fix="--samples FOLDER")
    for metric in request.classes:
        metric.check(request)
    _require_used(request.metrics, options or {})
    return request


def _with_distance(metrics: Sequence[str]) -> tuple[str, ...]:
    classes = [metric_class(name) for name in metrics]
    lacking = any(metric.reconstructs for metric in classes) and not any(metric.needs_many for metric in classes)
    return (*metrics, "fid") if lacking else tuple(metrics)


def _options(metrics: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the options of the metrics that are measured: those given, else their defaults."""
    known = {option.name: option.default for name in metrics for option in metric_class(name).options}
    return known | {name: value for name, value in given.items() if name in known and value is not None}


def _require_used(metrics: Sequence[str], given: Mapping[str, Any]) -> None:
    owners = {option.name: name for name, _, options in metric_flags() for option in options}
    for name in sorted(name for name, value in given.items() if value is not None):
        if name not in owners:
            raise UsageError(f"no metric has an option {name}", at=f"options: {', '.join(sorted(owners))}")
        if name not in _options(metrics, given):
            raise UsageError(f"--{name} is an option of --{owners[name]}, which is not measured",
                             fix=f"--{owners[name]}, or leave out --{name}")  # fmt: skip
