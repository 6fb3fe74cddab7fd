"""GenEval's own files: prompts with their requirements, the folder of images its scorer reads, the results it writes.

An image that is missing is an error: a smaller denominator would be another score.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bifrost_cli.config.schema import Images
from bifrost_cli.data.image_sets import EvalImage, ImageSet
from bifrost_cli.data.images import read_image
from bifrost_cli.data.sources.table_rows import jsonl_rows
from bifrost_cli.errors import DataError
from bifrost_cli.evaluation.benchmarks.geneval_rules import COLORS, TASKS

LIMIT = 1 << 28  # bytes of a file of lines
METADATA, SAMPLES = "metadata.jsonl", "samples"
RELATIONS = ("left of", "right of", "above", "below")
Asked = dict[str, Any]  # of a prompt: tag, prompt, include, perhaps exclude; plan, where images were generated from one


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


def is_layout(folder: Path) -> bool:
    """Whether a folder is laid out as GenEval's scorer reads it: `00000/metadata.jsonl`, `00000/samples/0000.png`."""
    return folder.is_dir() and any(path.name.isdecimal() and (path / METADATA).is_file() for path in folder.iterdir())


def from_layout(folder: Path, rules: Images) -> tuple[ImageSet, list[Asked]]:
    """The images of such a folder in order, and the line of each one's prompt; `rules`: how images are read.

    Raises:
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
        for path in files:
            digest, load = hashlib.sha256(path.read_bytes()).hexdigest(), partial(_read, path, rules)
            entries.append(EvalImage(f"{place.name}/{path.name}", digest, load, line["prompt"], line.get("plan")))
            asked.append(line)
    if len(counts) != 1 or 0 in counts:
        numbers = ", ".join(f"{number} prompts with {count}" for count, number in sorted(counts.items()))
        raise DataError(f"{folder} has not as many images of every prompt: {numbers}", code="BF-DATA-008",
                        fix="make the missing ones: a mean over fewer is another score")  # fmt: skip
    return ImageSet(f"GenEval's folder {folder}", tuple(entries)), asked


def asked_of(images: ImageSet, asked: Sequence[Asked], source: Path) -> list[Asked]:
    """The line of each image of a set that was generated from `source`, so many images of each line in order.

    Raises:
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
            raise DataError(
                f"{entry.name} was generated from another prompt than that of {source}",
                at=f"{entry.prompt!r} instead of {line['prompt']!r}",
                fix="generate the benchmark's own prompts; a rewritten prompt makes another score",
                code="BF-DATA-007",
            )
    return lines


def read_results(path: Path) -> list[dict[str, Any]]:
    """What the original scorer wrote (`results.jsonl`): filename, tag, prompt, correct, reason, metadata.

    Raises:
        DataError: a line that is not a result, an image judged twice, a prompt that is missing or has fewer images.
    """
    numbered = _lines(path)
    kinds = {"filename": str, "tag": str, "prompt": str, "correct": bool}
    for number, line in numbered:
        typed = all(type(line.get(name)) is kind for name, kind in kinds.items())
        if not typed or line["tag"] not in TASKS or not _folder(line).isdecimal():
            raise DataError(f"{path}:{number} is not a GenEval result record", code="BF-DATA-005",
                            fix="give the results.jsonl that evaluate_images.py wrote")  # fmt: skip
    lines = [line for _, line in numbered]
    if not lines:
        raise DataError(f"{path} holds no result", code="BF-DATA-001")
    if twice := [name for name, count in Counter(line["filename"] for line in lines).items() if count > 1]:
        raise DataError(f"{path} judges {twice[0]} more than once", code="BF-DATA-006")
    counts = Counter(map(_folder, lines))
    if sorted(map(int, counts)) != list(range(len(counts))):
        raise DataError(f"{path} lacks some of the prompts: its folders are not numbered from 0 without a gap",
                        fix="make the missing images and run the scorer again", code="BF-DATA-008")  # fmt: skip
    if len(set(counts.values())) != 1:
        fewest = min(counts, key=lambda name: counts[name])
        raise DataError(f"{path} has not as many images of every prompt: {fewest} has {counts[fewest]}",
                        fix="make the missing ones and run the scorer again", code="BF-DATA-008")  # fmt: skip
    return sorted(lines, key=lambda line: line["filename"])


def plan_of_result(line: Mapping[str, Any]) -> str | None:
    """The plan that an exported folder said its images were generated from: the scorer copies a prompt's line."""
    try:
        plan = json.loads(line.get("metadata") or "{}")["plan"]
    except (TypeError, ValueError, KeyError, RecursionError):
        return None
    return plan if isinstance(plan, str) else None


def file_bytes(path: Path) -> bytes:
    """A benchmark's file. DataError: one that cannot be read, or a huge one."""
    try:
        if path.stat().st_size > LIMIT:
            raise DataError(f"{path} has more than {LIMIT} bytes", code="BF-DATA-005")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", code="BF-DATA-001") from error


def _folder(line: Mapping[str, Any]) -> str:
    """The number of a result's prompt: that of the folder around `samples`."""
    return Path(line["filename"]).parent.parent.name


def _lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    lines = []
    for number, line in jsonl_rows(file_bytes(path)):
        if isinstance(line, ValueError):
            raise DataError(f"{path}:{number} is not a JSON object: {line}", code="BF-DATA-005")
        lines.append((number, line))
    return lines


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
        if "position" in clause and not _is_position(clause["position"], place):
            return "a position is a relation and the number of an earlier clause"
    return ""


def _is_position(value: Any, place: int) -> bool:
    whole = isinstance(value, list) and len(value) == 2 and type(value[1]) is int
    return whole and value[0] in RELATIONS and 0 <= value[1] < place


def _read(path: Path, rules: Images) -> np.ndarray:
    return read_image(path, rules).rgb
