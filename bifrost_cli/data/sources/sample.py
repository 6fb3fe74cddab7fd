"""A sample: one captioned image that will be a row of a store, and its mirror image.

In: how to load an image. Out: `Sample`, `Scan`, and samples with a second row each for the image flipped left to
right. Knows no source and no store.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from bifrost_cli.data.images import DecodedImage
from bifrost_cli.data.sources.problems import Problem

FLIP = "#flip"  # follows the key; keys hold no other `#`, so that both rows of an image can be told to belong together
_SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)


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
