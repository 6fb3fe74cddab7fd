"""The five commands as small as they go, for harnesses that run them hundreds of times; each in one folder.

In: a folder. Out: `runs/it`, an artifact. The models are stubs (an encoder of means, a regression, a painter of noise);
everything that plans, writes, locks, resumes and commits is the program's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from fixtures_store import make_store
from fixtures_training import SmallTask

from bifrost_cli.artifacts import Artifact, Draft
from bifrost_cli.artifacts.files import TEMP_PREFIX, make_folder, sha256_file, write_bytes
from bifrost_cli.config import Latents, Recipe, Train
from bifrost_cli.data.png import png_bytes
from bifrost_cli.data.store import LatentsStore
from bifrost_cli.data.store_index import read_index
from bifrost_cli.errors import ArtifactError, StoreError
from bifrost_cli.shapes.captions import held_out_prompts, sample_scene
from bifrost_cli.shapes.draw import draw
from bifrost_cli.stages import evaluate as evaluation
from bifrost_cli.stages import extract, generate
from bifrost_cli.stages import train as training
from bifrost_cli.stages.painting import Sketch
from bifrost_cli.stages.prompts import Order
from bifrost_cli.stages.ui import Ui
from bifrost_cli.training.checkpoint import Checkpoints, verify

OUT = Path("runs") / "it"
Work = Callable[[], object]


@dataclass(frozen=True)
class Target:
    """`run(folder, work)` is the command, which calls `work` for each batch, step or picture it computes; `kept(out)`
    is how much of `whole` units of that work lie finished on the disk."""

    name: str
    run: Callable[[Path, Work], Any]
    kept: Callable[[Path], int]
    whole: int


# ---- extract-latents -------------------------------------------------------------------------------------------------


class Means:
    """An encoder of 2x2 patches of 32 px and 8 channels: means."""

    image_size, grid, channels = 32, (2, 2), 8
    identity = {"name": "means", "weights": "a" * 64, "grid": [2, 2], "channels": 8}

    def __init__(self, work: Work) -> None:
        self._work = work

    def encode(self, pixels_BSS3: Any) -> torch.Tensor:
        self._work()
        parts = torch.as_tensor(pixels_BSS3).float().unflatten(1, (2, 16)).unflatten(3, (2, 16)).mean((2, 4))
        return parts.flatten(1, 2)[..., [0, 1, 2, 0, 1, 2, 0, 1]] * torch.arange(1, 9) / 64


def run_extract(folder: Path, work: Work) -> None:
    rules = {"image_size": 32, "shard_rows": 4, "chunk_rows": 2, "batch_size": 4, "vae": False}
    with mock.patch.object(extract, "load_encoder", lambda *rest, **more: Means(work)):
        extract.extract_latents(Recipe(latents=Latents(**rules)), source="shapes:11:3", output=folder / OUT)


def kept_shards(out: Path) -> int:
    return sum(_shard_is_whole(out, shard) for shard in range(3))


def _shard_is_whole(out: Path, shard: int) -> bool:
    with contextlib.suppress(StoreError):
        return all(_is(out / name, entry["sha256"]) for name, entry in read_index(out, shard).files.items())
    return False


# ---- a training ------------------------------------------------------------------------------------------------------


class Regression(SmallTask):
    """The regression of fixtures_training as a training stage's task."""

    train_rows, held_rows = range(40), range(4)

    def __init__(self, train: Train, work: Work) -> None:
        super().__init__(train)
        self._work = work

    def loss(self, batch: list[int], generator: torch.Generator) -> tuple[torch.Tensor, dict]:
        self._work()
        return super().loss(batch, generator)

    def samples(self, folder: Path, step: int) -> None:
        make_folder(folder)
        write_bytes(folder / f"step-{step:07d}.png", png_bytes(np.full((8, 8, 3), step % 256, np.uint8)))


TRAIN = {
    "steps": 6, "batch_size": 8, "lr": 1e-2, "warmup": 1, "ema": 0.9, "precision": "fp32", "checkpoint_every": 2,
    "keep": 1, "validate_every": 3, "validation_rows": 4, "sample_every": 3,
}  # fmt: skip


def run_training(folder: Path, work: Work) -> None:
    train = Train(**TRAIN)
    store = LatentsStore.open(_store(folder))
    job = training.Job("branch", Recipe(), train, store, {"test": 1}, Regression(train, work), {"test": 1},
                       lambda: "0", "0", torch.device("cpu"))  # fmt: skip
    options = {"output": folder / OUT, "workspace": folder / "runs", "resume": "auto", "dry_run": False, "ui": Ui()}
    training.run_job(job, **options)


def _store(folder: Path) -> Artifact:
    path = inputs(folder) / "store"
    return Artifact.open(path) if (path / "manifest.json").exists() else make_store(path, rows=4)


def kept_steps(out: Path) -> int:
    checkpoints = Checkpoints(out / "work" / "checkpoints")
    return max((step for step in checkpoints.steps() if _verifies(checkpoints.path(step))), default=0)


def _verifies(path: Path) -> bool:
    with contextlib.suppress(ArtifactError):
        return bool(verify(path))
    return False


