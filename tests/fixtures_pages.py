"""One page of every kind, of small real artifacts, and a browser that opens them and notes what it asked for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from fixtures_clip import save_tiny_clip
from fixtures_stage_training import mllm_store, save_mllm
from fixtures_stage_training import recipe as training_recipe

from bifrost_cli.artifacts import Artifact, Draft
from bifrost_cli.config import Evaluate, Models, Recipe
from bifrost_cli.data.png import png_bytes
from bifrost_cli.data.weights import save_tensors
from bifrost_cli.shapes.captions import held_out_prompts, sample_scene
from bifrost_cli.shapes.draw import draw
from bifrost_cli.stages.branch import train_branch
from bifrost_cli.stages.evaluate import evaluate
from bifrost_cli.stages.view import view

COUNT, RIGHT = 24, 16  # pictures; of the first set, those that show their prompt
KINDS = ("report", "latents", "branch", "samples", "reports", "branches", "samples-pair", "latents-pair")


def make_pages(place: Path) -> dict[str, Path]:
    """Pages by name (KINDS), of a store, two trainings, two sets of samples with latents, and two reports."""
    mllm, clip = save_mllm(place / "mllm"), save_tiny_clip(place / "clip")
    workspace = place / "runs"
    kept = training_recipe(mllm).model_dump(mode="json")
    funnel = dict.fromkeys(("seen", "readable", "captioned", "used"), 40)
    told = {"recipe": kept, "funnel": funnel, "counts": {"duplicates": 2}}
    other, store = (mllm_store(workspace / f"latents-{name}", seed=seed, info=told) for seed, name in enumerate("ba"))
    branches = [train_branch(training_recipe(mllm, seed=seed), workspace=workspace, device="cpu") for seed in (0, 1)]
    samples = [_samples(workspace / f"samples-{seed}", branch, seed) for seed, branch in enumerate(branches)]
    settings = Evaluate(features=f"open_clip:local-dir:{clip}", min_samples=COUNT)
    recipe = Recipe(name="test", models=Models(painter="builtin:flux"), evaluate=settings)
    reports = [evaluate(recipe, measures=["fid", "shapes"], samples=one.path, workspace=workspace) for one in samples]

    def page(name: str, *artifacts: Artifact) -> Path:
        return view(*(one.path for one in artifacts), output=place / f"{name}.html", workspace=workspace, device="cpu")

    alone = {"report": reports[0], "latents": store, "branch": branches[0], "samples": samples[0]}
    pairs = {"reports": reports, "branches": branches, "samples-pair": samples, "latents-pair": [store, other]}
    return {name: page(name, one) for name, one in alone.items()} | {
        name: page(name, *both) for name, both in pairs.items()
    }


def _samples(path: Path, branch: Artifact, seed: int) -> Artifact:
    """COUNT drawings with prompts and latents, of which every third shows another prompt."""
    prompts, lines = held_out_prompts(COUNT), []
    with Draft.open(path, "samples", {"seed": seed}, [branch]) as draft:
        for index, prompt in enumerate(prompts):
            shown = prompts[(index + (index % 3 == 2)) % COUNT]
            rgb = draw(sample_scene(np.random.default_rng([seed, index]), shown))
            (draft.path / f"{index:05d}.png").write_bytes(png_bytes(rgb, {"prompt": prompt.text}))
            latents = np.random.default_rng([seed, index]).normal(size=(16, 128)).astype(np.float32)
            (draft.path / "latents").mkdir(exist_ok=True)
            save_tensors(draft.path / "latents" / f"{index:05d}.safetensors", _tensors(latents))
            lines.append(json.dumps({"index": index, "prompt": prompt.text, "plan": None, "seed": seed}))
        (draft.path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
        return draft.commit({"recipe": branch.info["recipe"]})


def _tensors(latents_PC: np.ndarray) -> dict:
    import torch

    return {"latents": torch.from_numpy(latents_PC)}


# ---- the browser ----------------------------------------------------------------------------------------------------


def browser_path() -> str | None:
    """BIFROST_CHROMIUM, or a Chromium or Chrome of this system."""
    names = (os.environ.get("BIFROST_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@contextmanager
def opened(browser, file: Path, **options) -> Iterator:
    """The page of a file in its own window; `page.asked` has each address asked for, `page.said` each complaint."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.asked, page.said = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.goto(file.as_uri())
    try:
        yield page
    finally:
        context.close()
