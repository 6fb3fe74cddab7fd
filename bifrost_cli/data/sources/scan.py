"""A source of captioned images, checked before any model is loaded.

A source is anything `listing` knows, or `shapes:N[:SEED]` (scenes of the built-in world, training split). Every image
is decoded once here, so that a bad one shows before the encoder starts.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bifrost_cli.config.schema import Images, Latents
from bifrost_cli.data.images import Animated, BadImage, DecodedImage, read_image
from bifrost_cli.data.sources.item import Problem, SourceError, SourceItem
from bifrost_cli.data.sources.listing import list_source, refuse_ignored
from bifrost_cli.errors import RecipeError, UsageError
from bifrost_cli.shapes.captions import Prompt, sample_prompt, sample_scene
from bifrost_cli.shapes.draw import draw
from bifrost_cli.shapes.scene import Scene
from bifrost_cli.shapes.scene_plan import write_plan

SHAPES = "shapes:"
_BLOCK = 1024  # images handed to the threads at once
FLIP = "#flip"  # follows the key; keys hold no other `#`, so that both rows of an image can be told to belong together
_SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)
_IMAGES = Images()


@dataclass(frozen=True, slots=True)
class Sample:
    """One captioned image; `sha256` is that of the file (of the pixels, where there is no file).

    `load()` reads it again; BadImage when it is not what the scan saw.
    """

    key: str
    caption: str
    plan: str | None
    sha256: str
    load: Callable[[], DecodedImage]


@dataclass(frozen=True)
class Scan:
    """What a source gives: samples in key order, the funnel, other counts, problems that did not stop, and lines that
    tell a person what was chosen."""

    samples: tuple[Sample, ...]
    funnel: dict[str, int]
    counts: dict[str, int] = field(default_factory=dict)
    events: tuple[Problem, ...] = ()
    said: tuple[str, ...] = ()


class _Silent:
    def advance(self, n: int = 1) -> None:
        pass


Progress = Callable[[int, str], AbstractContextManager[Any]]


def scan(
    source: str | Path,
    rules: Latents,
    images: Images = _IMAGES,
    progress: Progress = lambda total, what: nullcontext(_Silent()),
    *,
    stop: bool = True,
) -> Scan:
    """Look at everything that a source holds.

    Args:
        source: see the head of this file.
        rules: which images and captions are used, and what stops.
        images: what every reading of an image obeys.
        progress: `progress(total, what)` opens a counter that is advanced image by image.
        stop: stop at captions, rows and keys that cannot be used; otherwise they are events, and their images are left
            out.

    Returns:
        Samples in key order, the funnel (seen, readable, captioned, used), and every problem as an event.

    Raises:
        UsageError: a malformed `shapes:`.
        RecipeError: a setting that is wrong of this source.
        DataError: no images, nothing left to use.
        SourceError: captions, rows, keys or images that stop under the rules, with all problems of that kind.
    """
    if str(source).startswith(SHAPES):
        if rules.flip:
            raise RecipeError(
                "latents.flip would make captions of the built-in world wrong: they say where things are",
                fix="--set latents.flip=false",
                code="BF-RECIPE-005",
            )
        ignored = {"image_column": None, "caption_column": None, "captions": "files", "class_names": None}
        refuse_ignored(rules, "the built-in world", **ignored)
        return _scan_shapes(str(source), progress)
    listing = list_source(str(source), rules)
    if stop:
        _refuse_listed(listing.problems, source)
    captioned, missing = _captioned(listing.entries, source, rules)
    with progress(len(listing.entries), "checking images") as bar:
        checked = list(_checked(listing.entries, images, bar))
    bad, animated = _sort_problems(checked, source, rules)
    readable = [
        (entry, found) for entry, found in zip(listing.entries, checked, strict=True) if isinstance(found, _Seen)
    ]
    samples = tuple(
        Sample(
            entry.key, captioned[entry.key], entry.plan, found.sha256, partial(_load, entry.read, found.sha256, images)
        )
        for entry, found in readable
        if entry.key in captioned
    )
    funnel = {
        "seen": len(listing.entries),
        "readable": len(readable),
        "captioned": sum(entry.caption is not None for entry, _ in readable),
        "used": len(samples),
    }
    if not samples:
        events = (*listing.problems, *missing, *bad, *animated)
        ways = [fix for event, fix in _WAYS.items() if any(problem.event == event for problem in events)]
        fix = ", ".join(ways) or "mend or remove them"
        raise SourceError(f"nothing in {source} can be used: {_shown(funnel)}", events, fix=fix, code="BF-DATA-001")
    notes = Counter(note for _, found in readable for note in found.notes)
    duplicates = len(samples) - len({sample.sha256 for sample in samples})
    counts = {**listing.counts, **({"duplicates": duplicates} if duplicates else {}), **dict(sorted(notes.items()))}
    said = listing.said
    if rules.flip:
        funnel |= {"flipped": funnel.pop("used"), "used": 2 * len(samples)}
        samples, notes_on_flips = with_flips(samples)
        said += notes_on_flips
    return Scan(samples, funnel, counts, (*listing.problems, *missing, *bad, *animated), said)


# ---- captions --------------------------------------------------------------------------------------------------------


def _captioned(
    entries: Sequence[SourceItem], source: str | Path, rules: Latents
) -> tuple[dict[str, str], tuple[Problem, ...]]:
    """Captions by key, and what is missing; SourceError when that stops."""
    missing = tuple(
        Problem("missing-caption", entry.where, "no caption")
        for entry in entries
        if entry.caption is None and not entry.problem
    )
    _refuse_missing(missing, len(entries), source, rules)
    empty = rules.missing_caption == "empty"
    return {entry.key: entry.caption or "" for entry in entries if entry.caption is not None or empty}, missing


# ---- images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    sha256: str
    notes: tuple[str, ...]


def _checked(entries: Sequence[SourceItem], rules: Images, bar: Any) -> Iterator[_Seen | Problem]:
    """Decode every image once, a few at a time. Pillow releases the interpreter lock while it decodes."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(entries), _BLOCK):
            for result in pool.map(partial(_check, rules=rules), entries[start : start + _BLOCK]):
                yield result
                bar.advance()


