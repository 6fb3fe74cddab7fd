"""Sets of images to be judged or compared: a samples artifact, a folder, or drawings of the built-in world. Entries in
order, each read when asked for, and digests that name the set by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from bifrost_cli.artifacts import Artifact
from bifrost_cli.artifacts.identity import digest_of
from bifrost_cli.config.schema import Images, Latents
from bifrost_cli.data.images import DecodedImage, read_image, square
from bifrost_cli.data.sources.scan import Sample, listed, scan
from bifrost_cli.errors import ArtifactError, DataError
from bifrost_cli.shapes.world import world

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
    lossy: bool = False  # of a JPEG or a lossy WebP


@dataclass(frozen=True)
class ImageSet:
    """Images in order; `what` says in words what they are, `artifact` is theirs if any, `skipped` cannot be used,
    `warnings` tell what was left out."""

    what: str
    entries: tuple[EvalImage, ...]
    artifact: Artifact | None = None
    skipped: int = 0
    warnings: tuple[str, ...] = ()

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
    return len(_numbered(artifact))


def _numbered(artifact: Artifact) -> list[tuple[int, str]]:
    """Samples are named by their number: 00000.png; a grid or a sheet is no sample."""
    stems = (name.removesuffix(".png") for name in artifact.files if name.endswith(".png"))
    return sorted((int(stem), f"{stem}.png") for stem in stems if stem.isdecimal())


def from_samples(artifact: Artifact, rules: Images) -> ImageSet:
    """The images of a samples artifact with their lines of `prompts.jsonl`. ArtifactError: a payload file is missing or
    changed, or an image has no line."""
    artifact.check()
    path, entries = artifact.file(PROMPTS), []
    try:
        text = path.read_text("utf-8").removesuffix("\n")
        lines = [json.loads(line) for line in text.split("\n")]  # not splitlines: U+2028 may stand in a prompt
        told = {int(line["index"]): {key: line.get(key) for key in ("prompt", "plan", "seed")} for line in lines}
        if not all(isinstance(line[key], str | None) for line in told.values() for key in ("prompt", "plan")):
            raise ValueError("a prompt or a plan is no text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged: {error}", code="BF-ART-005") from error
    for number, name in _numbered(artifact):
        if number not in told:
            raise ArtifactError(f"{path} has no line for {name}", code="BF-ART-005")
        load = partial(_rgb, partial(read_image, artifact.path / name, rules))
        entries.append(EvalImage(name, artifact.files[name]["sha256"], load, **told[number]))
    return ImageSet(f"samples artifact {artifact.id}", tuple(entries), artifact)


def from_folder(folder: Path, rules: Images, recursive: bool = False) -> ImageSet:
    """The images of a folder (`recursive`: of those in it, too), with captions where it has any. DataError: none."""
    found = scan(str(folder), _FOLDER.model_copy(update={"recursive": recursive}), rules)
    entries = entries_of(found.samples)
    skipped = found.funnel["seen"] - len(entries)
    counts = {name: number for name, number in found.counts.items() if " not " in name}  # folders and files passed over
    counts |= {"images that cannot be used": skipped} if skipped else {}
    enter = " (--set latents.recursive=true enters folders)" if "folders not entered" in counts else ""
    warnings = (f"Left out of {folder}: {listed(counts)}{enter}.",) if counts else ()
    return ImageSet(f"folder {folder}", entries, skipped=skipped, warnings=warnings)


def entries_of(samples: Sequence[Sample]) -> tuple[EvalImage, ...]:
    """Samples of a source as entries."""
    return tuple(EvalImage(s.key, s.sha256, partial(_rgb, s.load), s.caption or None, s.plan, lossy=s.lossy)
                 for s in samples)  # fmt: skip


def _rgb(load: Callable[[], DecodedImage]) -> np.ndarray:
    return load().rgb


def squared(images: ImageSet, size: int) -> ImageSet:
    """The same images as squares of `size` px, resized and cut as for an extraction (`images.square`)."""
    entries = tuple(replace(entry, digest=digest_of([entry.digest, "square", size]), load=partial(_square, entry, size))
                    for entry in images.entries)  # fmt: skip
    return replace(images, what=f"{images.what}, as squares of {size} px", entries=entries)


def _square(entry: EvalImage, size: int) -> np.ndarray:
    return square(entry.load(), size)


def quartered(images: ImageSet) -> ImageSet:
    """Grids of 2x2 as their four images each, by rows: `k/NAME` with k from 1 to 4. DataError, when loaded: a grid that
    is not cut exactly, as one with lines between its images."""
    entries = tuple(replace(entry, name=f"{place + 1}/{entry.name}", digest=digest_of([entry.digest, "quarter", place]),
                            load=partial(_quarter, entry, *divmod(place, 2)))
                    for entry in images.entries for place in range(4))  # fmt: skip
    return replace(images, what=f"the quarters of {images.what}", entries=entries)


def _quarter(entry: EvalImage, row: int, column: int) -> np.ndarray:
    rgb_HWc = entry.load()
    high, wide = rgb_HWc.shape[:2]
    if high % (2 * STEP) or wide % (2 * STEP):
        why = f"generated images have sides of a multiple of {STEP} px; lines between them would be cut into them"
        raise DataError(f"{entry.name} is no grid of 2x2: a quarter of its {wide}x{high} px is no image", at=why,
                        fix="join the four without padding, or leave out --quarters", code="BF-DATA-003")  # fmt: skip
    return rgb_HWc[row * high // 2 : (row + 1) * high // 2, column * wide // 2 : (column + 1) * wide // 2]


def drawn(count: int, *, seed: int = 0, of: str = "shapes") -> ImageSet:
    """Drawings of a built-in world for held-out prompts; the same number and seed give the same images."""
    entries, shapes = [], world(of)
    for index, prompt in enumerate(shapes.held_out_prompts(count, seed)):
        rgb = shapes.draw(shapes.sample_scene(np.random.default_rng((seed, index)), prompt))
        digest = hashlib.sha256(rgb.tobytes()).hexdigest()
        entries.append(EvalImage(f"{index:05d}", digest, partial(np.copy, rgb), prompt.text))
    return ImageSet(f"{len(entries)} drawings of the built-in world (held-out prompts, seed {seed})", tuple(entries))
