"""GenEval: its rules (Ghosh et al. 2023, section 3), prompts, the folder its scorer reads, and the results it writes.

Boxes are (x1, y1, x2, y2) in pixels. An image that is missing is an error: a smaller denominator is another score.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bifrost_cli.config.schema import Images
from bifrost_cli.data.image_sets import EvalImage, ImageSet
from bifrost_cli.data.images import read_image
from bifrost_cli.data.sources.table import jsonl_rows
from bifrost_cli.errors import DataError

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
    """One detected object; `mask_HW` bool, None where the detector gives boxes alone."""

    box: tuple[float, float, float, float]
    score: float
    mask_HW: np.ndarray | None = None


Objects = Mapping[str, Sequence[Detection]]
Colours = Callable[[Sequence[Detection], str], Sequence[str]]  # of objects of a class


def counted(objects: Objects, task: str) -> dict[str, list[Detection]]:
    """The detections that count for a task, the surest first. Counting has a higher threshold than the rest."""
    threshold = COUNTING_THRESHOLD if task == "counting" else THRESHOLD
    surest = {name: sorted((found for found in detections if found.score > threshold), key=lambda found: -found.score)
              for name, detections in objects.items()}  # fmt: skip
    return {name: detections[:MAX_OBJECTS] for name, detections in surest.items() if detections}


def relations(first: Detection, second: Detection) -> set[str]:
    """Where `first` is as seen from `second`, of RELATIONS; none when their centres are too near.

    d = max(|c1 - c2| - 0.1 (s1 + s2), 0) sign(c1 - c2) / |c1 - c2|, each coordinate beyond 1/2 counts
    """
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

    Args:
        asked: a line of GenEval's prompts (`include`: class, count, perhaps color, perhaps position [relation, index of
            an earlier clause]; `exclude`: class, count).
        objects: as of `counted`; `colours`: names the colours of objects of a class.
    """
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in asked.get("include", ()):
        group = list(objects.get(clause["class"], ()))[: clause["count"]]
        why = _lacks(clause, group, groups, colours)
        reasons += [why] if why else []
        groups.append(None if why else group)
    for clause in asked.get("exclude", ()):
        there = len(objects.get(clause["class"], ()))
        if there >= clause["count"]:
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
        target = groups[index]
        if target is None:
            return f"no target for {name} to be {relation}"
        for there in (relations(first, second) for first in group for second in target):
            if relation not in there:
                return f"expected {name} {relation} target, found {' and '.join(sorted(there)) or 'neither'} target"
    return ""


def read_asked(path: Path) -> list[Asked]:
    """A file of prompts (`evaluation_metadata.jsonl`), a line each. DataError: a line that is none, with its number."""
    lines = _lines(path)
    for number, line in lines:
        if why := _wrong(line):
            raise DataError(f"{path}:{number} is not a prompt of GenEval: {why}",
                            fix='a line has "tag", "prompt" and "include"', code="BF-DATA-005")  # fmt: skip
    if not lines:
        raise DataError(f"{path} holds no prompt", code="BF-DATA-001")
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
        match clause.get("position", [RELATIONS[0], -1]):
            case [relation, int(index)] if relation in RELATIONS and index < place and not isinstance(index, bool):
                pass
            case _:
                return "a position is a relation and the number of an earlier clause"
    return ""


def is_layout(folder: Path) -> bool:
    """Whether a folder is laid out as GenEval's scorer reads it: `00000/metadata.jsonl`, `00000/samples/0000.png`."""
    return folder.is_dir() and any(path.name.isdecimal() and (path / METADATA).is_file() for path in folder.iterdir())


def from_layout(folder: Path, rules: Images) -> tuple[ImageSet, list[Asked]]:
    """The images of such a folder in order, and the line of each one's prompt; `rules`: how images are read.

    DataError: numbers that are missing, a folder without images or with fewer than the others.
    """
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
            digest, load = hashlib.sha256(path.read_bytes()).hexdigest(), partial(_read, path, rules)
            entries.append(EvalImage(f"{place.name}/{path.name}", digest, load, line["prompt"], line.get("plan")))
    if len(counts) != 1 or 0 in counts:
        numbers = ", ".join(f"{number} prompts with {count}" for count, number in sorted(counts.items()))
        raise DataError(f"{folder} has not as many images of every prompt: {numbers}", code="BF-DATA-008",
                        fix="make the missing ones: a mean over fewer is another score")  # fmt: skip
    return ImageSet(f"GenEval's folder {folder}", tuple(entries)), asked


def _read(path: Path, rules: Images) -> np.ndarray:
    return read_image(path, rules).rgb


def asked_of(images: ImageSet, asked: Sequence[Asked], source: Path) -> list[Asked]:
    """The line of each image of a set that was generated from `source`, so many images of each line in order.

    DataError: images that are missing, or generated from other prompts (rewritten ones are another benchmark).
    """
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
    """What the original scorer wrote (`results.jsonl`): filename, tag, prompt, correct, reason, metadata.

    DataError: a line that is not a result, an image judged twice, a prompt that is missing or has fewer images.
    """
    kinds = {"filename": str, "tag": str, "prompt": str, "correct": bool}
    lines = []
    counts: Counter[str] = Counter()  # of images of each prompt, whose number is that of the folder around `samples`
    for number, line in _lines(path):
        typed = all(type(line.get(name)) is kind for name, kind in kinds.items()) and line["tag"] in TASKS
        folder = Path(line["filename"]).parent.parent.name if typed else ""
        if not folder.isdecimal():
            raise DataError(f"{path}:{number} is not a GenEval result record", code="BF-DATA-005",
                            fix="give the results.jsonl that evaluate_images.py wrote")  # fmt: skip
        lines.append(line)
        counts[folder] += 1
    if not lines:
        raise DataError(f"{path} holds no result", code="BF-DATA-001")
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


def _lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    lines = list(jsonl_rows(file_bytes(path)))
    for number, line in lines:
        if isinstance(line, ValueError):
            raise DataError(f"{path}:{number} is not a JSON object: {line}", code="BF-DATA-005")
    return lines  # type: ignore[return-value]


def file_bytes(path: Path) -> bytes:
    """A benchmark's file. DataError: one that cannot be read, or a huge one."""
    try:
        if path.stat().st_size > LIMIT:
            raise DataError(f"{path} has more than {LIMIT} bytes", code="BF-DATA-005")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", code="BF-DATA-001") from error