def _check(entry: SourceItem, rules: Images) -> _Seen | Problem:
    try:
        if entry.problem:
            raise BadImage(entry.problem)
        data = entry.read()
        return _Seen(hashlib.sha256(data).hexdigest(), read_image(data, rules).notes)
    except BadImage as error:
        kind = "animated" if isinstance(error, Animated) else "bad-image"
        return Problem(kind, entry.where, error.message)


def _sort_problems(
    checked: Sequence[_Seen | Problem], source: str | Path, rules: Latents
) -> tuple[list[Problem], list[Problem]]:
    """Bad images and animations left out; SourceError when the bad ones stop."""
    problems = [found for found in checked if isinstance(found, Problem)]
    bad = [problem for problem in problems if problem.event == "bad-image"]
    _refuse_bad(bad, len(checked), source, rules)
    return bad, [problem for problem in problems if problem.event == "animated"]


# ---- what stops ------------------------------------------------------------------------------------------------------


def refuse_problems(found: Scan, source: str | Path, rules: Latents) -> None:
    """SourceError where `scan` under these rules stops for what a scan under milder ones found."""
    _refuse_listed(found.events, source)
    for event, refuse in (("missing-caption", _refuse_missing), ("bad-image", _refuse_bad)):
        refuse([problem for problem in found.events if problem.event == event], found.funnel["seen"], source, rules)


# What a listing could not use, by event: the sentence, the code, the fix.
_LISTED = {
    "caption": ("captions in {} cannot be read", "BF-DATA-002", "save them as UTF-8, or remove them"),
    "metadata": ("lines of {} cannot be used", "BF-DATA-005", None),
    "row": ("rows of {} cannot be used", "BF-DATA-005", None),
    "key": ("keys of {} belong to more than one image", "BF-DATA-006", "rename or remove one of each"),
}
_WAYS = {
    "missing-caption": "write the captions, or --missing-caption empty (use an empty one)",
    "bad-image": "mend the images",
    "animated": "--set images.animated=first (use the first frame)",
}


def _refuse_listed(problems: Sequence[Problem], source: str | Path) -> None:
    for event, (sentence, code, fix) in _LISTED.items():
        if those := [problem for problem in problems if problem.event == event]:
            raise SourceError(f"{len(those)} {sentence.format(source)}", those, code=code, fix=fix)


