"""GenEval (Ghosh et al. 2023): its rules over a detector of transformers instead of mmdet's, its prompts and folders.

An image that is missing is an error: a smaller denominator is another score.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bifrost_cli.errors import DataError, UsageError
from bifrost_cli.evaluation.metrics.image_metrics import load_scorer, share
from bifrost_cli.evaluation.metrics.metric import Line, Metric, MetricInputs, MetricOption, planned, row

if TYPE_CHECKING:
    import numpy as np

    from bifrost_cli.config.schema import Images
    from bifrost_cli.data.image_sets import ImageSet
    from bifrost_cli.evaluation.judges import ColourNamer, Detector
    from bifrost_cli.runtime.ui import Ui

PROTOCOL = "bifrost-geneval/2"  # 2: intervals of tasks by prompt
DETECTOR = "facebook/mask2former-swin-small-coco-instance"
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # a detection counts when its score is above it
MAX_OBJECTS = 16  # of a class, the surest; overlapping boxes of a class are not merged
POSITION_THRESHOLD = 0.1  # of both objects' sizes: an offset within it is none
PROMPTS = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
TASKS = tuple(PROMPTS)  # and how many prompts of each the benchmark has
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
LIMIT = 1 << 28  # bytes of a file of lines
METADATA, SAMPLES = "metadata.jsonl", "samples"
Asked = dict[str, Any]  # of a prompt: tag, prompt, include, perhaps exclude; plan, where images were generated from one


@dataclass(frozen=True)
class Detection:
    """One detected object."""

    box: tuple[float, float, float, float]  # (x1, y1, x2, y2) in pixels
    score: float
    mask_HW: np.ndarray | None = None  # bool; None where the detector gives boxes alone


Objects = Mapping[str, Sequence[Detection]]
Colours = Callable[[Sequence[Detection], str], Sequence[str]]  # of objects of a class


class GenEval(Metric):
    """Labelled with its detector, never mixed with results of the original scorer; `asked`: a line for each image."""

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
        MetricOption("metadata", "GenEval's file of prompts.  (default: the fetched one)"),
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
        from bifrost_cli.evaluation.benchmark_files import cached
        from bifrost_cli.evaluation.judges import ColourNamer
        from bifrost_cli.evaluation.networks import load_detector

        if (metadata := inputs.options.get("metadata")) is not None:
            asked = asked_of(inputs.images, read_asked(Path(metadata)), Path(metadata))
        elif inputs.samples is not None and is_layout(inputs.samples):
            asked = from_layout(inputs.samples, inputs.rules)[1]
        elif (fetched := cached("geneval")) is not None:
            asked = asked_of(inputs.images, read_asked(fetched), fetched)
        else:
            raise UsageError("GenEval needs to know what each image should show",
                             fix="bifrost fetch geneval, or --metadata FILE, the benchmark's prompts")  # fmt: skip
        return cls(load_detector(inputs.options["detector"], inputs.device), ColourNamer(load_scorer(inputs)), asked)

    def compute(self, images: ImageSet, lines: Sequence[Line], ui: Ui) -> list[dict[str, Any]]:
        with ui.progress(len(lines), "GenEval") as bar:
            for line, entry, asked in zip(lines, images.entries, self._asked, strict=True):
                rgb_HWc = entry.load()
                objects = counted(self._detector.objects(rgb_HWc), asked["tag"])
                right, why = verdict(asked, objects, partial(self._namer.colours, rgb_HWc))
                line.update(category=asked["tag"], right=right, why=why)
                bar.advance(1)
        detector: dict[str, Any] = self._detector.identity
        source, _ = planned((entry.plan for entry in images.entries), images.artifact is not None)
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
        return planned(entry.plan for entry in images.entries)[1]


def geneval_row(lines: Sequence[Mapping[str, Any]], judge: str, sentence: str = "", **more: Any) -> dict[str, Any]:
    """The summary of judged images (`category`, `right`, `prompt`): each task's share, and the unweighted mean of the
    tasks. The images of a prompt are one cluster; the mean's interval is made of the tasks' (Zou and Donner 2008)."""
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


def counted(objects: Objects, task: str) -> dict[str, list[Detection]]:
    """The detections that count for a task, the surest first. Counting has a higher threshold than the rest."""
    threshold = COUNTING_THRESHOLD if task == "counting" else THRESHOLD
    surest = {name: sorted((found for found in detections if found.score > threshold), key=lambda found: -found.score)
              for name, detections in objects.items()}  # fmt: skip
    return {name: detections[:MAX_OBJECTS] for name, detections in surest.items() if detections}


def relations(first: Detection, second: Detection) -> set[str]:
    """Where `first` is as seen from `second`, of RELATIONS: of d = max(|c1 - c2| - 0.1 (s1 + s2), 0) sign(c1 - c2) /
    |c1 - c2| each coordinate beyond 1/2 counts; none when their centres are too near."""
    import numpy as np

    boxes = np.array([first.box, second.box], np.float64).reshape(2, 2, 2)
    centre_1, centre_2 = boxes.mean(axis=1)
    size_1, size_2 = np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centre_1 - centre_2
    beyond = np.maximum(np.abs(offset) - POSITION_THRESHOLD * (size_1 + size_2), 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    x, y = beyond / np.linalg.norm(offset)
    return {side for side, holds in zip(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5), strict=True) if holds}


def verdict(asked: Mapping[str, Any], objects: Objects, colours: Colours) -> tuple[bool, str]:
    """Whether an image shows what its prompt requires, and why not.

    `asked` is a line of GenEval's prompts (`include`: class, count, perhaps color, perhaps position [relation, index of
    an earlier clause]; `exclude`: class, count), `objects` as of `counted`."""
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in asked.get("include", ()):
        group = list(objects.get(clause["class"], ()))[: clause["count"]]
        why = _lacks(clause, group, groups, colours)
        reasons += [why] if why else []
        groups.append(None if why else group)
    for clause in asked.get("exclude", ()):
        if (there := len(objects.get(clause["class"], ()))) >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {there}")
    return not reasons, "; ".join(reasons)


def _lacks(clause: Mapping[str, Any], group: Sequence[Detection], groups: Sequence[Sequence[Detection] | None],
           colours: Colours) -> str:  # fmt: skip
    """What one clause lacks; "" when it is met. Colour and place are those of the surest objects."""
    name, count = clause["class"], clause["count"]
    if len(group) < count:
        return f"expected {name}>={count}, found {len(group)}"
    if "color" in clause:
        seen = list(colours(group, name))
        if seen.count(clause["color"]) < count:
            counts = ", ".join(f"{seen.count(colour)} {colour}" for colour in COLORS if colour in seen)
            return f"expected {clause['color']} {name}>={count}, found {counts}"
    if "position" in clause:
        relation, index = clause["position"]
        if (target := groups[index]) is None:
            return f"no target for {name} to be {relation}"
        for there in (relations(first, second) for first in group for second in target):
            if relation not in there:
                return f"expected {name} {relation} target, found {' and '.join(sorted(there)) or 'neither'} target"
    return ""


def read_asked(path: Path) -> list[Asked]:
    """A file of prompts (`evaluation_metadata.jsonl`), a line each. DataError: a line that is none, with its number."""
    lines = _lines(path, "prompt")
    for number, line in lines:
        if why := _wrong(line):
            raise DataError(f"{path}:{number} is not a prompt of GenEval: {why}",
                            fix='a line has "tag", "prompt" and "include"', code="BF-DATA-005")  # fmt: skip
    return [line for _, line in lines]


def _wrong(line: Asked) -> str:
    """Why a value is not a prompt of GenEval; "" when it is one."""
    if line.get("tag") not in TASKS or not isinstance(line.get("prompt"), str):
        return f"its tag is none of {', '.join(TASKS)}, or it has no prompt"
    if not isinstance(line.get("plan", ""), str):
        return "its plan is not a text"
    clauses, excluded = line.get("include"), line.get("exclude", [])
    if not isinstance(clauses, list) or not clauses or not isinstance(excluded, list):
        return "it includes nothing"
    for place, clause in enumerate([*clauses, *excluded]):
        if not isinstance(clause, dict) or type(clause.get("class")) is not str or type(clause.get("count")) is not int:
            return "a clause has no class or no count"
        if clause.get("color", COLORS[0]) not in COLORS:
            return f"there is no colour {clause['color']}"
        if "position" in clause:
            match clause["position"]:
                case [relation, int(index)] if relation in RELATIONS and 0 <= index < place and type(index) is int:
                    continue
            return "a position is a relation and the number of an earlier clause"
    return ""


def is_layout(folder: Path) -> bool:
    """Whether a folder is laid out as GenEval's scorer reads it: `00000/metadata.jsonl`, `00000/samples/0000.png`."""
    return folder.is_dir() and any(path.name.isdecimal() and (path / METADATA).is_file() for path in folder.iterdir())


