"""DPG-Bench (Hu et al. 2024; Cho et al. 2024): its questions put to a multimodal LLM instead of mPLUG.

`dpg_bench.csv` has a question in each row, which may depend on others of its prompt. Published numbers are mPLUG's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from bifrost_cli.errors import DataError, UsageError
from bifrost_cli.evaluation.metrics.image_metrics import share
from bifrost_cli.evaluation.metrics.metric import Line, Metric, MetricInputs, MetricOption, planned, row

if TYPE_CHECKING:
    from bifrost_cli.data.image_sets import ImageSet
    from bifrost_cli.evaluation.judges import VqaJudge
    from bifrost_cli.runtime.ui import Ui

PROTOCOL = "bifrost-dpg/2"  # 2: intervals by prompt, of kinds of questions too
COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")


@dataclass(frozen=True)
class Question:
    """One question of a prompt."""

    number: int
    text: str
    parents: tuple[int, ...]  # numbers of questions it makes no sense without
    broad: str  # its kind, as entity
    detailed: str  # its kind, as entity - whole


@dataclass
class Item:
    """One prompt of the benchmark."""

    name: str
    prompt: str
    questions: list[Question] = field(default_factory=list)


class Dpg(Metric):
    """DPG-Bench (Hu et al. 2024); `items`: that of each image, in order."""

    name, help = "dpg", "DPG-Bench's --questions, by the MLLM."
    protocol = (
        "DPG-Bench's graph of questions for each prompt, answered yes or no by the recipe's MLLM or --judge (the first "
        "word's probabilities); a question counts only with those it depends on; the mean over images, "
        "intervals clustered by prompt. Published numbers are mPLUG's."
    )
    needs_prompts = True
    options = (
        MetricOption("questions", "DPG-Bench's CSV.  (default: the fetched one)"),
        MetricOption("judge", "The MLLM that answers them.  (default: the recipe's MLLM)", "MODEL"),
    )

    def __init__(self, judge: VqaJudge, items: Sequence[Item]) -> None:
        from bifrost_cli.artifacts.identity import digest_of

        self._judge, self._items, self.device = judge, list(items), judge.device
        asked = digest_of([[item.prompt, [list(vars(question).values()) for question in item.questions]]
                           for item in self._items])  # fmt: skip
        self.identity = {"judge": judge.identity, "asked": asked, "protocol": PROTOCOL}

    @classmethod
    def check(cls, request: Any) -> None:
        from bifrost_cli.evaluation.benchmark_files import cached

        if request.options.get("questions") is None and cached("dpg") is None:
            raise UsageError("DPG-Bench asks questions, and none are given",
                             fix="bifrost fetch dpg, or --questions dpg_bench.csv")  # fmt: skip

    @classmethod
    def load(cls, inputs: MetricInputs) -> Dpg:
        from bifrost_cli.evaluation.benchmark_files import BENCHMARKS, cached
        from bifrost_cli.evaluation.judges import VqaJudge
        from bifrost_cli.loading.loaders import ModelLoader

        path = Path(inputs.options.get("questions") or cached("dpg") or BENCHMARKS["dpg"].name)
        judge, models = inputs.options.get("judge"), inputs.models
        items, name = questions_of(inputs.images, read_questions(path), path), judge or models.mllm
        revision = None if judge else models.mllm_revision
        judging = models.model_copy(update={"mllm": name, "mllm_revision": revision, "weights": "dtype"})
        mllm = ModelLoader(judging, inputs.device).mllm()
        return cls(VqaJudge(mllm, name if name.startswith("builtin:") else Path(name).name), items)

    def compute(self, images: ImageSet, lines: Sequence[Line], ui: Ui) -> list[dict[str, Any]]:
        from bifrost_cli.stats import clustered_error, clustered_interval

        answered: list[dict[str, Any]] = []
        scores, prompts = [], [item.prompt for item in self._items]
        with ui.progress(len(lines), "DPG-Bench") as bar:
            for line, entry, item in zip(lines, images.entries, self._items, strict=True):
                rgb_HWc = entry.load()
                answers = {one.number: self._judge.yes(rgb_HWc, one.text) > 0.5 for one in item.questions}
                counted = depending(item.questions, answers)
                no = [question.text for question in item.questions if not counted[question.number]]
                scores.append(score(item.questions, answers))
                line.update(prompt=item.prompt, right=not no, why="no: " + " ".join(no), numbers={"dpg": scores[-1]})
                answered += [{"broad": question.broad, "detailed": question.detailed, "right": answers[question.number],
                              "prompt": item.prompt} for question in item.questions]  # fmt: skip
                bar.advance(1)
        broad, detailed = (
            [share(name, [one for one in answered if one[key] == name], by_prompt=True)
             for name in sorted({one[key] for one in answered})] for key in ("broad", "detailed")
        )  # fmt: skip
        source, _ = planned((entry.plan for entry in images.entries), images.artifact is not None)
        (low, high), judge = clustered_interval(scores, prompts), self._judge.identity
        return [row(
            "dpg", f"DPG-Bench by {judge['name']}", sum(scores) / len(scores), format="share", n_gen=len(lines),
            standard_error=clustered_error(scores, prompts), interval95=[low, high],
            spread=f"95 % by prompt: {low:.1%} to {high:.1%}",
            details=[f"{len(answered)} answers about {len(lines)} images of {len(set(prompts))} prompts"],
            categories=broad, detailed=detailed, protocol=PROTOCOL, extractor=judge, painted_from=source,
            sentence=f"DPG-Bench's questions, answered yes or no by {judge['name']} (weights {judge['weights'][:12]}); "
            f"a question counts only with those it depends on, kinds of questions by their plain answers. Published "
            f"numbers are mPLUG's: compare only with numbers of this judge. Generated from {source}.",
        )]  # fmt: skip

    def settings(self) -> dict[str, str]:
        return {"judge": self._judge.identity["name"], "judge, sha256": self._judge.identity["weights"]}

    def warnings(self, images: ImageSet, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        return planned(entry.plan for entry in images.entries)[1]


def depending(questions: Sequence[Question], answers: Mapping[int, bool]) -> dict[int, bool]:
    """The answers that count: yes only when every question that this one depends on counts as yes, in their order."""
    counted: dict[int, bool] = {}
    for question in questions:
        believed = all(counted[parent] if parent in counted else answers[parent] for parent in question.parents)
        counted[question.number] = answers[question.number] and believed
    return counted


def score(questions: Sequence[Question], answers: Mapping[int, bool]) -> float:
    """The share of an image's questions that count as yes. ValueError: no questions."""
    if not questions:
        raise ValueError("a prompt without questions has no score")
    return sum(depending(questions, answers).values()) / len(questions)


