"""DPG-Bench's questions (Hu et al. 2024; Cho et al. 2024): its file, and the score of the answers about an image.

`dpg_bench.csv` has a question in each row: item_id, text, proposition_id, dependency, tuple,
question_natural_language; a question may depend on others of its prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from bifrost_cli.data.image_sets import EvalImage, ImageSet
from bifrost_cli.data.sources.table_rows import csv_rows
from bifrost_cli.errors import DataError
from bifrost_cli.evaluation.benchmarks.geneval_files import file_bytes

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")


@dataclass(frozen=True)
class Question:
    """One question of a prompt; `parents` are numbers of questions it makes no sense without. `broad`, `detailed`: its
    kind, as entity and entity - whole."""

    number: int
    text: str
    parents: tuple[int, ...]
    broad: str
    detailed: str


def depending(questions: Sequence[Question], answers: Mapping[int, bool]) -> dict[int, bool]:
    """The answers that count: yes only when every question that this one depends on counts as yes, in their order.

    KeyError: a question without an answer, or that depends on none of this prompt.
    """
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


@dataclass
class Item:
    """One prompt of the benchmark."""

    name: str
    prompt: str
    questions: list[Question] = field(default_factory=list)


def read_questions(path: Path) -> dict[str, Item]:
    """Items by prompt, in the file's order. A second line of column names is passed over; no question is lost.

    DataError: columns or lines that are none of the benchmark's, a question twice, one that depends on none there is.
    """
    items: dict[str, Item] = {}
    for line, row in csv_rows(file_bytes(path), str(path), ".csv"):
        if isinstance(row, ValueError):
            raise DataError(f"{path}:{line} cannot be read: {row}", code="BF-DATA-005")
        if lost := [name for name in COLUMNS if name not in row]:
            raise DataError(f"{path} has no column {lost[0]}", at=f"its columns: {', '.join(row)}", code="BF-DATA-005",
                            fix="give dpg_bench.csv as it is published")  # fmt: skip
        if row["item_id"] == "item_id":
            continue
        item = items.setdefault(row["text"], Item(row["item_id"], row["text"]))
        item.questions.append(_question(row, f"{path}:{line}"))
    if not items:
        raise DataError(f"{path} holds no question", code="BF-DATA-001")
    for item in items.values():
        _check(item, path)
    if twice := [name for name, count in Counter(item.name for item in items.values()).items() if count > 1]:
        raise DataError(f"{path}: {twice[0]} has two prompts", code="BF-DATA-006")
    return items


def questions_of(images: ImageSet, items: Mapping[str, Item], source: Path) -> list[Item]:
    """The item of each image, by its prompt, or where it has none by its name: the benchmark's are `ITEM_ID.png`.

    DataError: an image of another prompt (a rewritten one is another benchmark), prompts without images or with
    fewer than the others.
    """
    named = {item.name: item for item in items.values()}
    found = [_item(entry, items, named, source) for entry in images.entries]
    counts = Counter(item.prompt for item in found)
    if len(counts) < len(items) or len(set(counts.values())) > 1:
        raise DataError(
            f"{images.what} has not as many images of every prompt of {source}",
            at=f"{len(items) - len(counts)} prompts have none",
            fix="make the missing ones: a mean over fewer is another score",
            code="BF-DATA-008",
        )
    return found


def _item(entry: EvalImage, items: Mapping[str, Item], named: Mapping[str, Item], source: Path) -> Item:
    if entry.prompt is None:
        name = PurePath(entry.name)
        item = named.get(name.name) or named.get(name.stem)
        why, fix = "is not called as one of the items of", "name it ITEM_ID.png, or put its prompt beside it"
    else:
        item = items.get(entry.prompt)
        why = "was generated from a prompt that is none of"
        fix = "generate the benchmark's own prompts; a rewritten prompt makes another score"
    if item is None:
        raise DataError(f"{entry.name} {why} {source}", at=repr(entry.prompt), fix=fix, code="BF-DATA-007")
    return item


def _question(row: Mapping[str, str], where: str) -> Question:
    try:
        parents = tuple(number for part in row["dependency"].split(",") if (number := int(part)))
        kind = row["tuple"].split("(")[0].strip()
        return Question(int(row["proposition_id"]), row["question_natural_language"].strip(), parents,
                        kind.split("-")[0].strip(), kind)  # fmt: skip
    except ValueError as error:
        raise DataError(f"{where} is no question of DPG-Bench: {error}", code="BF-DATA-005") from error


def _check(item: Item, path: Path) -> None:
    numbers = [question.number for question in item.questions]
    if len(set(numbers)) < len(numbers):
        raise DataError(f"{path}: {item.name} has a question twice", code="BF-DATA-006")
    if lost := {parent for question in item.questions for parent in question.parents} - set(numbers):
        raise DataError(f"{path}: {item.name} has a question that depends on {min(lost)}, which is not there",
                        code="BF-DATA-005")  # fmt: skip
