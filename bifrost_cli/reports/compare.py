"""Two artifacts of a kind side by side: what was done differently first, then numbers, curves and images.

Comes in: two artifacts. Goes out: a page. A difference of two numbers is taken only when they were measured alike (same
protocol, features, reference, number of images), or when it is forced. Measures nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bifrost_cli.artifacts import Artifact
from bifrost_cli.artifacts.files import read_json
from bifrost_cli.config.load import load_recipe
from bifrost_cli.data.image_sets import ImageSet, from_samples
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.errors import UsageError
from bifrost_cli.reports import page
from bifrost_cli.reports.artifact_pages import TRAININGS, parents_of, settings
from bifrost_cli.reports.evaluation_page import number, plots
from bifrost_cli.reports.facts import lineage_lines, thumbnails
from bifrost_cli.reports.latents_plots import MAP, channels, evenly, histogram, maps
from bifrost_cli.reports.training_curves import health, training_plots
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.stats import Z95

PROTOCOL_KEYS = ("protocol", "extractor", "layer", "n_gen", "n_ref")  # of a result: how it was measured
PAIRS = 24  # prompts or rows whose images are shown


def compare_page(first: Artifact, second: Artifact, workspace: Path, force: bool, ui: Ui) -> str:
    """The page. UsageError: artifacts of two kinds, or one with itself."""
    if first.kind != second.kind:
        raise UsageError(f"{first.id} is a {first.kind} and {second.id} a {second.kind}: they have nothing to compare",
                         fix="give two of a kind: bifrost artifacts ls")  # fmt: skip
    if first.id == second.id:
        raise UsageError(f"{first.id} was given twice", fix="give two of a kind: bifrost artifacts ls")
    sides = {"A": first, "B": second}
    if first.kind == "latents":  # a store checks what it reads; it may be terabytes
        middle = _stores(sides)
    else:
        first.check()
        second.check()
        middle = _results(sides, force, ui) if first.kind == "report" else []
        middle += _trainings(sides) if first.kind in TRAININGS else []
        middle += [page.section("Images by prompt", _images(sides, workspace))]
    return page.page(f"A {first.id} beside B {second.id}", f"two artifacts of kind {first.kind}", [
        page.section("What differs", _differences(sides) or "<p>Nothing in their settings.</p>"),
        *middle,
        page.lineage(lineage_lines([first, second], workspace)),
        page.section("Made by", page.facts({name: a.manifest["made"].get("command") for name, a in sides.items()})),
    ])  # fmt: skip


def _differences(sides: Mapping[str, Artifact]) -> str:
    """Settings that are not the same, and what they were made from."""
    said = {name: {**settings(a), **{f"made from {p['kind']}": p["id"] for p in a.parents}}
            for name, a in sides.items()}  # fmt: skip
    names = dict.fromkeys([*said["A"], *said["B"]])
    rows = [[name, *(one.get(name, "(not there)") for one in said.values())] for name in names
            if said["A"].get(name) != said["B"].get(name)]  # fmt: skip
    return page.table(("", "A", "B"), rows)


# ---- reports --------------------------------------------------------------------------------------------------------


def _results(sides: Mapping[str, Artifact], force: bool, ui: Ui) -> list[str]:
    reports = {name: read_json(artifact.file("report.json"), 2**30) for name, artifact in sides.items()}
    found = {name: {result["metric"]: result for result in report["results"]} for name, report in reports.items()}
    rows, notes = [], []
    for metric, first in found["A"].items():
        if metric not in found["B"]:
            continue
        second = found["B"][metric]
        unlike = _unlike(reports, first, second)
        shown = _difference(first, second) if force or not unlike else "not measured alike"
        if unlike:
            notes.append(f"{first['label']}: {unlike}" + (" (the difference was asked for all the same)" * force))
        rows.append([first["label"], f"{number(first)} ({first['spread']})", f"{number(second)} ({second['spread']})",
                     shown])  # fmt: skip
    only = [f"{metric} is in {name} alone" for name, other in (("A", "B"), ("B", "A"))
            for metric in found[name] if metric not in found[other]]  # fmt: skip
    for line in notes:
        ui.say(line)
    return [page.section("Numbers", page.table(("", "A", "B", "B - A"), rows)), *map(page.note, [*notes, *only]),
            page.section("The same prompts", _paired(reports))]  # fmt: skip


def _unlike(reports: Mapping[str, Any], first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """How the measuring differs; "" where it does not."""
    found = [f"{key} {first.get(key)} and {second.get(key)}" for key in PROTOCOL_KEYS
             if first.get(key) != second.get(key)]  # fmt: skip
    if first.get("n_ref") is not None and reports["A"]["ref"] != reports["B"]["ref"]:
        found.append(f"reference {str(reports['A']['ref'])[:19]} and {str(reports['B']['ref'])[:19]}")
    return "; ".join(found)


def _difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """With an interval where both have standard errors, as of independent sets."""
    change = second["value"] - first["value"]
    errors = [result.get("standard_error") for result in (first, second)]
    if any(error is None for error in errors):
        return f"{change:+.4g}"
    return f"{change:+.4g} (95 %: {change - Z95 * _root(errors):+.4g} to {change + Z95 * _root(errors):+.4g})"


def _root(errors: Sequence[float]) -> float:
    return sqrt(sum(error**2 for error in errors))


def _paired(reports: Mapping[str, Any]) -> str:
    """Verdicts compared prompt by prompt (Miller 2024, section 4): much sharper than two shares side by side."""
    shares = {name: _by_prompt(report["pictures"]) for name, report in reports.items()}
    both = [prompt for prompt in shares["A"] if prompt in shares["B"]]
    if len(both) < 2:
        return ""
    changes = [shares["B"][prompt] - shares["A"][prompt] for prompt in both]
    half = Z95 * stdev(changes) / sqrt(len(changes))
    better, worse = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    return page.facts({
        "prompts judged in both": len(both),
        "right in A": f"{mean(shares['A'][prompt] for prompt in both):.1%}",
        "right in B": f"{mean(shares['B'][prompt] for prompt in both):.1%}",
        "B - A, paired by prompt": f"{mean(changes):+.1%} (95 %: {mean(changes) - half:+.1%} to "
        f"{mean(changes) + half:+.1%})",
        "prompts where B is better, worse": f"{better}, {worse}",
    })  # fmt: skip


def _by_prompt(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, list[bool]] = {}
    for line in lines:
        if line.get("right") is not None and line.get("prompt"):
            found.setdefault(line["prompt"], []).append(bool(line["right"]))
    return {prompt: mean(verdicts) for prompt, verdicts in found.items()}


# ---- trainings ------------------------------------------------------------------------------------------------------


def _trainings(sides: Mapping[str, Artifact]) -> list[str]:
    last = {name: health(artifact.path)[0] for name, artifact in sides.items()}
    names = dict.fromkeys([*last["A"], *last["B"]])
    rows = [[name, *(f"{one[name]:.4g}" if name in one else "" for one in last.values())] for name in names]
    curves = training_plots({f"{name} {artifact.id}": artifact.path for name, artifact in sides.items()})
    return [page.section("Last validation", page.table(("", "A", "B"), rows)), plots(curves)]


# ---- latents --------------------------------------------------------------------------------------------------------


def _stores(sides: Mapping[str, Artifact]) -> list[str]:
    """Channels and norms over each other, and maps of the rows that both have, each in its own store's colours."""
    stores = {name: LatentsStore.open(artifact) for name, artifact in sides.items()}
    found = []
    for drawn in (channels, histogram):
        each = {name: drawn(store) for name, store in stores.items()}
        series = {f"{name} {what}": line for name, one in each.items() for what, line in one["series"].items()}
        found.append({**each["A"], "series": series})
    rows = {name: {store.keys[row]: row for row in range(store.rows)} for name, store in stores.items()}
    both = [key for key in rows["A"] if key in rows["B"]]
    both = [both[place] for place in evenly(len(both), PAIRS)]
    shown = [maps(store, [rows[name][key] for key in both]) for name, store in stores.items()] if both else []
    told = [f"{key}: {stores['A'].captions[rows['A'][key]]}" for key in both]
    pairs = [dict(zip(sides, ((png, MAP) for png in pair), strict=True)) for pair in zip(*shown, strict=True)]
    return [plots(found), page.section("Maps of the rows that both have", _gallery(told, pairs))]


