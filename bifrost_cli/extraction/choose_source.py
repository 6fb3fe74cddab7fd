"""The source of an extraction: which one, whether it may be read beside this output, and what is wrong with it.

In: what the user typed. Out: a `Scan`, or an error whose full list of problems is in a file. Knows no encoder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from bifrost_cli.artifacts import Artifact
from bifrost_cli.artifacts.files import canonical_json, make_folder, write_bytes
from bifrost_cli.config.load import load_recipe
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.image_sets import ImageSet, entries_of
from bifrost_cli.data.sources.item import Problem, SourceError
from bifrost_cli.data.sources.listing import folder_of
from bifrost_cli.data.sources.scan import SHAPES, Sample, Scan, scan
from bifrost_cli.errors import BifrostError, DataError, UsageError
from bifrost_cli.runtime.ui import Ui


def choose_source(source: Path | str | None, recipe: Recipe, ui: Ui) -> str:
    """The given source, else the built-in world as the recipe sizes it."""
    chosen = str(source) if source is not None else f"{SHAPES}{recipe.shapes.rows}:{recipe.shapes.seed}"
    ui.say(f"source: {chosen}" + ("" if source is not None else " (none given: the built-in world)"))
    return chosen


def scan_source(source: str, recipe: Recipe, workspace: Path, ui: Ui) -> Scan:
    """`scan`, with the funnel said. Where an error has more problems than it shows, a file in the workspace has all."""
    try:
        scanned = scan(source, recipe.latents, recipe.images, ui.progress)
    except SourceError as error:
        if not error.all_shown:
            _write_problems(error, workspace)
        raise
    for line in (*scanned.said, "funnel: " + listed(scanned.funnel)):
        ui.say(line)
    return scanned


def _write_problems(error: SourceError, workspace: Path) -> None:
    path = workspace / "extract-latents-problems.jsonl"
    try:
        make_folder(workspace)
        write_bytes(path, _json_lines(error.problems))
        error.at = f"{error.at}\nall of them: {path}"
    except BifrostError:  # the problems of the source matter more than a list that cannot be written
        pass


def refuse_output(source: str, output: Path | str | None, workspace: Path | str) -> None:
    """UsageError: an output that is a link, or that lies in the source, which is never written to."""
    if output is not None and Path(output).is_symlink():
        raise UsageError(f"{output} is a link", fix="give the folder itself with -o", code="BF-USE-002")
    if source.startswith(SHAPES):
        return
    root, target = folder_of(source), Path(output or workspace)
    if root is not None and Path(os.path.realpath(target)).is_relative_to(os.path.realpath(root)):
        raise UsageError(f"the output {target} lies inside the source {root}", fix="choose another place with -o or -w")


def digest(samples: Iterable[Sample]) -> str:
    """sha256 over key, image, caption and plan of every sample, in order."""
    total = hashlib.sha256()
    for sample in samples:
        total.update(canonical_json([sample.key, sample.sha256, sample.caption, sample.plan]) + b"\n")
    return total.hexdigest()


def images_of_store(artifact: Artifact) -> ImageSet:
    """The images that a latents artifact was made of, read again from its source under its own rules.

    DataError: the store names no source, or that holds other images than it did; SourceError as `scan`.
    """
    source, recipe = artifact.info.get("source"), load_recipe(str(artifact.path))
    if source is None:
        raise DataError(f"{artifact.path} does not say where its images came from", fix="give their folder")
    scanned = scan(source, recipe.latents, recipe.images)
    if digest(scanned.samples) != artifact.identity["samples"]:
        raise DataError(f"{source} holds other images than {artifact.id} was made of", fix="give their folder")
    entries = entries_of(scanned.samples)
    return ImageSet(f"{len(entries)} images of {source}, as {artifact.id} has them", entries, artifact)


def write_events(path: Path, events: Iterable[Problem], append: bool = False) -> None:
    """`work/events.jsonl` of a draft: every sample left out, and why."""
    file = path / "work" / "events.jsonl"
    make_folder(file.parent)
    before = file.read_bytes() if append and file.exists() else b""
    write_bytes(file, before + _json_lines(events))


def _json_lines(problems: Iterable[Problem]) -> bytes:
    return "".join(json.dumps(problem.as_json(), ensure_ascii=True) + "\n" for problem in problems).encode()


def listed(counts: Mapping[str, int]) -> str:
    """`seen 40, readable 39`."""
    return ", ".join(f"{name} {number}" for name, number in counts.items())
