"""Two artifacts of a kind side by side: what was done differently first, then numbers, images and curves.

A difference of two numbers is taken only when they were measured alike (same protocol, features, reference, number of
images), or when it is forced. Measures nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import hypot, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bifrost_cli.artifacts import Artifact
from bifrost_cli.artifacts.files import read_json
from bifrost_cli.config.load import load_recipe
from bifrost_cli.data.image_sets import EvalImage, ImageSet, from_samples
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.reports.artifact_pages import parents_of
from bifrost_cli.reports.evaluation_page import number
from bifrost_cli.reports.page import Cell, Page, Shown, Table, flat, lineage_lines, thumbnails
from bifrost_cli.reports.plots import MAP, channels, evenly, health, histogram, maps, training_plots
from bifrost_cli.reports.report import TRAININGS
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.stats import Z95

PROTOCOL_KEYS = ("protocol", "extractor", "layer", "n_gen", "n_ref")  # of a result: how it was measured
PAIRS = 24  # prompts or rows whose images are shown
COLUMNS = ("", "A", "B", "B - A")


def compare_page(first: Artifact, second: Artifact, workspace: Path, force: bool, ui: Ui) -> Page:
    """The page of two artifacts of one kind; their payloads were checked."""
    sides = {"A": first, "B": second}
    page = Page(
        f"A {first.id} beside B {second.id}",
        f"two artifacts of kind {first.kind}",
        tables=[_differences(sides)],
        lineage=lineage_lines([first, second], workspace),
        commands={f"{name} was made by": [side.manifest["made"].get("command") or "unknown"]
                  for name, side in sides.items()},
    )  # fmt: skip
    if first.kind == "latents":
        _add_stores(page, sides)
        return page
    if first.kind == "report":
        _add_results(page, sides, force, ui)
    if first.kind in TRAININGS:
        _add_trainings(page, sides)
    page.gallery, page.gallery_title = _images(sides, workspace), "Images by prompt"
    return page


def _differences(sides: Mapping[str, Artifact]) -> Table:
    """Settings that are not the same, and what they were made from."""
    parents = {name: {f"made from {parent['kind']}": parent["id"] for parent in side.parents}
               for name, side in sides.items()}  # fmt: skip
    facts = {name: {**dict(flat(side.identity)), **parents[name]} for name, side in sides.items()}
    rows = []
    for name in dict.fromkeys([*facts["A"], *facts["B"]]):
        first, second = (fact.get(name, "(not there)") for fact in facts.values())
        if isinstance(first, list) and isinstance(second, list) and len(first) != len(second):
            first, second = ([part for part in here if part not in there] or "(nothing more)"
                             for here, there in ((first, second), (second, first)))  # fmt: skip
        if first != second:
            rows.append([name, first, second])
    return Table("What differs", COLUMNS[:3], rows, empty="Nothing in their settings.")


# ---- reports --------------------------------------------------------------------------------------------------------


def _add_results(page: Page, sides: Mapping[str, Artifact], force: bool, ui: Ui) -> None:
    reports = {name: read_json(artifact.file("report.json"), 2**30) for name, artifact in sides.items()}
    results = {name: {result["metric"]: result for result in report["results"]} for name, report in reports.items()}
    rows, notes = [], []
    for metric, first in results["A"].items():
        if metric not in results["B"]:
            continue
        second = results["B"][metric]
        unlike = _unlike(reports, first, second)
        if unlike:
            notes.append(f"{first['label']}: {unlike}" + (" (the difference was forced)" if force else ""))
        values = [f"{number(result)} ({result['spread']})" for result in (first, second)]
        rows.append([first["label"], *values, "not measured alike" if unlike and not force else _change(first, second)])
    for line in notes:
        ui.say(line)
    alone = {name: [results[name][metric]["label"] for metric in results[name] if metric not in results[other]]
             for name, other in (("A", "B"), ("B", "A"))}  # fmt: skip
    page.tables = [*page.tables, Table("Numbers", COLUMNS, rows), Table("The same prompts", COLUMNS, _paired(reports))]
    page.notes = notes + [f"In {name} alone: {', '.join(labels)}." for name, labels in alone.items() if labels]


def _unlike(reports: Mapping[str, Any], first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """How the measuring differs; "" where it does not."""
    unlike = [f"{key} {first.get(key)} and {second.get(key)}" for key in PROTOCOL_KEYS
              if first.get(key) != second.get(key)]  # fmt: skip
    if first.get("n_ref") is not None and reports["A"]["ref"] != reports["B"]["ref"]:
        unlike.append(f"reference {str(reports['A']['ref'])[:19]} and {str(reports['B']['ref'])[:19]}")
    return "; ".join(unlike)


def _change(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """The difference, with an interval where both have standard errors, as of independent sets."""
    change = second["value"] - first["value"]
    errors = [result["standard_error"] for result in (first, second) if result.get("standard_error") is not None]
    if len(errors) < 2:
        return f"{change:+.4g}"
    half = Z95 * hypot(*errors)
    return f"{change:+.4g} (95 %: {change - half:+.4g} to {change + half:+.4g})"


def _paired(reports: Mapping[str, Any]) -> list[list[str]]:
    """Verdicts compared prompt by prompt (Miller 2024, section 4): much sharper than two shares side by side."""
    shares = {name: _by_prompt(report["pictures"]) for name, report in reports.items()}
    both = [prompt for prompt in shares["A"] if prompt in shares["B"]]
    if len(both) < 2:
        return []
    changes = [shares["B"][prompt] - shares["A"][prompt] for prompt in both]
    change, half = mean(changes), Z95 * stdev(changes) / sqrt(len(changes))
    right = [f"{mean(share[prompt] for prompt in both):.1%}" for share in shares.values()]
    better = [str(sum(change * sign > 0 for change in changes)) for sign in (-1, 1)]
    return [
        [f"right, of the {len(both)} prompts judged in both", *right,
         f"{change:+.1%} (95 %, paired by prompt: {change - half:+.1%} to {change + half:+.1%})"],
        ["prompts on which this one is better", *better, ""],
    ]  # fmt: skip


def _by_prompt(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    verdicts: dict[str, list[bool]] = {}
    for line in lines:
        if line.get("right") is not None and line.get("prompt"):
            verdicts.setdefault(line["prompt"], []).append(bool(line["right"]))
    return {prompt: mean(each) for prompt, each in verdicts.items()}


# ---- trainings and latents ------------------------------------------------------------------------------------------


def _add_trainings(page: Page, sides: Mapping[str, Artifact]) -> None:
    first, second = (health(artifact.path)[0] for artifact in sides.values())
    page.tables = [*page.tables, _numbers("Last validation", first, second)]
    page.plots = training_plots({f"{name} {artifact.id}": artifact.path for name, artifact in sides.items()})


def _numbers(title: str, first: Mapping[str, float], second: Mapping[str, float]) -> Table:
    """Numbers of A and B by name, and their difference."""
    rows = []
    for name in dict.fromkeys([*first, *second]):
        change = f"{second[name] - first[name]:+.4g}" if name in first and name in second else ""
        rows.append([name, *(f"{side[name]:.4g}" if name in side else "" for side in (first, second)), change])
    return Table(title, COLUMNS, rows)


def _add_stores(page: Page, sides: Mapping[str, Artifact]) -> None:
    """Channels and norms over each other, and maps of the rows that both have, each in its own store's colours."""
    stores = {name: LatentsStore.open(artifact) for name, artifact in sides.items()}
    first, second = ({"rows": store.rows, "mean norm of a token": store.norm} for store in stores.values())
    page.tables = [*page.tables, _numbers("Numbers", first, second)]
    plots = []
    for drawn in (channels, histogram):
        each = {name: drawn(store) for name, store in stores.items()}
        series = {f"{name} {what}": line for name, plot in each.items() for what, line in plot["series"].items()}
        plots.append({**each["A"], "series": series})
    rows = {name: {store.keys[row]: row for row in range(store.rows)} for name, store in stores.items()}
    both = [key for key in rows["A"] if key in rows["B"]]
    both = [both[place] for place in evenly(len(both), PAIRS)]
    shown = [maps(store, [rows[name][key] for key in both]) for name, store in stores.items()] if both else []
    captions = [stores["A"].captions[rows["A"][key]] for key in both]
    page.gallery = [Cell([Shown(png, MAP, name) for name, png in zip(sides, pair, strict=True)],
                         {"name": key, "prompt": caption})
                    for key, caption, *pair in zip(both, captions, *shown, strict=True)]  # fmt: skip
    page.gallery_title, page.plots = "Maps of the rows that both have", plots


# ---- images ---------------------------------------------------------------------------------------------------------


def _images(sides: Mapping[str, Artifact], workspace: Path) -> list[Cell]:
    """Both images of a prompt, for the first prompts that both have."""
    sets = {name: _samples_of(artifact, workspace) for name, artifact in sides.items()}
    first: dict[str, dict[str, EvalImage]] = {name: {} for name in sets}
    for name, images in sets.items():
        for entry in images.entries if images else ():
            if entry.prompt:
                first[name].setdefault(entry.prompt, entry)
    both = [prompt for prompt in first["A"] if prompt in first["B"]][:PAIRS]
    if not both:
        return []
    shown = {name: thumbnails([first[name][prompt] for prompt in both]) for name in sets}
    return [Cell([Shown(*shown[name][first[name][prompt].name], name) for name in sets], {"name": "", "prompt": prompt})
            for prompt in both]  # fmt: skip


def _samples_of(artifact: Artifact, workspace: Path) -> ImageSet | None:
    """The artifact's own images, or those of the samples that a report is of."""
    samples = [artifact] if artifact.kind == "samples" else parents_of(artifact, "samples", workspace)
    return from_samples(samples[0], load_recipe(str(samples[0].path)).images) if samples else None