# ---- images -------------------------------------------------------------------------------------------------------


def _images(sides: Mapping[str, Artifact], workspace: Path) -> str:
    """Both images of a prompt, for the first prompts that both have."""
    sets = {name: _samples_of(artifact, workspace) for name, artifact in sides.items()}
    if None in sets.values():
        return ""
    first = {name: {} for name in sets}
    for name, images in sets.items():
        for entry in images.entries:
            first[name].setdefault(entry.prompt, entry)
    both = [prompt for prompt in first["A"] if prompt and prompt in first["B"]][:PAIRS]
    if not both:
        return ""
    shown = {name: thumbnails([first[name][prompt] for prompt in both]) for name in sets}
    return _gallery(both, [{name: shown[name][first[name][prompt].name] for name in sets} for prompt in both])


def _gallery(told: Sequence[str], pairs: Sequence[Mapping[str, tuple[bytes, int]]]) -> str:
    """Images by side, two of a cell, over what is told of them; "" for none."""
    cells = "".join(
        f'<li><div class="pair">{"".join(_half(name, image) for name, image in pair.items())}</div>'
        f"<div><p><b>{page.foreign(line)}</b></p></div></li>"
        for line, pair in zip(told, pairs, strict=True)
    )
    return cells and f'<ul class="gallery pairs">{cells}</ul>'


def _half(name: str, image: tuple[bytes, int]) -> str:
    return f"<figure>{page.image(*image, alt=name)}<figcaption>{name}</figcaption></figure>"


def _samples_of(artifact: Artifact, workspace: Path) -> ImageSet | None:
    """The artifact's own images, or those of the samples that a report is of."""
    found = [artifact] if artifact.kind == "samples" else parents_of(artifact, "samples", workspace)
    return from_samples(found[0], load_recipe(str(found[0].path)).images) if found else None
