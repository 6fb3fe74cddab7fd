"""The two measurements of a report: Frechet distance and the checker's verdicts.

Comes in: picture sets, a feature network. Goes out: JSON values with the number, its uncertainty, how many pictures,
and one sentence that says what the number is. Does not know artifacts, workspaces or pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bifrost_cli.data.images import BadImage, square
from bifrost_cli.data.picture_set import Entry, PictureSet
from bifrost_cli.data.problems import Problem, SourceError
from bifrost_cli.errors import DataError
from bifrost_cli.maths.frechet import Gaussian, frechet, frechet_at_infinity, gaussian, jackknife_error, shown
from bifrost_cli.maths.intervals import wilson
from bifrost_cli.models.features import FeatureNetwork, feature_batches
from bifrost_cli.shapes.captions import CATEGORIES, parse
from bifrost_cli.shapes.checker import check
from bifrost_cli.stages.ui import Ui

PROTOCOL = "bifrost-frechet/1"


def set_features(network: FeatureNetwork, pictures: PictureSet, ui: Ui, what: str) -> np.ndarray:
    """Features (N, D) float32 in the order of the pictures' digests: names and listing order change no bit.

    SourceError: pictures that cannot be read, each with its reason.
    """
    ordered = sorted(pictures.entries, key=lambda entry: entry.digest)
    batches: list[np.ndarray] = []
    problems: list[Problem] = []
    with ui.progress(len(ordered), what) as bar:
        for batch in feature_batches(network, _squares(ordered, network.image_size, problems)):
            batches.append(batch)
            bar.advance(len(batch))
    if problems:
        raise SourceError(f"{len(problems)} of {len(ordered)} pictures cannot be read", problems, code="BF-DATA-003")
    return np.concatenate(batches)


def _squares(entries: Sequence[Entry], size: int, problems: list[Problem]) -> Iterator[np.ndarray]:
    for entry in entries:
        try:
            yield square(entry.load(), size)
        except BadImage as error:
            problems.append(Problem("image", entry.name, error.message))


def distance_result(
    features_ND: np.ndarray, reference: Gaussian, network: FeatureNetwork, described: str, floor_ND: np.ndarray | None
) -> dict[str, Any]:
    """The Frechet distance of samples to a reference. `floor_ND`: features of true pictures, as many as samples."""
    raw = frechet(gaussian(features_ND), reference)
    result = {
        "metric": "frechet_distance",
        "value": shown(raw),
        "raw": raw,
        "standard_error": jackknife_error(features_ND, reference),
        "at_infinity": {"value": frechet_at_infinity(features_ND, reference), "seed": 0, "points": 15},
        "n_gen": len(features_ND),
        "n_ref": reference.count,
        "protocol": PROTOCOL,
        "extractor": network.identity,
        "sentence": (
            f"Frechet distance of {len(features_ND)} pictures to {described}, in features of "
            f"{network.identity['name']} (weights {network.identity['weights'][:12]}). This is not Inception FID: "
            "compare it only with numbers of the same features, reference and number of pictures."
        ),
    }
    if floor_ND is not None:
        floor = frechet(gaussian(floor_ND), reference)
        result["floor"] = {"value": shown(floor), "raw": floor, "n": len(floor_ND)}
    return result


def judge(entry: Entry) -> dict[str, Any]:
    """The checker's verdict on one picture; `right` is None when its prompt is not of the built-in world."""
    line = {"name": entry.name, "prompt": entry.prompt, "plan": entry.plan, "seed": entry.seed}
    try:
        prompt = parse(entry.prompt or "")
    except ValueError:
        return {**line, "category": None, "right": None, "why": "not judged: not a prompt of the built-in world"}
    verdict = check(prompt, entry.load())
    return {**line, "category": prompt.category, "right": bool(verdict.right), "why": verdict.why}


def shapes_result(judged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The share of pictures that show what was asked, over all and by category, with Wilson's 95 % intervals.

    DataError: no picture has a prompt of the built-in world.
    """
    counted = [line for line in judged if line["right"] is not None]
    if not counted:
        raise DataError(
            f"none of {len(judged)} pictures has a prompt of the built-in world, so the checker cannot judge them",
            fix='make some: bifrost generate "a red circle above a blue square" -o DIR; or leave out --shapes',
            code="BF-DATA-007",
        )
    table = [_share(name, [line for line in counted if line["category"] == name]) for name in CATEGORIES]
    return {
        "metric": "shapes_accuracy",
        **_share("all", counted),
        "categories": [row for row in table if row],
        "not_judged": len(judged) - len(counted),
        "sentence": (
            f"By the programmatic checker: things, colours, counts, places and a named background all as asked, "
            f"{len(counted)} pictures of the built-in world, one judgement each."
        ),
    }


def headline(result: Mapping[str, Any]) -> str:
    """A result in one line."""
    if result["metric"] == "shapes_accuracy":
        low, high = result["interval95"]
        return f"right: {result['right']} of {result['count']}, {result['value']:.1%} (95 %: {low:.1%} to {high:.1%})"
    floor = f"; true pictures in their place: {result['floor']['value']:.4g}" if "floor" in result else ""
    return f"Frechet distance: {result['value']:.4g}, standard error {result['standard_error']:.2g}{floor}"


def _share(name: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not lines:
        return {}
    right = sum(line["right"] for line in lines)
    return {
        "name": name,
        "value": right / len(lines),
        "interval95": list(wilson(right, len(lines))),
        "right": right,
        "count": len(lines),
    }
