"""GenEval's rules: what was found in an image against what its prompt asks (Ghosh et al. 2023, section 3).

Comes in: objects by class with box and score, and a prompt's requirements. Goes out: a verdict and its reasons. Knows
no detector, no image and no file. Boxes are (x1, y1, x2, y2) in pixels.
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
    """The detections that count for a task, the surest first. Counting wants to be surer than the rest."""
    bar = COUNTING_THRESHOLD if task == "counting" else THRESHOLD
    kept = {name: sorted((one for one in found if one.score > bar), key=lambda one: -one.score)[:MAX_OBJECTS]
            for name, found in objects.items()}  # fmt: skip
    return {name: found for name, found in kept.items() if found}


def relations(one: Detection, other: Detection) -> set[str]:
    """Where `one` is as seen from `other`: left of, right of, above, below; none when their centres are too near.

    d = max(|c1 - c2| - 0.1 (s1 + s2), 0) sign(c1 - c2) / |c1 - c2|, each coordinate beyond 1/2 counts
    """
    boxes = np.array([one.box, other.box], np.float64).reshape(2, 2, 2)
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
    """Whether an image shows what is asked, and why not. `asked`: a line of GenEval's prompts (`include`: class,
    count, perhaps color, perhaps position [relation, index of an earlier clause]; `exclude`: class, count); `objects`
    as of `counted`."""
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in asked.get("include", ()):
        name, count = clause["class"], clause["count"]
        found = list(objects.get(name, ()))[:count]
        why = _lacks(clause, found, groups, colours)
        reasons += [why] if why else []
        groups.append(None if why else found)
    for clause in asked.get("exclude", ()):
        there = len(objects.get(clause["class"], ()))
        if there >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {there}")
    return not reasons, "; ".join(reasons)


def _lacks(
    clause: Mapping[str, Any],
    found: Sequence[Detection],
    groups: Sequence[Sequence[Detection] | None],
    colours: Colours,
) -> str:
    """What one clause lacks; "" when it is met. Colour and place are those of the surest objects."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    if "color" in clause:
        seen = list(colours(found, name))
        if seen.count(clause["color"]) < count:
            told = ", ".join(f"{seen.count(colour)} {colour}" for colour in COLORS if colour in seen)
            return f"expected {clause['color']} {name}>={count}, found {told}"
    if "position" in clause:
        relation, target = clause["position"]
        if groups[target] is None:
            return f"no target for {name} to be {relation}"
        for one in found:
            for other in groups[target]:
                there = relations(one, other)
                if relation not in there:
                    return f"expected {name} {relation} target, found {' and '.join(sorted(there)) or 'neither'} target"
    return ""
