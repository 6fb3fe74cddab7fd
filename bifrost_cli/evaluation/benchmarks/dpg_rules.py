"""DPG-Bench's arithmetic: answers to a graph of questions about one image (Hu et al. 2024; Cho et al. 2024).

Comes in: questions with the numbers of those they depend on, answers. Goes out: scores. Knows no judge and no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


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
