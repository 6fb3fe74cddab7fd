"""What a metric of `bifrost eval` is: one class from which its flag, help, protocol, gate and report row follow.

A package adds one by the entry point group `bifrost.metrics`. NumPy, torch and networks are imported where they are
used: `bifrost eval --help` reads the class attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    from pathlib import Path

    from bifrost_cli.config.schema import Evaluate, Images, Latents, Models
    from bifrost_cli.data.image_sets import ImageSet
    from bifrost_cli.evaluation.inputs import EvalRequest, Reference
    from bifrost_cli.runtime.ui import Ui

Line = dict[str, Any]  # of an image: name, prompt, plan, seed; `right`, `why` and `category` where it was judged
T = TypeVar("T")


@dataclass(frozen=True)
class MetricOption:
    """A command-line option of one metric: `--NAME VALUE`."""

    name: str
    help: str
    metavar: str = "FILE"
    default: str | None = None


@dataclass(frozen=True)
class MetricInputs:
    """What a metric is loaded from."""

    images: ImageSet
    reference: Reference | None
    options: Mapping[str, Any]  # values of the metrics' own, by name
    samples: Path | None  # the folder or artifact that was named, if any
    settings: Evaluate  # the recipe's evaluate section, then its sections models, latents and images
    models: Models
    latents: Latents
    rules: Images
    workspace: Path
    device: str
    shared: dict[Any, Any] = field(default_factory=dict)

    def share(self, key: Any, load: Callable[[], T]) -> T:
        """What several metrics use, as a feature network: loaded by the first that asks for `key`."""
        if key not in self.shared:
            self.shared[key] = load()
        return self.shared[key]


class Metric:
    """One metric: class attributes describe it, an instance has its networks loaded."""

    name: ClassVar[str]  # the flag `--NAME`, and the name in `evaluate(metrics=[NAME])`
    help: ClassVar[str]  # the flag's line in `bifrost eval --help`
    protocol: ClassVar[str]  # what `--explain` prints, in plain sentences
    gates: ClassVar[tuple[str, ...]] = ()  # names in report.json that `--gate NAME<1` stands for; none: NAME itself
    rows: ClassVar[tuple[str, ...]] = ()  # the other names of its rows in report.json
    needs_prompts: ClassVar[bool] = False  # a set must not mix images of prompts and of plans
    needs_reference: ClassVar[bool] = False
    needs_many: ClassVar[bool] = False  # it is biased by few images, so that --min-samples holds
    reconstructs: ClassVar[bool] = False  # it measures reconstructions of the reference instead of samples
    keys: ClassVar[tuple[str, ...]] = ()  # keys of the recipe's evaluate section that decide its numbers
    options: ClassVar[tuple[MetricOption, ...]] = ()

    identity: dict[str, Any]  # JSON of all that decides the numbers besides the images; part of the report's identity
    packages: tuple[str, ...] = ()  # whose versions the report names
    device: str = "cpu"  # where it computed

    @classmethod
    def check(cls, request: EvalRequest) -> None:
        """Raise UsageError for a request that this metric cannot serve; nothing is loaded or read yet."""

    @classmethod
    def load(cls, inputs: MetricInputs) -> Metric:
        """The metric with its networks and files. EnvironmentProblem: weights or a package are missing."""
        return cls()

    def prepare(self, images: ImageSet, ui: Ui) -> None:
        """What the processes of a job share before the first of them computes alone, such as features of images."""

    def compute(self, images: ImageSet, lines: Sequence[Line], ui: Ui) -> list[dict[str, Any]]:
        """Rows of the report, see `row`; a metric that judges single images also updates their `lines`."""
        raise NotImplementedError

    def settings(self) -> dict[str, str]:
        """Its lines in the report's table of settings."""
        return {}

    def warnings(self, images: ImageSet, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        """What a reader of its numbers must know."""
        return []


def row(
    metric: str, label: str, value: float, *, n_gen: int, spread: str, sentence: str, format: str = "number",
    details: Iterable[str] = (), **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A result of report.json: `metric` is its name there, `label` that on the page, `n_gen` how many images it is of,
    `spread` its uncertainty in words, `sentence` what was measured and how, `details` further lines. `format`: number,
    or share (printed in percent); `more`: standard_error, interval95, categories and others."""
    return {"metric": metric, "label": label, "format": format, "value": value, "spread": spread,
            "details": list(details), "n_gen": n_gen, "sentence": sentence, **more}  # fmt: skip


def planned(plans: Iterable[str | None], known: bool = True) -> tuple[str, list[str]]:
    """What images were generated from (without a plan that is only `known` of images generated here), and what a reader
    of a benchmark's number must know of it."""
    if any(plan is not None for plan in plans):
        warning = "The MLLM wrote a plan for each prompt first: not the score of the prompts alone."
        return "a plan that the MLLM wrote of each prompt", [warning]
    return "the prompts alone" if known else "what is not known: no samples artifact says so", []
