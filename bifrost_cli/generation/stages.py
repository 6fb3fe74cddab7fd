"""The stages of one image: how long each took, and what is called after each of their steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

STAGES = ("plan", "prompt", "decode", "diffusion", "vae")

# Called with the stage (`decode` or `diffusion`), the step from 0, the timestep and the latents of that step: in decode
# the number of patches still masked and patch latents (1, P, C), in diffusion 1000 to 0 and VAE latents (1, c, h, w).
StageCallback = Callable[[str, int, Any, torch.Tensor], None]


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time spent inside, the device's work included."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def timing_line(seconds: Mapping[str, float]) -> str:
    """`plan 0.4 s, prompt 0.1 s, ...` for the stages that ran."""
    return ", ".join(f"{stage} {seconds[stage]:.2f} s" for stage in STAGES if stage in seconds)
