"""Runs reference vectors through the product: `python tests/parity.py [DIR]`.

In: a folder with vector folders below it (config.json, inputs, outputs and, mostly, model .safetensors). Out: one line
a number, `name  largest error  tolerance  pass|fail`, and exit code 1 if one fails, is missing, or none was found.
Which kind a folder is follows from what it holds; every size is taken from its config.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from parity_flux import check_controlnet, check_flux_denoise
from parity_mllm import check_branch, check_decode, check_layout, check_visual
from safetensors import safe_open

VECTORS = Path(__file__).parent / "vectors"
Row = tuple[str, float, float]


def kind_of(folder: Path) -> Callable[[Path], list[Row]] | None:
    """The check for this folder's vectors, or None when they are of no known form."""
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "outputs.safetensors", "pt") as outputs:
        names = set(outputs.keys())
    if "cases" in config:
        return check_layout
    if "transformer" in config:
        return check_flux_denoise
    if "controlnet" in config:
        return check_controlnet
    if "vision_pred" in names:
        return check_branch
    if any(name.startswith("latents.iter") for name in names):
        return check_decode
    return check_visual if "image_embeds" in names else None


def rows_of(folder: Path) -> Iterator[Row]:
    """Every number of one folder; a folder that cannot be run is one failing row that says why."""
    try:
        check = kind_of(folder)
        yield from check(folder) if check else [("not a known form of vectors", float("inf"), 0.0)]
    except Exception as error:  # one broken folder must not hide the others
        yield f"{type(error).__name__}: {error}".splitlines()[0], float("inf"), 0.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, nargs="?", default=VECTORS, help="folder to search (default: tests/vectors)")
    root = parser.parse_args(arguments).dir
    logging.getLogger("transformers").setLevel(logging.ERROR)
    counts = {True: 0, False: 0}
    for path in sorted(root.rglob("outputs.safetensors")):
        for name, error, tolerance in rows_of(path.parent):
            passed = error <= tolerance
            counts[passed] += 1
            verdict = "pass" if passed else "fail"
            print(f"{path.parent.name}/{name}  {error:.3g}  {tolerance:.3g}  {verdict}", flush=True)
    print(f"{counts[True]} passed, {counts[False]} failed" if any(counts.values()) else f"no vectors below {root}")
    return 0 if counts[True] and not counts[False] else 1


if __name__ == "__main__":
    sys.exit(main())