def from_layout(folder: Path, rules: Images) -> tuple[ImageSet, list[Asked]]:
    """The images of such a folder in order, and the line of each one's prompt; `rules`: how images are read."""
    from bifrost_cli.data.image_sets import EvalImage, ImageSet
    from bifrost_cli.data.images import read_image

    def pixels(path: Path) -> np.ndarray:
        return read_image(path, rules).rgb

    folders = sorted((path for path in folder.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
    if [int(path.name) for path in folders] != list(range(len(folders))):
        raise DataError(f"{folder} lacks some of the prompts: its folders are not numbered from 0 without a gap",
                        fix="make the missing images, or number the folders again", code="BF-DATA-005")  # fmt: skip
    entries: list[EvalImage] = []
    asked: list[Asked] = []
    counts: Counter[int] = Counter()
    for place in folders:
        (line, *more) = read_asked(place / METADATA)
        if more:
            raise DataError(f"{place / METADATA} has {len(more) + 1} lines; one prompt has one", code="BF-DATA-005")
        files = sorted(path for path in (place / SAMPLES).glob("*.png") if path.stem.isdecimal())
        counts[len(files)] += 1
        asked += [line] * len(files)
        for path in files:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            name, load = f"{place.name}/{path.name}", partial(pixels, path)
            entries.append(EvalImage(name, digest, load, line["prompt"], line.get("plan")))
    if len(counts) != 1 or 0 in counts:
        numbers = ", ".join(f"{number} prompts with {count}" for count, number in sorted(counts.items()))
        raise DataError(f"{folder} has not as many images of every prompt: {numbers}", code="BF-DATA-008",
                        fix="make the missing ones: a mean over fewer is another score")  # fmt: skip
    return ImageSet(f"GenEval's folder {folder}", tuple(entries)), asked


def asked_of(images: ImageSet, asked: Sequence[Asked], source: Path) -> list[Asked]:
    """The line of each image of a set that was generated from `source`, so many images of each line in order."""
    copies, rest = divmod(len(images.entries), len(asked))
    if rest or not copies:
        raise DataError(f"{images.what} has {len(images.entries)} images for {len(asked)} prompts of {source}",
                        fix="generate as many of each: bifrost generate --prompts FILE -n 4",
                        code="BF-DATA-008")  # fmt: skip
    lines = [asked[index // copies] for index in range(len(images.entries))]
    for entry, line in zip(images.entries, lines, strict=True):
        if entry.prompt != line["prompt"]:
            raise DataError(f"{entry.name} was generated from another prompt than that of {source}",
                            at=f"{entry.prompt!r} instead of {line['prompt']!r}", code="BF-DATA-007",
                            fix="generate the benchmark's own prompts; a rewritten prompt makes another score",
                            )  # fmt: skip
    return lines


def read_results(path: Path) -> list[dict[str, Any]]:
    """What the original scorer wrote (`results.jsonl`): filename, tag, prompt, correct, reason, metadata."""
    kinds = {"filename": str, "tag": str, "prompt": str, "correct": bool}
    lines = []
    counts: Counter[str] = Counter()  # of images of each prompt, whose number is that of the folder around `samples`
    for number, line in _lines(path, "result"):
        typed = all(type(line.get(name)) is kind for name, kind in kinds.items()) and line["tag"] in TASKS
        folder = Path(line["filename"]).parent.parent.name if typed else ""
        if not folder.isdecimal():
            raise DataError(f"{path}:{number} is not a GenEval result record", code="BF-DATA-005",
                            fix="give the results.jsonl that evaluate_images.py wrote")  # fmt: skip
        lines.append(line)
        counts[folder] += 1
    if twice := [name for name, count in Counter(line["filename"] for line in lines).items() if count > 1]:
        raise DataError(f"{path} judges {twice[0]} more than once", code="BF-DATA-006")
    if sorted(map(int, counts)) != list(range(len(counts))):
        raise DataError(f"{path} lacks some of the prompts: its folders are not numbered from 0 without a gap",
                        fix="make the missing images and run the scorer again", code="BF-DATA-008")  # fmt: skip
    if len(set(counts.values())) != 1:
        fewest = min(counts, key=lambda name: counts[name])
        raise DataError(f"{path} has not as many images of every prompt: {fewest} has {counts[fewest]}",
                        fix="make the missing ones and run the scorer again", code="BF-DATA-008")  # fmt: skip
    return sorted(lines, key=lambda line: line["filename"])


def _lines(path: Path, what: str) -> list[tuple[int, dict[str, Any]]]:
    from bifrost_cli.data.sources.table import jsonl_rows

    lines = list(jsonl_rows(file_bytes(path)))
    for number, line in lines:
        if isinstance(line, ValueError):
            raise DataError(f"{path}:{number} is not a JSON object: {line}", code="BF-DATA-005")
    if not lines:
        raise DataError(f"{path} holds no {what}", code="BF-DATA-001")
    return lines  # type: ignore[return-value]


def file_bytes(path: Path) -> bytes:
    """A benchmark's file. DataError: one that cannot be read, or a huge one."""
    try:
        if path.stat().st_size > LIMIT:
            raise DataError(f"{path} has more than {LIMIT} bytes", code="BF-DATA-005")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", code="BF-DATA-001") from error
