"""Two artifacts of a kind side by side: what was done differently first, then numbers, images and curves.

A difference of two numbers is taken only when they were measured alike (same protocol, features, reference, number of
images), or when it is forced. Measures nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import hypot, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bifrost_cli.artifacts import Artifact
from bifrost_cli.artifacts.files import read_json
from bifrost_cli.config.load import load_recipe
from bifrost_cli.data.image_sets import EvalImage, from_samples
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.errors import ArtifactError, BifrostError, public
from bifrost_cli.reports.artifact_pages import parents_of
from bifrost_cli.reports.page import Cell, Page, Shown, Table, flat, lineage_lines, number, thumbnails
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
        commands={f"{name} was made by": [public(side.manifest["made"].get("command")) or "unknown"]
                  for name, side in sides.items()},
    )  # fmt: skip
    if first.kind == "latents":
        _add_stores(page, sides)
        return page
    if first.kind == "report":
        try:
            _add_results(page, sides, force, ui)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"report.json of {first.path} or {second.path} has values that no evaluation writes"
            raise ArtifactError(what, at=f"{type(error).__name__}: {error}", code="BF-ART-005") from error
    if first.kind in TRAININGS:
        last = [health(artifact.path)[0] for artifact in sides.values()]
        page.tables = [*page.tables, _numbers("Last validation", *last)]
        page.plots = training_plots({f"{name} {artifact.id}": artifact.path for name, artifact in sides.items()})
    page.gallery, page.gallery_title = _images(sides, workspace), "Images by prompt"
    return page


def _differences(sides: Mapping[str, Artifact]) -> Table:
    """Settings that are not the same, and what they were made from."""
    first_facts, second_facts = (
        {**dict(flat(side.identity)), **{f"made from {parent['kind']}": parent["id"] for parent in side.parents}}
        for side in sides.values()
    )
    rows = []
    for name in first_facts | second_facts:
        first, second = (facts.get(name, "(not there)") for facts in (first_facts, second_facts))
        if isinstance(first, list) and isinstance(second, list) and len(first) != len(second):
            first, second = ([part for part in here if part not in there] or "(nothing more)"
                             for here, there in ((first, second), (second, first)))  # fmt: skip
        if first != second:
            rows.append([name, first, second])
    return Table("What differs", COLUMNS[:3], rows, empty="Nothing in their settings.")


def _numbers(title: str, first: Mapping[str, float], second: Mapping[str, float]) -> Table:
    """Numbers of A and B by name, and their difference."""
    rows = []
    for name in {**first, **second}:
        change = f"{second[name] - first[name]:+.4g}" if name in first and name in second else ""
        rows.append([name, *(f"{side[name]:.4g}" if name in side else "" for side in (first, second)), change])
    return Table(title, COLUMNS, rows)


def _add_results(page: Page, sides: Mapping[str, Artifact], force: bool, ui: Ui) -> None:
    reports = [read_json(artifact.file("report.json"), 2**30) for artifact in sides.values()]
    results = [{result["metric"]: result for result in report["results"]} for report in reports]
    rows, notes = [], []
    for metric in (metric for metric in results[0] if metric in results[1]):
        pair = [side[metric] for side in results]
        label = pair[0]["label"]
        if unlike := _unlike(reports, *pair):
            notes.append(f"{label}: {unlike}" + (" (the difference was forced)" if force else ""))
            ui.say(notes[-1])
        values = [f"{number(result)} ({result['spread']})" for result in pair]
        rows.append([label, *values, "not measured alike" if unlike and not force else _change(*pair)])
    page.tables = [*page.tables, Table("Numbers", COLUMNS, rows), Table("The same prompts", COLUMNS, _paired(reports))]
    for name, here, there in zip(sides, results, results[::-1], strict=True):
        if alone := [result["label"] for metric, result in here.items() if metric not in there]:
            notes.append(f"In {name} alone: {', '.join(alone)}.")
    page.notes = notes


def _unlike(reports: Sequence[Mapping[str, Any]], first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """How the measuring differs; "" where it does not."""
    unlike = [f"{key} {first.get(key)} and {second.get(key)}" for key in PROTOCOL_KEYS
              if first.get(key) != second.get(key)]  # fmt: skip
    references = [report["ref"] for report in reports]
    if first.get("n_ref") is not None and references[0] != references[1]:
        unlike.append("reference " + " and ".join(str(reference)[:19] for reference in references))
    return "; ".join(unlike)


def _change(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """The difference, with an interval where both have standard errors, as of independent sets."""
    change = second["value"] - first["value"]
    errors = [result["standard_error"] for result in (first, second) if result.get("standard_error") is not None]
    if len(errors) < 2:
        return f"{change:+.4g}"
    half = Z95 * hypot(*errors)
    return f"{change:+.4g} (95 %: {change - half:+.4g} to {change + half:+.4g})"


def _paired(reports: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Verdicts compared prompt by prompt (Miller 2024, section 4): much sharper than two shares side by side."""
    verdicts: list[dict[str, list[bool]]] = [{}, {}]
    for side, report in zip(verdicts, reports, strict=True):
        for line in report["pictures"]:
            if line.get("right") is not None and line.get("prompt"):
                side.setdefault(line["prompt"], []).append(bool(line["right"]))
    both = [prompt for prompt in verdicts[0] if prompt in verdicts[1]]
    if len(both) < 2:
        return []
    first, second = ([mean(side[prompt]) for prompt in both] for side in verdicts)
    changes = [b - a for a, b in zip(first, second, strict=True)]
    change, half = mean(changes), Z95 * stdev(changes) / sqrt(len(changes))
    better = [str(sum(change * sign > 0 for change in changes)) for sign in (-1, 1)]
    return [
        [f"right, of the {len(both)} prompts judged in both", f"{mean(first):.1%}", f"{mean(second):.1%}",
         f"{change:+.1%} (95 %, paired by prompt: {change - half:+.1%} to {change + half:+.1%})"],
        ["prompts on which this one is better", *better, ""],
    ]  # fmt: skip


