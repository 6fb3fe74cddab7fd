"""`bifrost bench NAME`: what a design decision saves, against a named baseline, in one run on this machine.

A benchmark is one function in one file, and one line of `BENCHES`; the command, its options and its output follow. To
add one: write `bench_NAME.py` with a function `bench_NAME(setup: BenchSetup) -> Iterator[BenchRow]` that yields what
`paired.compare` returns for each pair, and name it here. `setup` says which recipe, on which device and how large:
scaled down on a CPU, the recipe's true widths with random weights on a GPU (`setup.full`). It takes under five minutes.
This file imports no torch, so that the command's help stays quick.
"""

from __future__ import annotations

from typing import NamedTuple


class Bench(NamedTuple):
    """A benchmark as the command line shows it.

    Attributes:
        help: one line, what is timed and against what.
        function: `module:function` of a function from a `BenchSetup` to rows.
        sizes: numbers that can be given, `{name: (its value on a CPU, help)}`; on a GPU the recipe decides.
    """

    help: str
    function: str
    sizes: dict[str, tuple[int, str]]


_ROOM = "bifrost_cli.planning.bench"
BENCHES = {
    "decode": Bench(
        "Time the branch's decode loop against the published loop, which encodes everything again at each step.",
        f"{_ROOM}.bench_decode:bench_decode",
        {"hidden": (512, "Width."), "layers": (8, "Decoder layers."), "tokens": (256, "Image tokens."),
         "text": (300, "Text tokens."), "steps": (8, "Decode steps.")},
    ),
    "extract": Bench(
        "Time extract-latents against the bare encoder on images that are in memory.",
        f"{_ROOM}.bench_extract:bench_extract",
        {"images": (512, "Images of the source."), "pixels": (64, "Of a side of an image file.")},
    ),
    "generate": Bench(
        "Time rendering an image of patch latents against diffusers' own FluxControlNetPipeline.",
        f"{_ROOM}.bench_generate:bench_generate",
        {"pixels": (256, "Of a side of the image."), "steps": (4, "Diffusion steps.")},
    ),
    "store": Bench(
        "Time random rows of the paper's size from a latents store against numpy's memory map, and writing them.",
        f"{_ROOM}.bench_store:bench_store",
        {"rows": (256, "Of the store."), "batch": (16, "Rows of a read.")},
    ),
    "start": Bench(
        "Time commands from a cold start to their end against `import torch` alone.",
        f"{_ROOM}.bench_start:bench_start",
        {},
    ),
    "train": Bench(
        "Time a training step of the branch against the published one: both weight sets on every token, no cache.",
        f"{_ROOM}.bench_train:bench_train",
        {"hidden": (512, "Width."), "layers": (4, "Decoder layers."), "tokens": (256, "Image tokens."),
         "text": (300, "Text tokens that the published step pads to."), "rows": (2, "Rows of the batch.")},
    ),
}  # fmt: skip
