"""ask: the frozen MLLM answers a question about an image. Nothing that Bifrost trains has a part in it.

In: a recipe, an image, a question. Out: the answer as text.
"""

from __future__ import annotations

from pathlib import Path

import torch

from bifrost_cli.config import Recipe
from bifrost_cli.data.images import read_image
from bifrost_cli.errors import UsageError
from bifrost_cli.stages.loading import load_mllm
from bifrost_cli.stages.place import pick_device
from bifrost_cli.stages.placement import Placement
from bifrost_cli.stages.ui import Ui


def ask(
    recipe: Recipe,
    image: Path | str,
    question: str,
    *,
    max_tokens: int = 64,
    device: str = "auto",
    ui: Ui | None = None,
) -> str:
    """The MLLM's greedy answer, at most `max_tokens` tokens. BadImage (4), UsageError (2) for an empty question."""
    ui = ui or Ui()
    if not question.strip():
        raise UsageError("the question is empty", fix='bifrost ask IMAGE "what is in the picture?"')
    picture = read_image(Path(image), recipe.latents)
    for note in picture.notes:
        ui.say(f"{image}: {note}")
    models = recipe.models
    placement = Placement(pick_device(device), recipe.generate.offload, models.weights)
    mllm = load_mllm(models.mllm, placement.home, getattr(torch, models.dtype), revision=models.revision)
    placement.settle(mllm.model, frozen=[mllm.decoder])
    with placement.on(mllm.model):
        return mllm.answer(picture.rgb.copy(), question, max_tokens)  # Pillow lends a read-only array
