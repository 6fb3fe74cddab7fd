"""Make what `test_formats.py` reads: one small example of each format, written once by the program that wrote it first.

    python tests/make_formats.py NAME ...

writes `tests/formats/NAME`, and never over what is there: an example of a format stays as it was written for as long as
that format is read. Whoever raises a number adds an example of the new one here and there.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).parent / "fixtures"))  # as pytest's own settings have it
from fixtures_store import make_store  # noqa: E402
from fixtures_training import SmallTask, settings  # noqa: E402

from bifrost_cli.artifacts import Artifact, Draft  # noqa: E402
from bifrost_cli.config.schema import Evaluate, Models, Recipe  # noqa: E402
from bifrost_cli.data.png import png_bytes  # noqa: E402
from bifrost_cli.data.safetensors_io import save_tensors  # noqa: E402
from bifrost_cli.evaluation.evaluate import evaluate  # noqa: E402
from bifrost_cli.evaluation.feature_statistics import Statistics, save_statistics  # noqa: E402
from bifrost_cli.shapes.captions import held_out_prompts, sample_scene  # noqa: E402
from bifrost_cli.shapes.draw import draw  # noqa: E402
from bifrost_cli.training.loop import fit  # noqa: E402

FORMATS = Path(__file__).parent / "formats"
CAPTIONS = ["a red circle", "two blue squares"] * 3
PLANS = ["white aa redcircle", "white aa bluesquare bb bluesquare"] * 3


def store(path: Path, storage: str) -> None:
    make_store(path, rows=6, shard_rows=4, chunk_rows=2, vae=(4, 4, 4), captions=CAPTIONS, plans=PLANS, failed=(3,),
               storage=storage)  # fmt: skip


def samples(path: Path) -> Artifact:
    recipe = Recipe(name="formats", models=Models(diffusion="builtin:flux"))
    with Draft.open(path, "samples", {"of": "formats"}) as draft:
        lines = []
        for index, prompt in enumerate(held_out_prompts(4)):
            rgb = draw(sample_scene(np.random.default_rng(index), prompt))
            (draft.path / f"{index:05d}.png").write_bytes(png_bytes(rgb, {"prompt": prompt.text}))
            lines.append(json.dumps({"index": index, "prompt": prompt.text, "plan": "white aa none", "seed": index}))
        (draft.path / "latents").mkdir()
        save_tensors(draft.path / "latents" / "00000.safetensors", {"latents": torch.arange(8.0).reshape(4, 2)})
        (draft.path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
        return draft.commit({"settings": {"plan": True}, "recipe": recipe.model_dump(mode="json")})


def report(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        samples(Path("runs") / "samples")
        recipe = Recipe(name="formats", models=Models(diffusion="builtin:flux"), evaluate=Evaluate(min_samples=4))
        made = evaluate(recipe, metrics=["shapes"], samples="runs/samples", workspace="runs")
        shutil.copytree(made.path, path)


def checkpoint(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        task = SmallTask(settings(steps=5, checkpoint_every=5, validate_every=0))
        fit(task, task.train, Path(folder) / "work")
        (found,) = (Path(folder) / "work" / "checkpoints").glob("step-*")
        shutil.copytree(found, path / found.name)


def statistics(path: Path) -> None:
    features_ND = np.random.default_rng(0).normal(size=(6, 3))
    identity = {"pictures": "0" * 64, "features": {"name": "formats"}, "layer": "pool"}
    save_statistics(path, Statistics(features_ND.mean(0), np.cov(features_ND.T), 6, identity, features_ND))


MAKE: dict[str, Callable[[Path], object]] = {
    "latents-1-store-3": lambda path: store(path, "float16"),
    "latents-1-store-3-int8": lambda path: store(path, "int8"),
    "samples-1": samples,
    "report-1": report,
    "checkpoint-1": checkpoint,
    "statistics-3.safetensors": statistics,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or [f"one of: {', '.join(MAKE)}"]:
        if name not in MAKE or (FORMATS / name).exists():
            sys.exit(f"{name}: there already" if name in MAKE else name)
        MAKE[name](FORMATS / name)
        for lock in (FORMATS / name).rglob(".lock"):
            lock.unlink()
