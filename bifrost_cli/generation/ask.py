"""ask: the frozen MLLM answers a question about an image. Nothing that Bifrost trains has a part in it."""

from __future__ import annotations

from pathlib import Path

from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.images import read_image
from bifrost_cli.errors import UsageError
from bifrost_cli.loading.loaders import ModelLoader
from bifrost_cli.models.mllm.frozen_mllm import Completion
from bifrost_cli.runtime.ui import Ui


def ask(
    recipe: Recipe, image: Path | str, question: str, *, max_tokens: int = 64, device: str = "auto",
    ui: Ui | None = None,
) -> str:  # fmt: skip
    """The MLLM's greedy answer about an image file; `answer` says of it whether it was cut.

    Args:
        recipe: names the MLLM, and how images are read.
        max_tokens: longest answer.
        device: where to compute.
        ui: told what was repaired in the image, and whether the answer was cut.

    Raises:
        BadImage: (4) the image cannot be used.
        UsageError: (2) the question is empty.
    """
    return answer(recipe, image, question, max_tokens=max_tokens, device=device, ui=ui).text


def answer(
    recipe: Recipe, image: Path | str, question: str, *, max_tokens: int = 64, device: str = "auto",
    ui: Ui | None = None,
) -> Completion:  # fmt: skip
    """As `ask`.

    Returns:
        The text, and whether it ended at `max_tokens`.
    """
    ui = ui or Ui()
    if not question.strip():
        raise UsageError("the question is empty", fix='bifrost ask IMAGE "what is in the image?"')
    decoded = read_image(Path(image), recipe.images)
    for note in decoded.notes:
        ui.say(f"{image}: {note}")
    loader = ModelLoader(recipe.models, device, recipe.generate.offload)
    mllm = loader.mllm()
    loader.policy.settle(mllm.model, frozen=[mllm.decoder])
    with loader.policy.on(mllm.model):
        given = mllm.answer(decoded.rgb.copy(), question, max_tokens)  # Pillow lends a read-only array
    if given.cut:
        ui.say(f"the answer is longer than {max_tokens} tokens, and was cut there")
    return given
