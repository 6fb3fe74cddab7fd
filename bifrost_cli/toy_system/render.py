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
from bifrost_cli.shapes.captions import held_out_prompts, sample_prompt, sample_scene
from bifrost_cli.shapes.draw import draw
from bifrost_cli.shapes.words import write_plan


def render_shapes(
    output: Path | str, *, n: int = 64, seed: int = 0, split: str = "train", ui: Ui | None = None
) -> Path:
    """Draw images into a new folder, which appears whole or not at all.

    Args:
        seed: image i is a function of (seed, i).
        split: "train" for the grammar's training part, "held-out" for distinct prompts that training never sees,
            evenly over the categories.

    Raises:
        UsageError: the folder is not empty, or cannot be made anew; no such split, or fewer held-out prompts than `n`.
    """
    folder, ui = Path(output), ui or Ui()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not empty", fix="choose another folder with -o", code="BF-USE-002")
    require_outside(folder)
    if folder.exists() and (folder.samefile(".") or folder.is_mount()):
        raise UsageError(f"{folder} is the current folder, or a mount", fix=f"-o {quote(str(folder / 'shapes'))}")
    if split not in ("train", "held-out"):
        raise UsageError(f"there is no split {split}", fix="train or held-out")
    prompts = held_out_prompts(n, seed) if split == "held-out" else []
    if prompts and len(prompts) < n:
        raise UsageError(f"the grammar holds out only {len(prompts)} prompts, fewer than {n}", fix=f"-n {len(prompts)}")
    lines = []
    folder = folder.resolve() if folder.is_symlink() else folder
    make_folder(folder.parent)
    with new_folder(folder) as draft, ui.progress(n, "drawing images") as bar:
        for i in range(n):
            rng = np.random.default_rng([seed, i])
            prompt = prompts[i] if prompts else sample_prompt(rng, split="train")
            scene = sample_scene(rng, prompt)
            name = f"{i:05d}.png"
            write_bytes(draft / name, png_bytes(draw(scene)))
            facts = {"caption": prompt.text, "plan": write_plan(scene, prompt), "category": prompt.category}
            lines.append(json.dumps({"file_name": name, **facts}, sort_keys=True) + "\n")
            bar.advance()
        write_bytes(draft / "metadata.jsonl", "".join(lines).encode())
    return folder
