"""DPG-Bench as a metric: the benchmark's questions put to a multimodal LLM instead of mPLUG.

It is labelled with its judge; published numbers are mPLUG's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bifrost_cli.errors import UsageError
from bifrost_cli.evaluation.metrics.metric import (
    Line,
    Metric,
    MetricInputs,
    MetricOption,
    generated_from,
    plan_warnings,
    row,
)
from bifrost_cli.evaluation.metrics.shapes_accuracy import share

if TYPE_CHECKING:
    from bifrost_cli.data.image_sets import ImageSet
    from bifrost_cli.evaluation.benchmarks.dpg_questions import Item
    from bifrost_cli.evaluation.networks.vqa import VqaJudge
    from bifrost_cli.runtime.ui import Ui

PROTOCOL = "bifrost-dpg/2"  # 2: intervals by prompt, of kinds of questions too


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
        MetricOption("questions", "DPG-Bench's CSV."),
        MetricOption("judge", "The MLLM that answers them.  (default: the recipe's MLLM)", "MODEL"),
    )

    def __init__(self, judge: VqaJudge, items: Sequence[Item]) -> None:
        from bifrost_cli.artifacts.identity import digest_of

        self._judge, self._items = judge, list(items)
        asked = digest_of([[item.prompt, [list(vars(question).values()) for question in item.questions]]
                           for item in self._items])  # fmt: skip
        self.identity = {"judge": judge.identity, "asked": asked, "protocol": PROTOCOL}
        self.device = judge.device

    @classmethod
    def check(cls, request: Any) -> None:
        if request.options.get("questions") is None:
            raise UsageError("DPG-Bench asks questions, and none are given", fix="--questions dpg_bench.csv")

    @classmethod
    def load(cls, inputs: MetricInputs) -> Dpg:
        from bifrost_cli.evaluation.benchmarks.dpg_questions import questions_of, read_questions
        from bifrost_cli.evaluation.networks.vqa import VqaJudge
        from bifrost_cli.loading.loaders import ModelLoader

        path, judge, models = Path(inputs.options["questions"]), inputs.options.get("judge"), inputs.models
        items, name = questions_of(inputs.images, read_questions(path), path), judge or models.mllm
        revision = None if judge else models.mllm_revision
        judging = models.model_copy(update={"mllm": name, "mllm_revision": revision, "weights": "dtype"})
        mllm = ModelLoader(judging, inputs.device).mllm()
        return cls(VqaJudge(mllm, name if name.startswith("builtin:") else Path(name).name), items)

    def compute(self, images: ImageSet, lines: Sequence[Line], ui: Ui) -> list[dict[str, Any]]:
        from bifrost_cli.evaluation.benchmarks.dpg_questions import depending, score

        answered = []
        with ui.progress(len(lines), "DPG-Bench") as bar:
            for line, entry, item in zip(lines, images.entries, self._items, strict=True):
                rgb_HWc = entry.load()
                answers = {one.number: self._judge.yes(rgb_HWc, one.text) > 0.5 for one in item.questions}
                counted = depending(item.questions, answers)
                no = [question.text for question in item.questions if not counted[question.number]]
                line.update(prompt=item.prompt, right=not no, why="no: " + " ".join(no))
                line["numbers"] = {"dpg": score(item.questions, answers)}
                answered += [{"broad": question.broad, "detailed": question.detailed, "right": answers[question.number],
                              "prompt": item.prompt} for question in item.questions]  # fmt: skip
                bar.advance(1)
        source = generated_from((entry.plan for entry in images.entries), images.artifact is not None)
        return [self._row(lines, answered, source)]

    def _row(self, lines: Sequence[Line], answered: Sequence[Mapping[str, Any]], source: str) -> dict[str, Any]:
        from bifrost_cli.stats import clustered_error, clustered_interval

        scores, prompts = [line["numbers"]["dpg"] for line in lines], [line["prompt"] for line in lines]
        (low, high), judge = clustered_interval(scores, prompts), self._judge.identity
        return row(
            "dpg", f"DPG-Bench by {judge['name']}", sum(scores) / len(scores), format="share", n_gen=len(lines),
            standard_error=clustered_error(scores, prompts), interval95=[low, high],
            spread=f"95 % by prompt: {low:.1%} to {high:.1%}",
            details=[f"{len(answered)} answers about {len(lines)} images of {len(set(prompts))} prompts"],
            categories=_shares(answered, "broad"), detailed=_shares(answered, "detailed"), protocol=PROTOCOL,
            extractor=judge, painted_from=source,
            sentence=f"DPG-Bench's questions, answered yes or no by {judge['name']} (weights {judge['weights'][:12]}); "
            f"a question counts only with those it depends on, kinds of questions by their plain answers. Published "
            f"numbers are mPLUG's: compare only with numbers of this judge. Generated from {source}.",
        )  # fmt: skip

    def settings(self) -> dict[str, str]:
        return {"judge": self._judge.identity["name"], "judge, sha256": self._judge.identity["weights"]}

    def warnings(self, images: ImageSet, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        return plan_warnings(entry.plan for entry in images.entries)


def _shares(answered: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, Any]]:
    names = sorted({answer[key] for answer in answered})
    return [share(name, [answer for answer in answered if answer[key] == name], by_prompt=True) for name in names]
