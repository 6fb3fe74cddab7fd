"""`bifrost bench start`: commands from a cold start to their end, against `import torch` in the same Python.

Each run is a process of its own. Processor seconds are those of the whole process, its threads included.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from bifrost_cli.planning.bench.paired import BenchRow, BenchSetup, compare

SECONDS = 30.0  # of each command
ACCEPTED = (0, 2, 8)  # a refusal; `doctor` may have findings
COMMANDS = {
    "a first picture": ("generate", "a red circle above a blue square", "-o", "{new}.png"),
    "plan": ("plan", "bifrost1-7b", "--memory", "80GB"),
    "doctor": ("doctor",),
    "eval --explain": ("eval", "--explain"),
    "report": ("report", "builtin:branch", "-o", "{new}.html"),
    "a refusal": ("generate", "a", "-n", "2", "-o", "two.png"),
}


def bench_start(setup: BenchSetup) -> Iterator[BenchRow]:
    """A row for each of `COMMANDS`, all on the tiny system."""
    with tempfile.TemporaryDirectory(prefix="bifrost-bench-") as folder:
        for number, (what, words) in enumerate(COMMANDS.items()):
            ours = partial(_run, Path(folder), ("-m", "bifrost_cli", *words, "--offline"))
            theirs = partial(_run, Path(folder), ("-c", "import torch"))
            yield compare(what, ours, theirs, baseline="`import torch`", setup=setup, clock="cpu", memory=False,
                          warm_up=number == 0, seconds=SECONDS)  # fmt: skip


def _run(folder: Path, arguments: Sequence[str]) -> None:
    new = f"out{len(list(folder.iterdir()))}"
    own = str(Path(__file__).parents[3])  # where this package is imported from
    path = os.pathsep.join([own, *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [word.replace("{new}", new) for word in arguments]
    done = subprocess.run([sys.executable, *words], cwd=folder, env={**os.environ, "PYTHONPATH": path},
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode not in ACCEPTED:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-500:]}")
