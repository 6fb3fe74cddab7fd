"""`bifrost shapes render`: drawings of the built-in world, with a metadata.jsonl of prompts, plans, categories.

`extract-latents` reads the folder like any other.
"""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote

import numpy as np

from bifrost_cli.artifacts.files import make_folder, new_folder, write_bytes
from bifrost_cli.artifacts.manifest import require_outside
from bifrost_cli.data.png import png_bytes
from bifrost_cli.errors import UsageError
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.shapes import world as worlds
from bifrost_cli.shapes.world import WORLDS


def render_shapes(
    output: Path | str,
    *,
    n: int = 64,
    seed: int = 0,
    split: str = "train",
    world: str = "shapes",
    ui: Ui | None = None,
) -> Path:
    """Draw images into a new folder, which appears whole or not at all.

    Args:
        seed: image i is a function of (seed, i).
        split: "train" for the grammar's training part, "held-out" for distinct prompts that training never sees,
            evenly over the categories; "new", in shapes-2, for those with a combination that training never shows.
        world: "shapes" or "shapes-2".

    Raises:
        UsageError: the folder is not empty, or cannot be made anew; no such split or world, or
            fewer held-out prompts than `n`.
    """
    folder, ui = Path(output), ui or Ui()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not empty", fix="choose another folder with -o", code="BF-USE-002")
    require_outside(folder)
    if folder.exists() and (folder.samefile(".") or folder.is_mount()):
        raise UsageError(f"{folder} is the current folder, or a mount", fix=f"-o {quote(str(folder / 'shapes'))}")
    if world not in WORLDS:
        raise UsageError(f"there is no world {world}", fix=" or ".join(WORLDS))
    shapes, prompts = worlds.world(world), []
    splits = [name.replace("_", "-") for name in shapes.splits if name != "all"]
    if split not in splits:
        raise UsageError(f"{world} has no split {split}", fix=", ".join(splits))
    if split != "train":
        prompts = shapes.held_out_prompts(n, seed, split.replace("-", "_"))
    if prompts and len(prompts) < n:
        raise UsageError(f"the grammar holds out only {len(prompts)} prompts, fewer than {n}", fix=f"-n {len(prompts)}")
    lines = []
    folder = folder.resolve() if folder.is_symlink() else folder
    make_folder(folder.parent)
    with new_folder(folder) as draft, ui.progress(n, "drawing images") as bar:
        for i in range(n):
            rng = np.random.default_rng([seed, i])
            if prompts:
                prompt, scene = prompts[i], shapes.sample_scene(rng, prompts[i])
            else:
                prompt, scene = shapes.training_sample(rng)
            name = f"{i:05d}.png"
            write_bytes(draft / name, png_bytes(shapes.draw(scene)))
            facts = {"caption": prompt.text, "plan": shapes.write_plan(scene, prompt), "category": prompt.category}
            lines.append(json.dumps({"file_name": name, **facts}, sort_keys=True) + "\n")
            bar.advance()
        write_bytes(draft / "metadata.jsonl", "".join(lines).encode())
    return folder
