"""`callback_on_step_end` of the pipeline: what it is shown after each step, and how a step ends a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from bifrost_cli.errors import UsageError
from bifrost_cli.generation.requests import ImageRequest
from bifrost_cli.generation.stages import StageCallback

if TYPE_CHECKING:
    from bifrost_cli.generation.pipeline import BifrostPipeline

StepCallback = Callable[["BifrostPipeline", int, Any, dict[str, Any]], dict[str, Any] | None]


class Interruption(Exception):
    """`interrupt` was set: leaves the stages of the image at hand."""


def step_callback(
    pipe: BifrostPipeline, callback: StepCallback | None, request: ImageRequest, *, interruptible: bool = False
) -> StageCallback:
    """A callback of the stages that calls a caller's, with a copy of the latents, and heeds `pipe.interrupt`."""

    def on_step(
        stage: str, step: int, timestep: Any, latents: torch.Tensor, masked: torch.Tensor | None = None
    ) -> None:
        if callback is not None:
            shown = latents.clone()
            facts = {"index": request.index, "prompt": request.prompt, "seed": request.seed, "masked": masked}
            returned = callback(pipe, step, timestep, {"latents": shown, "stage": stage, **facts})
            if returned and returned.get("latents", shown) is not shown:
                raise UsageError(
                    "callback_on_step_end returned other latents",
                    at="it can watch and stop a step, not change it",
                    fix="return its kwargs, or nothing",
                )
        if interruptible and pipe.interrupt:
            raise Interruption

    return on_step
