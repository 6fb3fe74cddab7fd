"""GenEval as a measure: the benchmark's own rules over a detector of transformers instead of mmdet's.

Comes in: images, what is asked of each, a detector and a namer of colours. Goes out: a verdict each, the mean of the
tasks' means, each with its interval. It is labelled with its detector: numbers of the original scorer come in by
`bifrost geneval import` and are never mixed with these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bifrost_cli.artifacts.identity import digest_of
from bifrost_cli.data.image_sets import EvalImage, ImageSet
from bifrost_cli.errors import DataError
from bifrost_cli.evaluation.benchmarks.geneval_files import Asked
from bifrost_cli.evaluation.benchmarks.geneval_rules import PROMPTS, TASKS, counted, verdict
from bifrost_cli.evaluation.metrics.metric import Line, Metric, generated_from, plan_warnings
from bifrost_cli.evaluation.metrics.shapes_accuracy import share
from bifrost_cli.evaluation.networks.detector import ColourNamer, Detector
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.stats import Z95, clustered_error

PROTOCOL = "bifrost-geneval/1"


class GenEvalMetric(Metric):
    """`asked`: a line of the benchmark for each image, in order. DataError: a class the detector does not know."""

    name = "geneval"

    def __init__(self, detector: Detector, namer: ColourNamer, asked: Sequence[Asked]) -> None:
        self._detector, self._namer, self._asked = detector, namer, list(asked)
        known = set(detector.classes.values())
        wanted = {one["class"] for line in asked for one in (*line["include"], *line.get("exclude", ()))}
        if unknown := sorted(wanted - known):
            raise DataError(f"the detector knows no {', '.join(unknown[:5])}", code="BF-DATA-007",
                            fix="give a Mask2Former of COCO's instances: --detector FOLDER_OR_ID")  # fmt: skip
        self.identity = {"detector": detector.identity, "colours": namer.identity, "asked": digest_of(self._asked),
                         "protocol": PROTOCOL}  # fmt: skip
        self.device = detector.device

    def results(self, images: ImageSet, lines: Sequence[Line], ui: Ui) -> list[dict[str, Any]]:
        with ui.progress(len(lines), "GenEval") as bar:
            for line, entry, asked in zip(lines, images.entries, self._asked, strict=True):
                line.update(self._judged(entry, asked))
                bar.advance(1)
        name = self._detector.identity["name"]
        found = geneval_result(lines, f"by {name}")
        source = generated_from((entry.plan for entry in images.entries), images.artifact is not None)
        found["sentence"] = (
            f"GenEval's six tasks and rules, judged by {name} (weights {self._detector.identity['weights'][:12]}) with "
            f"colours by {self._namer.identity['name']}: mean of the tasks' means over {len(lines)} images. The "
            f"benchmark's own scorer uses mmdet's Mask2Former; compare only with numbers of this detector. "
            f"Painted from {source}."
        )
        return [{**found, "protocol": PROTOCOL, "extractor": self._detector.identity, "painted_from": source}]

    def _judged(self, entry: EvalImage, asked: Asked) -> dict[str, Any]:
        rgb_HWc = entry.load()
        objects = counted(self._detector.objects(rgb_HWc), asked["tag"])
        right, why = verdict(asked, objects, lambda found, name: self._namer.colours(rgb_HWc, found, name))
        return {"category": asked["tag"], "right": right, "why": why}

    def settings(self) -> dict[str, str]:
        return {"detector": self._detector.identity["name"], "detector, sha256": self._detector.identity["weights"],
                "CLIP of colours": self._namer.identity["name"]}  # fmt: skip

    def warnings(self, images: ImageSet, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        return plan_warnings(entry.plan for entry in images.entries)


def geneval_result(lines: Sequence[Mapping[str, Any]], judge: str) -> dict[str, Any]:
    """The summary of judged images (`category`, `right`, `prompt`): each task's share with Wilson's interval, and the
    unweighted mean of the tasks, whose error is that of theirs when the images of a prompt are one cluster."""
    tasks = [name for name in TASKS if any(line["category"] == name for line in lines)]
    rows = []
    for name in tasks:
        mine = [line for line in lines if line["category"] == name]
        error = clustered_error([float(line["right"]) for line in mine], [line["prompt"] for line in mine])
        rows.append({**share(name, mine), "error_by_prompt": error})
    value = sum(row["value"] for row in rows) / len(rows)
    error = math.sqrt(sum(row["error_by_prompt"] ** 2 for row in rows)) / len(rows)
    prompts = {line["prompt"] for line in lines}
    some = {line["prompt"] for line in lines if line["right"]}
    return {
        "metric": "geneval",
        "label": f"GenEval {judge}",
        "format": "share",
        "value": value,
        "standard_error": error,
        "spread": f"95 % by prompt: {max(0, value - Z95 * error):.1%} to {min(1, value + Z95 * error):.1%}",
        "details": [f"{sum(line['right'] for line in lines)} of {len(lines)} images are right",
                    f"{len(some)} of {len(prompts)} prompts have one that is right"]
        + _partial(lines),
        "n_gen": len(lines),
        "categories": rows,
    }  # fmt: skip


def _partial(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which tasks have another number of prompts than the benchmark has; nothing when it is whole."""
    asked = {name: len({line["prompt"] for line in lines if line["category"] == name}) for name in TASKS}
    odd = [f"{name} {asked[name]} of {count}" for name, count in PROMPTS.items() if asked[name] != count]
    return [f"not the benchmark's own {sum(PROMPTS.values())} prompts: {', '.join(odd)}"] if odd else []
