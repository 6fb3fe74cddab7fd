"""The source of an extraction: whether it may be read beside this output, and what is wrong with it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from bifrost_cli.artifacts import Artifact
from bifrost_cli.artifacts.files import canonical_json, make_folder, write_bytes
from bifrost_cli.artifacts.manifest import MANIFEST
from bifrost_cli.config.load import load_recipe
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.image_sets import ImageSet, entries_of
from bifrost_cli.data.sources.item import Problem, SourceError
from bifrost_cli.data.sources.listing import as_typed_in, folder_of
from bifrost_cli.data.sources.scan import ALONE, SHAPES, Job, Sample, Scan, listed, refuse_problems, scan
from bifrost_cli.data.sources.several import parts_of
from bifrost_cli.errors import BifrostError, DataError, StoreError, UsageError, public
from bifrost_cli.runtime.ui import Ui, counted


@dataclass(frozen=True)
class Checked:
    """Every problem of a source, the error with which an extraction would stop, if any, and what was counted."""

    problems: tuple[Problem, ...]
    stops: DataError | None
    funnel: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)


def check_source(recipe: Recipe, source: str, *, ui: Ui | None = None) -> Checked:
    """`scan` that goes on where an extraction stops. Errors that are not the data's own (2, 3) are raised."""
    ui, found = ui or Ui(), Checked((), None)
    try:
        scanned = scan(source, recipe.latents, recipe.images, ui, stop=False)
        found = Checked(scanned.events, None, scanned.funnel, scanned.counts)
        for line in scanned.said:
            ui.say(line)
        refuse_problems(scanned.events, scanned.funnel["seen"], source, recipe.latents)
    except DataError as error:
        return replace(found, stops=error, problems=found.problems or getattr(error, "problems", ()))
    return found


def scan_source(source: str, recipe: Recipe, workspace: Path, ui: Ui, job: Job = ALONE) -> Scan:
    """`scan`, with the funnel said. Where an error has more problems than it shows, a file in the workspace has all."""
    try:
        scanned = scan(source, recipe.latents, recipe.images, ui, job=job)
    except SourceError as error:
        if not error.all_shown and job.first:
            path = workspace / "extract-latents-problems.jsonl"
            with suppress(BifrostError):  # the problems of the source matter more than a list that cannot be written
                make_folder(workspace)
                write_bytes(path, _json_lines(error.problems))
                error.at = f"{error.at}\nall of them: {path}"
        raise
    for line in (*scanned.said, "funnel: " + listed(scanned.funnel)):
        ui.say(line)
    return scanned


def refuse_output(source: str, output: Path | str | None, workspace: Path | str) -> None:
    """UsageError: an output that is a link, or that lies in the source, which is never written to."""
    if output is not None and Path(output).is_symlink():
        raise UsageError(f"{output} is a link", fix="give the folder itself with -o", code="BF-USE-002")
    target = Path(output or workspace)
    for part in parts_of(source):
        root = None if part.startswith(SHAPES) else folder_of(part)
        if root is not None and Path(os.path.realpath(target)).is_relative_to(os.path.realpath(root)):
            raise UsageError(f"the output {target} lies inside the source {root}",
                             fix="choose another place with -o or -w")  # fmt: skip


def images_of_store(artifact: Artifact) -> ImageSet:
    """The images that a latents artifact was made of, read again from its source under its own rules. DataError: the
    store names no source, or that holds other images than it did; SourceError as `scan`."""
    source, recipe = artifact.info.get("source"), load_recipe(str(artifact.path))
    if source is None:
        raise DataError(f"{artifact.path} does not say where its images came from", fix="give their folder")
    if "://" in source and "***" in source:
        raise DataError(f"{source} was read with a password or a query, and a store keeps neither",
                        fix="copy the images, and give their folder")  # fmt: skip
    folder, rules = Path(os.path.realpath(artifact.path / str(artifact.info.get("typed_in", "")))), recipe.latents
    if rules.class_names:
        rules = rules.model_copy(update={"class_names": as_typed_in(folder, rules.class_names)})
    scanned = scan(as_typed_in(folder, source), rules, recipe.images)
    if digest(scanned.samples) != artifact.identity["samples"]:
        raise DataError(f"{source} holds other images than {artifact.id} was made of", fix="give their folder",
                        at=changes(artifact.path, scanned.samples))  # fmt: skip
    entries = entries_of(scanned.samples)
    return ImageSet(f"{len(entries)} images of {public(source)}, as {artifact.id} has them", entries, artifact)


def digest(samples: Iterable[Sample]) -> str:
    """sha256 over key, image, caption and plan of every sample, in order."""
    total = hashlib.sha256()
    for sample in samples:
        total.update(canonical_json([sample.key, sample.sha256, sample.caption, sample.plan]) + b"\n")
    return total.hexdigest()


def changes(path: Path, samples: Sequence[Sample]) -> str:
    """How samples differ from those that a store was made of: `1 image added, 2 captions changed`. Of a store that is
    not finished only the rows that it has are compared. "" where its index cannot be read."""
    from bifrost_cli.data.latents.zarr_layout import INDEX, read_index  # zarr, which a refusal does without

    old: dict[str, list[str | None]] = {}
    try:
        for file in (path / INDEX).glob("shard-*.jsonl"):
            lines = read_index(path, int(file.stem.removeprefix("shard-"))).lines
            old |= {line["key"]: [line["image"], line["caption"], line.get("plan")] for line in lines}
    except (StoreError, OSError, ValueError, KeyError, TypeError):
        return ""
    new = {sample.key: [sample.sha256, sample.caption, sample.plan] for sample in samples}
    both = [(before, new[key]) for key, before in old.items() if key in new]
    finished = (path / MANIFEST).exists()
    added, removed = (len(new) - len(both), len(old) - len(both)) if finished else (0, 0)
    changed = [sum(before[n] != after[n] for before, after in both) for n in range(3)]
    whats, hows = ("image", "image", "image", "caption", "plan"), ("added", "removed", "changed", "changed", "changed")
    told = [f"{counted(number, what) if number else f'no {what}'} {how}"
            for number, what, how in zip((added, removed, *changed), whats, hows, strict=True)
            if number or what == "caption"]  # fmt: skip
    return ", ".join(told) + ("" if finished else f" of the {len(old)} rows written so far")


def write_events(path: Path, events: Iterable[Problem], append: bool = False) -> None:
    """`work/events.jsonl` of a draft: every sample left out, and why."""
    file = path / "work" / "events.jsonl"
    make_folder(file.parent)
    before = file.read_bytes() if append and file.exists() else b""
    write_bytes(file, before + _json_lines(events))


def _json_lines(problems: Iterable[Problem]) -> bytes:
    return "".join(json.dumps(public(vars(problem)), ensure_ascii=True) + "\n" for problem in problems).encode()