def _refuse_missing(missing: Sequence[Problem], of: int, source: str | Path, rules: Latents) -> None:
    if missing and rules.missing_caption == "stop":
        raise SourceError(
            f"{len(missing)} of {of} images in {source} have no caption",
            missing,
            fix="write the captions, or --missing-caption skip (leave them out) or empty (use an empty caption)",
            code="BF-DATA-002",
        )


def _refuse_bad(bad: Sequence[Problem], of: int, source: str | Path, rules: Latents) -> None:
    if bad and rules.bad_image == "stop":
        raise SourceError(
            f"{len(bad)} of {of} images in {source} cannot be used",
            bad,
            fix="mend or remove them, or leave them out: --bad-image skip",
            code="BF-DATA-003",
        )
    refuse_too_many(bad, of, source, rules)


def refuse_too_many(bad: Sequence[Problem], of: int, source: str | Path, rules: Latents) -> None:
    """SourceError when the share of bad images is above `max_bad`."""
    if len(bad) > rules.max_bad * of:
        raise SourceError(
            f"{len(bad)} of {of} images in {source} cannot be used, more than max_bad {rules.max_bad:g} allows",
            bad,
            fix="mend or remove them, or allow more: --max-bad",
            code="BF-DATA-004",
        )


def _load(read: Callable[[], bytes], sha256: str, rules: Images) -> DecodedImage:
    data = read()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise BadImage("changed during the run")
    return read_image(data, rules)


def _shown(funnel: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in funnel.items())


# ---- mirror images ---------------------------------------------------------------------------------------------------


def with_flips(samples: Sequence[Sample]) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    """Each sample followed by its mirror image under the same caption and plan, and a line that counts the captions
    that speak of left or right, which are not true of the mirror image."""
    both = tuple(
        one
        for sample in samples
        for one in (sample, replace(sample, key=sample.key + FLIP, load=partial(_flipped, sample.load)))
    )
    wrong = sum(bool(_SIDES.search(f"{sample.caption} {sample.plan or ''}")) for sample in samples)
    said = f"flip: {wrong} of {len(samples)} captions say left or right, which is wrong of their flipped row"
    return both, (said,) if wrong else ()


def _flipped(load: Callable[[], DecodedImage]) -> DecodedImage:
    image = load()
    return DecodedImage(np.ascontiguousarray(image.rgb[:, ::-1]), (*image.notes, "flipped"))


# ---- the built-in world ----------------------------------------------------------------------------------------------


def _scan_shapes(source: str, progress: Progress) -> Scan:
    rows, seed = _shapes_arguments(source)
    samples = []
    with progress(rows, "drawing images") as bar:
        for i in range(rows):
            samples.append(_shapes_sample(seed, i))
            bar.advance()
    return Scan(tuple(samples), dict.fromkeys(("seen", "readable", "captioned", "used"), rows))


def _shapes_arguments(source: str) -> tuple[int, int]:
    parts = source.removeprefix(SHAPES).split(":")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() for part in parts) or int(parts[0]) < 1:
        raise UsageError(
            f"{source} is not shapes:ROWS or shapes:ROWS:SEED", fix="for example shapes:2048 or shapes:2048:7"
        )
    return int(parts[0]), int(parts[1]) if len(parts) == 2 else 0


def _shapes_sample(seed: int, i: int) -> Sample:
    """Sample i, a function of (seed, i) alone: the key says i, so a longer source begins with the shorter one."""
    prompt, scene = _scene(seed, i)
    digest = hashlib.sha256(draw(scene).tobytes()).hexdigest()
    return Sample(f"{i:08d}", prompt.text, write_plan(scene, prompt), digest, partial(_image, seed, i))


def _scene(seed: int, i: int) -> tuple[Prompt, Scene]:
    rng = np.random.default_rng([seed, i])
    prompt = sample_prompt(rng, split="train")
    return prompt, sample_scene(rng, prompt)


def _image(seed: int, i: int) -> DecodedImage:
    """Drawn from the numbers again: a scene in memory is larger than all else of a sample."""
    return DecodedImage(draw(_scene(seed, i)[1]))
