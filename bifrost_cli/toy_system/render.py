"""Drawing the built-in world into a folder that `extract-latents` reads like any other.

In: how many images, a seed, a split. Out: PNG files and a metadata.jsonl with prompt, plan and category. Knows no
model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bifrost_cli.artifacts.files import make_folder, write_bytes
from bifrost_cli.data.png import png_bytes
from bifrost_cli.errors import UsageError
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.shapes.captions import Prompt, held_out_prompts, sample_prompt, sample_scene
from bifrost_cli.shapes.draw import draw
from bifrost_cli.shapes.scene_plan import write_plan

METADATA = "metadata.jsonl"


def render_shapes(
    output: Path | str, *, n: int = 64, seed: int = 0, split: str = "train", ui: Ui | None = None
) -> Path:
    """Draw `n` images into a new folder and return it; the list is written last.

    `split`: "train" draws from the grammar's training part, "held-out" distinct prompts that training never sees,
    evenly over the categories. Image i is a function of (seed, i). UsageError (2): the folder is not empty, no such
    split, or fewer held-out prompts than asked for.
    """
    folder, ui = Path(output), ui or Ui()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not empty", fix="choose another folder with -o", code="BF-USE-002")
    lines, prompts = [], list(_prompts(n, seed, split))
    make_folder(folder)
    with ui.progress(n, "drawing pictures") as bar:
        for i, (rng, prompt) in enumerate(prompts):
            scene = sample_scene(rng, prompt)
            name = f"{i:05d}.png"
            write_bytes(folder / name, png_bytes(draw(scene)))
            told = {"caption": prompt.text, "plan": write_plan(scene, prompt), "category": prompt.category}
            lines.append(json.dumps({"file_name": name, **told}, sort_keys=True) + "\n")
            bar.advance()
    write_bytes(folder / METADATA, "".join(lines).encode())
    return folder


def _prompts(n: int, seed: int, split: str) -> Iterator[tuple[np.random.Generator, Prompt]]:
    if split not in ("train", "held-out"):
        raise UsageError(f"there is no split {split}", fix="train or held-out")
    chosen = held_out_prompts(n, seed) if split == "held-out" else None
    if chosen is not None and len(chosen) < n:
        raise UsageError(f"the grammar holds out only {len(chosen)} prompts, fewer than {n}", fix=f"-n {len(chosen)}")
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        yield rng, chosen[i] if chosen is not None else sample_prompt(rng, split="train")