# ---- generate --------------------------------------------------------------------------------------------------------

PROMPTS = "a red circle\na blue square\na green star\n"


class Noise:
    """In the place of the loaded chain: a picture of noise that (prompt, seed) decides."""

    def __init__(self, work: Work, apart: bool) -> None:
        self._work, self.apart, self.seconds = work, apart, Counter()

    def sketch(self, order: Order) -> Sketch:
        return Sketch(order.prompt, None, False, torch.full((4, 8), float(order.seed)))

    def paint(self, order: Order, sketch: Sketch) -> tuple[np.ndarray, bool]:
        self._work()
        noise = np.random.default_rng([order.seed, *order.prompt.encode()])
        return noise.integers(0, 255, (8, 8, 3), np.uint8), False


def run_generate(folder: Path, work: Work, apart: bool = False) -> None:
    pair = [_part(folder, kind) for kind in ("branch", "controlnet")]
    prompts = inputs(folder) / "prompts.txt"
    prompts.write_text(PROMPTS)
    with mock.patch.object(generate, "Studio", lambda *rest: Noise(work, apart)):
        generate.generate(Recipe(), prompts, output=folder / OUT, branch=pair[0], controlnet=pair[1], grid=True,
                          save_latents=True, seed=5)  # fmt: skip


def _part(folder: Path, kind: str) -> Path:
    path = inputs(folder) / kind
    if not (path / "manifest.json").exists():
        with Draft.open(path, kind, {"encoder": Means.identity, "grid": [2, 2], "channels": 8}) as draft:
            draft.commit()
    return path


def kept_pictures(out: Path) -> int:
    if not (out / "work" / "pictures.jsonl").exists():
        return 0
    count = 0
    for line in (out / "work" / "pictures.jsonl").read_bytes().split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            count += all(_is(out / name, digest) for name, digest in json.loads(line)["files"].items())
    return count


# ---- eval ------------------------------------------------------------------------------------------------------------


def run_eval(folder: Path, work: Work) -> None:
    options = {"measures": ["shapes"], "min_samples": 4, "workspace": folder / "runs"}
    page = evaluation.report_html
    with mock.patch.object(evaluation, "report_html", lambda *rest: work() or page(*rest)):
        evaluation.evaluate(Recipe(), samples=_samples(folder), output=folder / OUT, **options)


def _samples(folder: Path) -> Path:
    path = inputs(folder) / "samples"
    if not (path / "manifest.json").exists():
        with Draft.open(path, "samples", {}) as draft:
            lines = []
            for index, prompt in enumerate(held_out_prompts(4)):
                rgb = draw(sample_scene(np.random.default_rng(index), prompt))
                write_bytes(path / f"{index:05d}.png", png_bytes(rgb, {"prompt": prompt.text}))
                lines.append(json.dumps({"index": index, "prompt": prompt.text, "plan": None, "seed": index}))
            write_bytes(path / "prompts.jsonl", ("\n".join(lines) + "\n").encode())
            draft.commit()
    return path


# ---- what every harness asks -----------------------------------------------------------------------------------------

TARGETS = {
    target.name: target
    for target in (
        Target("extract", run_extract, kept_shards, 3),
        Target("train", run_training, kept_steps, 6),
        Target("generate", run_generate, kept_pictures, 3),
        Target("halves", partial(run_generate, apart=True), kept_pictures, 3),  # generate.offload: first all sketches
        Target("eval", run_eval, lambda out: 0, 1),
    )
}


def inputs(folder: Path) -> Path:
    """Where a target's inputs lie: beside its folder, so that what a harness does to that never touches them."""
    return folder.parent / "inputs"


def kept(target: Target, folder: Path) -> int:
    """Units of work that the next run need not do again."""
    return target.whole if (folder / OUT / "manifest.json").exists() else target.kept(folder / OUT)


def result(folder: Path) -> dict[str, Any]:
    """All that must not depend on what happened on the way: every file's digest, read from the disk, and the manifest
    without who made it when. Fails on an artifact that does not verify, on strays and on leftovers."""
    artifact = Artifact.open(folder / OUT)
    assert artifact.verify() == [] and artifact.strays() == []
    assert not list(folder.rglob(f"{TEMP_PREFIX}*")), "a leftover"
    assert not list(folder.rglob("checkpoints")) and not (folder / OUT / "draft.json").exists(), "a leftover"
    told = {name: value for name, value in artifact.manifest.items() if name not in ("made", "cost", "digest")}
    return {"manifest": told, **{name: sha256_file(artifact.path / name) for name in artifact.files}}


def broken_promises(target: Target, folder: Path) -> list[str]:
    """What no crash may leave: a final name whose content is not whole."""
    out, found = folder / OUT, []
    if (out / "manifest.json").exists():
        found += Artifact.open(out).verify()
    for index in out.glob("index/shard-*.jsonl"):
        if not _shard_is_whole(out, int(index.stem.split("-")[1])):
            found.append(f"{index.name} counts a shard that is not whole")
    found += [f"{path.name} is damaged" for path in out.glob("work/checkpoints/step-*") if not _verifies(path)]
    return found


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest
