"""A source of captioned images, checked before any model is loaded. A source is anything `listing` knows, or
`shapes:N[:SEED]` or `shapes-2:N[:SEED]` (scenes of a built-in world, training split). Every image is decoded once here,
so that a bad one shows before the encoder starts."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bifrost_cli.config.schema import Images, Latents
from bifrost_cli.data.images import Animated, BadImage, DecodedImage, read_image
from bifrost_cli.data.sources.item import Problem, SourceError, SourceItem
from bifrost_cli.data.sources.listing import list_source, refuse_ignored
from bifrost_cli.errors import RecipeError, UsageError
from bifrost_cli.runtime.ahead import map_ahead
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.shapes.world import WORLDS, World, world

SHAPES = tuple(f"{name}:" for name in WORLDS)  # sources that are drawn
_BLOCK = 1024  # results that may wait for those before them
KEPT = 1 << 27  # bytes of decoded images that stay in memory: a small source is decoded once
FLIP = "#flip"  # follows the key; keys hold no other `#`, so that both rows of an image can be told to belong together
_SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)
_IMAGES = Images()


@dataclass(frozen=True, slots=True)
class Sample:
    """One captioned image; `sha256` is that of the file (of the pixels, where there is no file). `load()` reads it
    again; BadImage when it is not what the scan saw."""

    key: str
    caption: str
    plan: str | None
    sha256: str
    load: Callable[[], DecodedImage]
    lossy: bool = False  # of a JPEG or a lossy WebP


@dataclass(frozen=True)
class Scan:
    """What a source gives: samples in key order, the funnel, other counts, problems that did not stop, and lines that
    tell a person what was chosen."""

    samples: tuple[Sample, ...]
    funnel: dict[str, int]
    counts: dict[str, int] = field(default_factory=dict)
    events: tuple[Problem, ...] = ()
    said: tuple[str, ...] = ()


class Job(NamedTuple):
    """How several processes scan one source: what one does for all, this one's part, and the parts of all; whether
    this one is alone, and whether it is the first."""

    on_main: Callable[[Callable[[], Any]], Any]
    part: Callable[[Sequence[Any]], Sequence[Any]]
    gather: Callable[[Any], list[Any]]
    alone: bool = False
    first: bool = True


ALONE = Job(lambda work: work(), lambda items: items, lambda value: [value], alone=True)


def scan(source: str | Path, rules: Latents, images: Images = _IMAGES, ui: Ui | None = None, *, stop: bool = True,
         job: Job = ALONE) -> Scan:  # fmt: skip
    """Look at everything that a source holds. Without `stop`, what stops under the rules is an event, and its image is
    left out. Every process of a `job` calls this, and reads its part of the images.

    UsageError: a malformed `shapes:`. RecipeError: a setting that is wrong of this source. DataError: no images,
    nothing left to use. SourceError: captions, rows, keys or images that stop, with all problems of that kind.
    """
    source, ui = str(source), ui or Ui()
    if source.startswith(SHAPES):
        return job.on_main(lambda: _scan_shapes(source, rules, ui))
    listing = job.on_main(lambda: list_source(source, rules))
    entries, seen, said = listing.entries, len(listing.entries), listing.said
    uncaptioned = [entry for entry in entries if entry.caption is None and not entry.problem]
    events = [*listing.problems, *(Problem("missing-caption", entry.where, "no caption") for entry in uncaptioned)]
    if stop:
        refuse_problems(events, seen, source, rules)
    checked: list[tuple[Sample, tuple[str, ...]] | Problem] = []  # a sample with the notes on its image
    own, check = job.part(entries), partial(_check, rules=images, room=_Room(KEPT if job.alone else 0))
    with ui.progress(len(own), "checking images") as bar:  # Pillow releases the interpreter lock while it decodes
        for result in map_ahead(check, own, ahead=_BLOCK):
            checked.append(result)
            bar.advance()
    checked = [result for part in job.gather(checked) for result in part]
    problems = [found for found in checked if isinstance(found, Problem)]
    if stop:
        refuse_problems(problems, seen, source, rules)
    events += sorted(problems, key=lambda problem: problem.event == "animated")
    readable = [(one, *found) for one, found in zip(entries, checked, strict=True) if not isinstance(found, Problem)]
    empty = rules.missing_caption == "empty"
    samples = tuple(sample for entry, sample, _ in readable if entry.caption is not None or empty)
    captioned = sum(entry.caption is not None for entry, *_ in readable)
    funnel = {"seen": seen, "readable": len(readable), "captioned": captioned, "used": len(samples)}
    if not samples:
        met = {problem.event for problem in events}
        fix = ", ".join(way for event, way in _WAYS.items() if event in met)
        raise SourceError(f"nothing in {source} can be used: {listed(funnel)}", events, fix=fix, code="BF-DATA-001")
    notes = Counter(note for *_, notes in readable for note in notes)
    duplicates = len(samples) - len({sample.sha256 for sample in samples})
    counts = {**listing.counts, **({"duplicates": duplicates} if duplicates else {}), **dict(sorted(notes.items()))}
    if rules.flip:
        funnel |= {"flipped": funnel.pop("used"), "used": 2 * len(samples)}
        if wrong := sum(bool(_SIDES.search(f"{sample.caption} {sample.plan or ''}")) for sample in samples):
            those = f"{wrong} of {len(samples)} captions say left or right"
            said = (*said, f"flip: {those}, which is wrong of their flipped row")
        flips = (replace(s, key=s.key + FLIP, load=partial(_flipped, s.load)) for s in samples)
        samples = tuple(one for both in zip(samples, flips, strict=True) for one in both)
    return Scan(samples, funnel, counts, tuple(events), said)


def listed(counts: Mapping[str, int]) -> str:
    """`seen 40, readable 39`."""
    return ", ".join(f"{name} {number}" for name, number in counts.items())


def _check(entry: SourceItem, rules: Images, room: _Room) -> tuple[Sample, tuple[str, ...]] | Problem:
    try:
        if entry.problem:
            raise BadImage(entry.problem)
        data = entry.read()
        digest, image = hashlib.sha256(data).hexdigest(), read_image(data, rules)
    except BadImage as error:
        return Problem("animated" if isinstance(error, Animated) else "bad-image", entry.where, error.message)
    load = partial(_load, entry.read, digest, rules, image if room.take(image.rgb.nbytes) else None)
    return Sample(entry.key, entry.caption or "", entry.plan, digest, load, image.lossy), image.notes


class _Room:
    """Bytes that are left for decoded images."""

    def __init__(self, size: int) -> None:
        self._left, self._lock = size, threading.Lock()

    def take(self, size: int) -> bool:
        """True when there was room, which is taken now."""
        with self._lock:
            fits = size <= self._left
            self._left -= size if fits else 0
        return fits


def _load(read: Callable[[], bytes], sha256: str, rules: Images, kept: DecodedImage | None) -> DecodedImage:
    """The image, read again; decoded again only where it was not kept."""
    data = read()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise BadImage("changed during the run")
    return kept or read_image(data, rules)


# By event, in the order in which they stop: the sentence, the code, the fix.
_STOPS = {
    "caption": ("{n} captions in {source} cannot be read", "BF-DATA-002", "save them as UTF-8, or remove them"),
    "metadata": ("{n} lines of {source} cannot be used", "BF-DATA-005", None),
    "row": ("{n} rows of {source} cannot be used", "BF-DATA-005", None),
    "key": ("{n} keys of {source} belong to more than one image", "BF-DATA-006", "rename or remove one of each"),
    "missing-caption": ("{n} of {seen} images in {source} have no caption", "BF-DATA-002", "write the captions, or "
                        "--missing-caption skip (leave them out) or empty (use an empty caption)"),
    "bad-image": ("{n} of {seen} images in {source} cannot be used", "BF-DATA-003", "mend or remove them, or leave "
                  "them out: --bad-image skip"),
}  # fmt: skip
_WAYS = {
    "missing-caption": "write the captions, or --missing-caption empty (use an empty one)",
    "bad-image": "mend the images",
    "animated": "--set images.animated=first (use the first frame)",
}


def refuse_problems(problems: Sequence[Problem], seen: int, source: str, rules: Latents) -> None:
    """SourceError for those of the first kind that stops under the rules."""
    allowed = {"missing-caption": rules.missing_caption != "stop", "bad-image": rules.bad_image != "stop"}
    for event, (sentence, code, fix) in _STOPS.items():
        those = [problem for problem in problems if problem.event == event]
        if those and not allowed.get(event):
            raise SourceError(sentence.format(n=len(those), seen=seen, source=source), those, code=code, fix=fix)
        if event == "bad-image":
            refuse_too_many(those, seen, source, rules)


def refuse_too_many(bad: Sequence[Problem], of: int, source: str, rules: Latents) -> None:
    """SourceError when the share of bad images is above `max_bad`."""
    if len(bad) > rules.max_bad * of:
        message = f"{len(bad)} of {of} images in {source} cannot be used, more than max_bad {rules.max_bad:g} allows"
        raise SourceError(message, bad, fix="mend or remove them, or allow more: --max-bad", code="BF-DATA-004")


def _flipped(load: Callable[[], DecodedImage]) -> DecodedImage:
    image = load()
    return DecodedImage(np.ascontiguousarray(image.rgb[:, ::-1]), (*image.notes, "flipped"))


def _scan_shapes(source: str, rules: Latents, ui: Ui) -> Scan:
    if rules.flip:
        raise RecipeError("latents.flip would make captions of the built-in world wrong: they say where things are",
                          fix="--set latents.flip=false", code="BF-RECIPE-005")  # fmt: skip
    refuse_ignored(rules, "the built-in world", "image_column", "caption_column", "captions", "class_names")
    name, count, *seeds = source.split(":")
    if len(seeds) > 1 or not all(part.isascii() and part.isdigit() for part in (count, *seeds)) or int(count) < 1:
        message = f"{source} is not {name}:ROWS or {name}:ROWS:SEED"
        raise UsageError(message, fix=f"for example {name}:2048 or {name}:2048:7")
    drawn, rows, seed, samples = world(name), int(count), int(seeds[0]) if seeds else 0, []
    with ui.progress(rows, "drawing images") as bar:
        for i in range(rows):  # sample i is a function of (seed, i) alone: a longer source begins with the shorter one
            prompt, scene = drawn.training_sample(np.random.default_rng([seed, i]))
            digest = hashlib.sha256(drawn.draw(scene).tobytes()).hexdigest()
            plan = drawn.write_plan(scene, prompt)
            samples.append(Sample(f"{i:08d}", prompt.text, plan, digest, partial(_image, drawn, seed, i)))
            bar.advance()
    return Scan(tuple(samples), dict.fromkeys(("seen", "readable", "captioned", "used"), rows))


def _image(drawn: World, seed: int, i: int) -> DecodedImage:
    """Drawn from the numbers again: a scene in memory is larger than all else of a sample."""
    return DecodedImage(drawn.draw(drawn.training_sample(np.random.default_rng([seed, i]))[1]))
