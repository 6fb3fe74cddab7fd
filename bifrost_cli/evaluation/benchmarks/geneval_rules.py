"""GenEval's rules: objects detected in an image against what its prompt requires (Ghosh et al. 2023, section 3).

Boxes are (x1, y1, x2, y2) in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # a detection counts when its score is above it
MAX_OBJECTS = 16  # of a class, the surest; overlapping boxes of a class are not merged
POSITION_THRESHOLD = 0.1  # of both objects' sizes: an offset within it is none
PROMPTS = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
TASKS = tuple(PROMPTS)  # and how many prompts of each the benchmark has
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


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
    """Where `first` is as seen from `second`: left of, right of, above, below; none when their centres are too near.

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
    sides = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {side for side, holds in sides.items() if holds}


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
        for first in group:
            for second in target:
                there = relations(first, second)
                if relation not in there:
                    return f"expected {name} {relation} target, found {' and '.join(sorted(there)) or 'neither'} target"
    return ""
