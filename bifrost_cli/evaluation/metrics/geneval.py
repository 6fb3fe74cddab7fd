"""GenEval as a metric: the benchmark's own rules over a detector of transformers instead of mmdet's.

It is labelled with its detector: results of the original scorer come in by `bifrost geneval import` and are never
mixed with these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bifrost_cli.errors import DataError, UsageError
from bifrost_cli.evaluation.metrics.clip_score import load_scorer
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
    from bifrost_cli.evaluation.benchmarks.geneval import Asked
    from bifrost_cli.evaluation.networks.judges import ColourNamer, Detector
    from bifrost_cli.runtime.ui import Ui

PROTOCOL = "bifrost-geneval/2"  # 2: intervals of tasks by prompt
DETECTOR = "facebook/mask2former-swin-small-coco-instance"


class GenEval(Metric):
    """GenEval (Ghosh et al. 2023); `asked`: a line of the benchmark for each image, in order."""

    name, help = "geneval", "GenEval's rules, by --detector."
    protocol = (
        "GenEval's six tasks: objects by a Mask2Former of transformers above 0.3 (counting 0.9), at most 16 of a "
        "class, none merged; a position counts beyond a tenth of both sizes; a colour is the nearest of ten in a CLIP, "
        "on the object's crop over grey #999; the mean of the tasks' means, with intervals by prompt. The original "
        "scorer uses mmdet's Mask2Former: its results come in by bifrost geneval import."
    )
    needs_prompts, keys = True, ("clip",)
    options = (
        MetricOption("detector", "GenEval's Mask2Former: a folder or hub id.", "MODEL", DETECTOR),
        MetricOption("metadata", "GenEval's file of prompts."),
    )

    def __init__(self, detector: Detector, namer: ColourNamer, asked: Sequence[Asked]) -> None:
        from bifrost_cli.artifacts.identity import digest_of

        self._detector, self._namer, self._asked, self.device = detector, namer, list(asked), detector.device
        needed = {clause["class"] for line in asked for clause in (*line["include"], *line.get("exclude", ()))}
        if unknown := sorted(needed - set(detector.classes.values())):
            raise DataError(f"the detector knows no {', '.join(unknown[:5])}", code="BF-DATA-007",
                            fix="give a Mask2Former of COCO's instances: --detector FOLDER_OR_ID")  # fmt: skip
        self.identity = {"detector": detector.identity, "colours": namer.identity, "asked": digest_of(self._asked),
                         "protocol": PROTOCOL}  # fmt: skip

    @classmethod
    def check(cls, request: Any) -> None:
        if request.quarters:
            raise UsageError("GenEval has no grids: its images are single ones", fix="leave out --quarters")

    @classmethod
    def load(cls, inputs: MetricInputs) -> GenEval:
        from bifrost_cli.evaluation.benchmarks.geneval import asked_of, from_layout, is_layout, read_asked
        from bifrost_cli.evaluation.networks.judges import ColourNamer
        from bifrost_cli.evaluation.networks.load_networks import load_detector

        if (metadata := inputs.options.get("metadata")) is not None:
            asked = asked_of(inputs.images, read_asked(Path(metadata)), Path(metadata))
        elif inputs.samples is not None and is_layout(inputs.samples):
            asked = from_layout(inputs.samples, inputs.rules)[1]
        else:
            raise UsageError("GenEval needs to know what each image should show",
                             fix="--metadata evaluation_metadata.jsonl, the benchmark's file of prompts")  # fmt: skip
        return cls(load_detector(inputs.options["detector"], inputs.device), ColourNamer(load_scorer(inputs)), asked)

    def compute(self, images: ImageSet, lines: Sequence[Line], ui: Ui) -> list[dict[str, Any]]:
        from bifrost_cli.evaluation.benchmarks.geneval import counted, verdict

        with ui.progress(len(lines), "GenEval") as bar:
            for line, entry, asked in zip(lines, images.entries, self._asked, strict=True):
                rgb_HWc = entry.load()
                objects = counted(self._detector.objects(rgb_HWc), asked["tag"])
                right, why = verdict(asked, objects, partial(self._namer.colours, rgb_HWc))
                line.update(category=asked["tag"], right=right, why=why)
                bar.advance(1)
        detector: dict[str, Any] = self._detector.identity
        source = generated_from((entry.plan for entry in images.entries), images.artifact is not None)
        sentence = (
            f"GenEval's six tasks and rules, judged by {detector['name']} (weights {detector['weights'][:12]}) with "
            f"colours by {self._namer.identity['name']}: mean of the tasks' means over {len(lines)} images. The "
            f"benchmark's own scorer uses mmdet's Mask2Former; compare only with numbers of this detector. "
            f"Generated from {source}."
        )
        return [geneval_row(lines, f"by {detector['name']}", sentence, protocol=PROTOCOL, extractor=detector,
                            painted_from=source)]  # fmt: skip

    def settings(self) -> dict[str, str]:
        return {"detector": self._detector.identity["name"], "detector, sha256": self._detector.identity["weights"],
                "CLIP of colours": self._namer.identity["name"]}  # fmt: skip

    def warnings(self, images: ImageSet, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        return plan_warnings(entry.plan for entry in images.entries)


def geneval_row(lines: Sequence[Mapping[str, Any]], judge: str, sentence: str = "", **more: Any) -> dict[str, Any]:
    """The summary of judged images (`category`, `right`, `prompt`): each task's share, and the unweighted mean of the
    tasks. The images of a prompt are one cluster; the mean's interval is made of the tasks' (Zou and Donner 2008)."""
    from bifrost_cli.evaluation.benchmarks.geneval import PROMPTS
    from bifrost_cli.stats import clustered_error

    rows, odd = [], []
    for name, count in PROMPTS.items():
        task = [line for line in lines if line["category"] == name]
        prompts = [line["prompt"] for line in task]
        if task:
            error = clustered_error([float(line["right"]) for line in task], prompts)
            rows.append({**share(name, task, by_prompt=True), "error_by_prompt": error})
        if len(set(prompts)) != count:
            odd.append(f"{name} {len(set(prompts))} of {count}")
    value = sum(found["value"] for found in rows) / len(rows)
    error = math.hypot(*(found["error_by_prompt"] for found in rows)) / len(rows)
    low, high = (math.hypot(*(found["value"] - found["interval95"][end] for found in rows)) / len(rows)
                 for end in (0, 1))  # fmt: skip
    right = [line["prompt"] for line in lines if line["right"]]
    return row(
        "geneval", f"GenEval {judge}", value, format="share", n_gen=len(lines), standard_error=error, sentence=sentence,
        interval95=[value - low, value + high], spread=f"95 % by prompt: {value - low:.1%} to {value + high:.1%}",
        details=[f"{len(right)} of {len(lines)} images are right",
                 f"{len(set(right))} of {len({line['prompt'] for line in lines})} prompts have one that is right",
                 *[f"not the benchmark's own {sum(PROMPTS.values())} prompts: {', '.join(odd)}"] * bool(odd)],
        categories=rows, **more,
    )  # fmt: skip