def _add_stores(page: Page, sides: Mapping[str, Artifact]) -> None:
    """Channels and norms over each other, and maps of the rows that both have, each in its own store's colours."""
    stores = {name: LatentsStore.open(artifact) for name, artifact in sides.items()}
    numbers = [{"rows": store.rows, "mean norm of a token": store.norm} for store in stores.values()]
    page.tables = [*page.tables, _numbers("Numbers", *numbers)]
    plots = []
    for drawn in (channels, histogram):
        each = {name: drawn(store) for name, store in stores.items()}
        series = {f"{name} {what}": line for name, plot in each.items() for what, line in plot["series"].items()}
        plots.append({**each["A"], "series": series})
    page.gallery_title, page.plots = "Maps of the rows that both have", plots
    rows = {name: {store.keys[row]: row for row in range(store.rows)} for name, store in stores.items()}
    both = [key for key in rows["A"] if key in rows["B"]]
    both = [both[place] for place in evenly(len(both), PAIRS)]
    if not both:
        return
    shown = [maps(store, [rows[name][key] for key in both]) for name, store in stores.items()]
    page.gallery = [Cell([Shown(png, MAP, name) for name, png in zip(sides, pair, strict=True)],
                         {"name": key, "prompt": stores["A"].captions[rows["A"][key]]})
                    for key, *pair in zip(both, *shown, strict=True)]  # fmt: skip


def _images(sides: Mapping[str, Artifact], workspace: Path) -> list[Cell]:
    """Both images of a prompt, for the first prompts that both have: the artifacts' own images, or those of the samples
    that a report is of."""
    first: dict[str, dict[str, EvalImage]] = {name: {} for name in sides}
    for name, artifact in sides.items():
        samples = [artifact] if artifact.kind == "samples" else parents_of(artifact, "samples", workspace)
        for one in samples[:1]:
            with suppress(*(() if one is artifact else (BifrostError,))):  # an ancestor may be damaged, or half here
                for entry in from_samples(one, load_recipe(str(one.path)).images).entries:
                    if entry.prompt:
                        first[name].setdefault(entry.prompt, entry)
    both = [prompt for prompt in first["A"] if prompt in first["B"]][:PAIRS]
    if not both:
        return []
    shown = {name: thumbnails([entries[prompt] for prompt in both]) for name, entries in first.items()}
    return [Cell([Shown(*shown[name][entries[prompt].name], name) for name, entries in first.items()],
                 {"name": "", "prompt": prompt}) for prompt in both]  # fmt: skip
