"""DPG-Bench as a measure: the benchmark's questions put to a multimodal LLM instead of mPLUG.

Comes in: images, the item of each, a judge. Goes out: the mean score over prompts, the shares of yes by kind of
question. It is labelled with its judge; published numbers are mPLUG's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bifrost_cli.artifacts.identity import digest_of
from bifrost_cli.data.image_sets import EvalImage, ImageSet
from bifrost_cli.evaluation.benchmarks.dpg_files import Item
from bifrost_cli.evaluation.benchmarks.dpg_rules import depending, score
from bifrost_cli.evaluation.metrics.metric import Line, Metric, generated_from, plan_warnings
from bifrost_cli.evaluation.metrics.shapes_accuracy import share
from bifrost_cli.evaluation.networks.vqa import VqaJudge
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.stats import Z95, clustered_error

PROTOCOL = "bifrost-dpg/1"


class DpgMetric(Metric):
    """`items`: that of each image, in order."""

    name = "dpg"

    def __init__(self, judge: VqaJudge, items: Sequence[Item]) -> None:
        self._judge, self._items = judge, list(items)
        asked = digest_of([[item.prompt, [list(vars(question).values()) for question in item.questions]]
                           for item in self._items])  # fmt: skip
        self.identity = {"judge": judge.identity, "asked": asked, "protocol": PROTOCOL}
        self.device = judge.device

    def results(self, images: ImageSet, lines: Sequence[Line], ui: Ui) -> list[dict[str, Any]]:
        answered = []
        with ui.progress(len(lines), "DPG-Bench") as bar:
            for line, entry, item in zip(lines, images.entries, self._items, strict=True):
                answers = self._answers(entry, item)
                counted = depending(item.questions, answers)
                no = [question.text for question in item.questions if not counted[question.number]]
                line.update(prompt=item.prompt, right=not no, why="no: " + " ".join(no))
                line["numbers"] = {"dpg": score(item.questions, answers)}
                answered += [{"broad": question.broad, "detailed": question.detailed, "right": answers[question.number]}
                             for question in item.questions]  # fmt: skip
                bar.advance(1)
        source = generated_from((entry.plan for entry in images.entries), images.artifact is not None)
        return [self._result(lines, answered, source)]

    def _answers(self, entry: EvalImage, item: Item) -> dict[int, bool]:
        rgb_HWc = entry.load()
        return {question.number: self._judge.yes(rgb_HWc, question.text) > 0.5 for question in item.questions}

    def _result(self, lines: Sequence[Line], answered: Sequence[Mapping[str, Any]], source: str) -> dict[str, Any]:
        scores = [line["numbers"]["dpg"] for line in lines]
        prompts = [line["prompt"] for line in lines]
        value, error = sum(scores) / len(scores), clustered_error(scores, prompts)
        broad = [share(name, [one for one in answered if one["broad"] == name])
                 for name in sorted({one["broad"] for one in answered})]  # fmt: skip
        detailed = [share(name, [one for one in answered if one["detailed"] == name])
                    for name in sorted({one["detailed"] for one in answered})]  # fmt: skip
        judge = self._judge.identity
        return {
            "metric": "dpg",
            "label": f"DPG-Bench by {judge['name']}",
            "format": "share",
            "value": value,
            "standard_error": error,
            "spread": f"95 % by prompt: {max(0, value - Z95 * error):.1%} to {min(1, value + Z95 * error):.1%}",
            "details": [f"{len(answered)} answers about {len(lines)} images of {len(set(prompts))} prompts"],
            "n_gen": len(lines),
            "categories": broad,
            "detailed": detailed,
            "protocol": PROTOCOL,
            "extractor": judge,
            "sentence": f"DPG-Bench's questions, answered yes or no by {judge['name']} (weights "
            f"{judge['weights'][:12]}); a question counts only with those it depends on, kinds of questions by their "
            f"plain answers. Published numbers are mPLUG's: compare only with numbers of this judge. "
            f"Painted from {source}.",
            "painted_from": source,
        }

    def settings(self) -> dict[str, str]:
        return {"judge": self._judge.identity["name"], "judge, sha256": self._judge.identity["weights"]}

    def warnings(self, images: ImageSet, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        return plan_warnings(entry.plan for entry in images.entries)
