"""Measure the built-in system: `python tests/quality.py [-n 400] [--seed 1]` prints the README's table.

One image a held-out prompt, no picking, judged by the checker, with Wilson 95 % intervals by category; then whether
images of one prompt differ where it leaves them free.
"""

import argparse
import math
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from bifrost_cli import load_recipe
from bifrost_cli.artifacts import Artifact
from bifrost_cli.generation.pipeline import BifrostPipeline
from bifrost_cli.loading.resolve import BUILTIN
from bifrost_cli.shapes.captions import CATEGORIES, held_out_prompts, sample_scene
from bifrost_cli.shapes.checker import check, read_scene
from bifrost_cli.shapes.draw import draw
from bifrost_cli.shapes.scene import GRID, SIZE
from bifrost_cli.stats import wilson

FREE = 24  # single-object prompts of the diversity, 16 images each


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int, default=400)
    parser.add_argument(
        "--seed", type=int, default=1, help="which prompts; the settings were chosen on those of seed 0"
    )
    parser.add_argument("--system", type=Path, default=BUILTIN)
    parser.add_argument("--branch", type=Path, help="another branch than the system's")
    parser.add_argument("--only", nargs="*", help="rows by their number")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--grid", type=Path, help="write 64 of the first row's images, evenly taken")
    args = parser.parse_args()
    prompts = held_out_prompts(args.n, args.seed)
    branch, linear = args.branch or args.system / "branch", args.system / "branch-linear"
    pipe = pipeline(branch, branch, args)
    rows = {
        "prompt alone": lambda: chain(pipe, prompts, plan=False),
        "with the MLLM's plan": lambda: chain(pipe, prompts, plan=True),
        "reconstruction of held-out images": lambda: reconstructions(pipe, prompts),
        "FLUX with text alone": lambda: chain(pipe, prompts, plan=False, control_scale=0.0),
    }
    if linear.exists():  # it ships with the package, and is none of `shapes pretrain`
        paper = pipeline(linear, "tiny", args)
        rows["linear head, one step, with the plan"] = lambda: chain(paper, prompts)
        rows["linear head, prompt alone, 16 steps"] = lambda: chain(paper, prompts, plan=False, decode_steps=16)
    for number, (title, images_of) in enumerate(rows.items(), start=1):
        if args.only is None or str(number) in args.only:
            images = images_of()
            show(title, prompts, images)
            if number == 1 and args.grid:
                sheet(images[:: max(1, len(images) // 64)][:64]).save(args.grid)
    if args.only is None or "7" in args.only:
        diversity(pipe)


def pipeline(branch, recipe, args):
    """The branch as this recipe generates with it, on the system's bases."""
    bases = [f"models.mllm={args.system / 'mllm'}", f"models.diffusion={args.system / 'flux'}"]
    parts = [Artifact.open(folder) for folder in (branch, args.system / "controlnet")]
    return BifrostPipeline(load_recipe(recipe, [*bases, *args.sets]), *parts, device="cpu")


def chain(pipe, prompts, **settings):
    """One image a prompt, with these `generate` settings instead of the recipe's."""
    return [np.asarray(pipe(prompt.text, seed=0, **settings).images[0]) for prompt in prompts]


def reconstructions(pipe, prompts):
    """Held-out scenes drawn, encoded, and reconstructed from their latents alone (FLUX reads an empty prompt)."""
    rng, images = np.random.default_rng(0), []
    for index, prompt in enumerate(prompts):
        images.append(np.asarray(pipe.decode(pipe.encode(draw(sample_scene(rng, prompt))), seed=index)))
    return images


def show(title, prompts, images):
    """One line for all and one for each category: right / args, share and interval."""
    verdicts = [check(prompt, pixels) for prompt, pixels in zip(prompts, images, strict=True)]
    right, args = Counter(), Counter(prompt.category for prompt in prompts)
    right.update(prompt.category for prompt, verdict in zip(prompts, verdicts, strict=True) if verdict.right)
    print(f"\n{title}")
    for name in ("all", *CATEGORIES):
        k, n = (right[name], args[name]) if name != "all" else (right.total(), args.total())
        low, high = wilson(k, n)
        print(f"  {name:18} {k:4} / {n:<4} {k / n:.3f}  [{low:.3f}, {high:.3f}]", flush=True)
    for prompt, verdict in list(zip(prompts, verdicts, strict=True)):
        if not verdict.right and right.total() > 0.8 * len(prompts):
            print(f"    wrong: {prompt.text}: {verdict.why}")


def diversity(pipe):
    """Where the one thing of a prompt stands in 16 images: entropy of its cell, beside that of drawn scenes.

    A sampler that always generates one image would have an entropy of 0; 16 equally likely cells have 4 bits.
    """
    prompts = [prompt for prompt in held_out_prompts(400, 0) if prompt.category in ("single_object", "colors")][:FREE]
    rng, cells = np.random.default_rng(0), {"generated": [], "drawn": []}
    for prompt in prompts:
        images = pipe(prompt.text, num_images=16, seed=0, plan=False).images
        cells["generated"].append([cell(np.asarray(image)) for image in images])
        cells["drawn"].append([cell(draw(sample_scene(rng, prompt))) for _ in range(16)])
    print(f"\nentropy of the place, bits: {len(prompts)} prompts of one thing, 16 images each")
    for name, found in cells.items():
        each = [entropy([one for one in row if one is not None]) for row in found]
        pooled = entropy([one for row in found for one in row if one is not None])
        print(f"  {name:10} within a prompt {np.mean(each):.2f}, over all {pooled:.2f}")


def cell(pixels):
    """The cell of the image's first thing; None when it shows none."""
    found = read_scene(pixels).found
    return None if not found else (int(found[0].y * GRID / SIZE), int(found[0].x * GRID / SIZE))


def entropy(values):
    counts = np.array(list(Counter(values).values()))
    return float(-(counts / counts.sum() * np.log2(counts / counts.sum())).sum()) if len(counts) else math.nan


def sheet(images):
    rows = [np.concatenate(images[i : i + 8], axis=1) for i in range(0, len(images) - 7, 8)]
    return Image.fromarray(np.concatenate(rows, axis=0))


if __name__ == "__main__":
    main()
