"""Sets of images to be judged or compared: a samples artifact, a folder, or drawings of the built-in world.

Comes in: an artifact, a folder with reading rules, or a number. Goes out: entries in order, each read when asked for,
and digests that name the set by content. Does not know features, distances or verdicts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bifrost_cli.artifacts import Artifact
from bifrost_cli.artifacts.identity import digest_of
from bifrost_cli.config.schema import Images, Latents
from bifrost_cli.data.images import read_image, square
from bifrost_cli.data.sources.scan import Sample, scan
from bifrost_cli.errors import ArtifactError, DataError
from bifrost_cli.shapes.captions import held_out_prompts, sample_scene
from bifrost_cli.shapes.draw import draw

PROMPTS, STEP = "prompts.jsonl", 8  # STEP: px; a VAE makes no image of another size
_FOLDER = Latents(missing_caption="empty")  # a folder of images, whatever the recipe says of its own source


@dataclass(frozen=True)
class EvalImage:
    """One image: `load()` gives RGB uint8 (H, W, 3); `digest` is the sha256 of its bytes."""

    name: str
    digest: str
    load: Callable[[], np.ndarray]
    prompt: str | None = None
    plan: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class ImageSet:
    """Images in order; `what` says in words what they are, `artifact` is theirs if any, `skipped` were left out."""

    what: str
    entries: tuple[EvalImage, ...]
    artifact: Artifact | None = None
    skipped: int = 0

    @property
    def content(self) -> str:
        """Names the images alone, whatever their order or names."""
        return digest_of(sorted(entry.digest for entry in self.entries))

    @property
    def digest(self) -> str:
        """Names the images with their names, prompts, plans and seeds."""
        return digest_of([[e.name, e.digest, e.prompt, e.plan, e.seed] for e in self.entries])


def image_count(artifact: Artifact) -> int:
    """How many images a samples artifact holds."""
    return sum(1 for name in artifact.files if _is_image(name))


def _is_image(name: str) -> bool:
    """Samples are named by their number: 00000.png; a grid or a sheet is no sample."""
    return name.endswith(".png") and name.removesuffix(".png").isdecimal()


def from_samples(artifact: Artifact, rules: Images) -> ImageSet:
    """The images of a samples artifact with their lines of `prompts.jsonl`.

    ArtifactError: a payload file is missing or changed, or an image has no line.
    """
    artifact.check()
    lines = _prompt_lines(artifact)
    names = sorted(filter(_is_image, artifact.files), key=lambda name: int(name.removesuffix(".png")))
    entries = []
    for name in names:
        line = lines.get(int(name.removesuffix(".png")))
        if line is None:
            raise ArtifactError(f"{artifact.path / PROMPTS} has no line for {name}", code="BF-ART-005")
        load = partial(_read, artifact.path / name, rules)
        entries.append(
            EvalImage(name, artifact.files[name]["sha256"], load, line["prompt"], line["plan"], line["seed"])
        )
    return ImageSet(f"samples artifact {artifact.id}", tuple(entries), artifact)


def _prompt_lines(artifact: Artifact) -> dict[int, dict[str, Any]]:
    path = artifact.file(PROMPTS)
    try:
        text = path.read_text("utf-8").removesuffix("\n")
        lines = [json.loads(line) for line in text.split("\n")]  # not splitlines: U+2028 may stand in a prompt
        return {int(line["index"]): {key: line.get(key) for key in ("prompt", "plan", "seed")} for line in lines}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged: {error}", code="BF-ART-005") from error


def _read(path: Path, rules: Images) -> np.ndarray:
    return read_image(path, rules).rgb


def from_folder(folder: Path, rules: Images) -> ImageSet:
    """The images of a folder, with captions where it has any. DataError: none."""
    found = scan(str(folder), _FOLDER, rules)
    entries = entries_of(found.samples)
    return ImageSet(f"folder {folder}", entries, skipped=found.funnel["seen"] - len(entries))


def entries_of(samples: Sequence[Sample]) -> tuple[EvalImage, ...]:
    """Samples of a source as entries."""
    return tuple(EvalImage(one.key, one.sha256, partial(_load, one), one.caption or None, one.plan) for one in samples)


def squared(images: ImageSet, size: int) -> ImageSet:
    """The same images as squares of `size` px, resized and cut as for an extraction (`images.square`)."""
    entries = tuple(replace(entry, digest=digest_of([entry.digest, "square", size]), load=partial(_square, entry, size))
                    for entry in images.entries)  # fmt: skip
    return replace(images, what=f"{images.what}, as squares of {size} px", entries=entries)


def _square(entry: EvalImage, size: int) -> np.ndarray:
    return square(entry.load(), size)


def quartered(images: ImageSet) -> ImageSet:
    """Grids of 2x2 as their four images each, by rows: `k/NAME` with k from 1 to 4.

    DataError, when loaded: a grid that is not cut exactly, as one with lines between its images.
    """
    entries = tuple(replace(entry, name=f"{place + 1}/{entry.name}", digest=digest_of([entry.digest, "quarter", place]),
                            load=partial(_quarter, entry, *divmod(place, 2)))
                    for entry in images.entries for place in range(4))  # fmt: skip
    return replace(images, what=f"the quarters of {images.what}", entries=entries)


def _quarter(entry: EvalImage, row: int, column: int) -> np.ndarray:
    rgb_HWc = entry.load()
    (height, odd), (width, rest) = (divmod(side, 2) for side in rgb_HWc.shape[:2])
    if odd or rest or height % STEP or width % STEP:
        raise DataError(
            f"{entry.name} is no grid of 2x2: a quarter of its {2 * width + rest}x{2 * height + odd} px is no image",
            at=f"generated images have sides of a multiple of {STEP} px; lines between them would be cut into them",
            fix="join the four without padding, or leave out --quarters",
            code="BF-DATA-003",
        )
    return rgb_HWc[row * height : (row + 1) * height, column * width : (column + 1) * width]


def _load(sample: Sample) -> np.ndarray:
    return sample.load().rgb


def drawn(count: int, *, seed: int = 0) -> ImageSet:
    """Drawings of the built-in world for held-out prompts; the same number and seed give the same images."""
    entries = []
    for index, prompt in enumerate(held_out_prompts(count, seed)):
        rgb = draw(sample_scene(np.random.default_rng((seed, index)), prompt))
        digest = hashlib.sha256(rgb.tobytes()).hexdigest()
        entries.append(EvalImage(f"{index:05d}", digest, partial(np.copy, rgb), prompt.text))
    return ImageSet(f"{len(entries)} drawings of the built-in world (held-out prompts, seed {seed})", tuple(entries))