def read_questions(path: Path) -> dict[str, Item]:
    """Items by prompt, in the file's order. A second line of column names is passed over; no question is lost."""
    from bifrost_cli.data.sources.table import csv_rows
    from bifrost_cli.evaluation.metrics.geneval import file_bytes

    items: dict[str, Item] = {}
    for line, cells in csv_rows(file_bytes(path), str(path), ".csv"):
        if isinstance(cells, ValueError):
            raise DataError(f"{path}:{line} cannot be read: {cells}", code="BF-DATA-005")
        if lost := [name for name in COLUMNS if name not in cells]:
            raise DataError(f"{path} has no column {lost[0]}", at=f"its columns: {', '.join(cells)}",
                            fix="give dpg_bench.csv as it is published", code="BF-DATA-005")  # fmt: skip
        if cells["item_id"] == "item_id":
            continue
        try:
            parents = tuple(number for part in cells["dependency"].split(",") if (number := int(part)))
            kind = cells["tuple"].split("(")[0].strip()
            question = Question(int(cells["proposition_id"]), cells["question_natural_language"].strip(), parents,
                                kind.split("-")[0].strip(), kind)  # fmt: skip
        except ValueError as error:
            raise DataError(f"{path}:{line} is no question of DPG-Bench: {error}", code="BF-DATA-005") from error
        items.setdefault(cells["text"], Item(cells["item_id"], cells["text"])).questions.append(question)
    if not items:
        raise DataError(f"{path} holds no question", code="BF-DATA-001")
    for item in items.values():
        numbers = {question.number for question in item.questions}
        if len(numbers) < len(item.questions):
            raise DataError(f"{path}: {item.name} has a question twice", code="BF-DATA-006")
        if missing := {parent for question in item.questions for parent in question.parents} - numbers:
            raise DataError(f"{path}: {item.name} has a question that depends on {min(missing)}, which is not there",
                            code="BF-DATA-005")  # fmt: skip
    if twice := [name for name, count in Counter(item.name for item in items.values()).items() if count > 1]:
        raise DataError(f"{path}: {twice[0]} has two prompts", code="BF-DATA-006")
    return items


def questions_of(images: ImageSet, items: Mapping[str, Item], source: Path) -> list[Item]:
    """The item of each image, by its prompt, or where it has none by its name: the benchmark's are `ITEM_ID.png`."""
    named, found = {item.name: item for item in items.values()}, []
    for entry in images.entries:
        if entry.prompt is None:
            item = named.get(PurePath(entry.name).name) or named.get(PurePath(entry.name).stem)
            why, fix = "is not called as one of the items of", "name it ITEM_ID.png, or put its prompt beside it"
        else:
            item, why = items.get(entry.prompt), "was generated from a prompt that is none of"
            fix = "generate the benchmark's own prompts; a rewritten prompt makes another score"
        if item is None:
            raise DataError(f"{entry.name} {why} {source}", at=repr(entry.prompt), fix=fix, code="BF-DATA-007")
        found.append(item)
    counts = Counter(item.prompt for item in found)
    if len(counts) < len(items) or len(set(counts.values())) > 1:
        raise DataError(f"{images.what} has not as many images of every prompt of {source}",
                        at=f"{len(items) - len(counts)} prompts have none", code="BF-DATA-008",
                        fix="make the missing ones: a mean over fewer is another score")  # fmt: skip
    return found
