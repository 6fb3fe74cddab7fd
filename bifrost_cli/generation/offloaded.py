"""Both halves of the chain, loaded when they are needed; with `generate.offload`, one after the other.

In: a recipe, a pair, a device, orders. Out: predicted latents and images. Sketches of many orders are kept in the unfinished
folder, so that an interrupted run makes none twice. Does not know how an image is written or what a samples artifact
is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import load, save

from bifrost_cli.config.schema import Recipe
from bifrost_cli.errors import memory_errors
from bifrost_cli.generation.pipeline import Decoder, PredictedLatents, Prior
from bifrost_cli.generation.requests import ImageRequest
from bifrost_cli.generation.resume_log import ResumeLog
from bifrost_cli.loading.compatibility import GenerationModels, require_base
from bifrost_cli.loading.fingerprints import diffusion_fingerprint
from bifrost_cli.loading.offload import OffloadPolicy, forget
from bifrost_cli.loading.resolve import resolve_device
from bifrost_cli.runtime.ui import Ui


class Pipeline:
    """`apart` is True when the two halves are never both in memory; `seconds` is the time of each stage so far."""

    def __init__(self, recipe: Recipe, pair: GenerationModels, device: str, ui: Ui) -> None:
        self._recipe, self._pair, self._device, self._ui = recipe, pair, device, ui
        self.apart = recipe.generate.offload != "none"
        self.seconds: Counter[str] = Counter()
        self._prior: Prior | None = None
        self._decoder: Decoder | None = None
        self._told: str | None = None

    def predict(self, order: ImageRequest) -> PredictedLatents:
        """Patch latents of an order."""
        if self._prior is None:
            self._drop()
            if (
                self.apart
            ):  # a diffusion model that does not fit is told of before hours of predicted latents, not after
                models = self._recipe.models
                require_base(self._pair.controlnet, "painter", models.diffusion, diffusion_fingerprint(models))
            self._prior = Prior.load(self._recipe, self._pair.branch, self._offload_policy())
            self._prior.seconds = self.seconds
        with memory_errors(f"predicting the latents of {order.name}", self._less()):
            predict = self._prior.predict(order.prompt, order.seed)
        if predict.plan is not None and self._told != order.prompt:
            self._ui.say(f"plan {order.index}: {predict.plan}")
            self._told = order.prompt
        return predict

    def render(self, order: ImageRequest, predict: PredictedLatents) -> tuple[np.ndarray, bool]:
        """The image of predicted latents, and whether any model read less than the whole prompt."""
        if self._decoder is None:
            self._drop()
            self._decoder = Decoder.load(self._recipe, self._pair.controlnet, self._offload_policy(), self._ui)
            self._decoder.seconds = self.seconds
        with memory_errors(f"generating {order.name}", self._less()):
            pixels_HWC = self._decoder.render(order.prompt, predict.latents_PC, order.seed)
        return pixels_HWC, predict.cut or self._decoder.cuts(order.prompt)

    def _drop(self) -> None:
        if self.apart:
            self._prior = self._decoder = None
            forget()

    def _offload_policy(self) -> OffloadPolicy:
        return OffloadPolicy(resolve_device(self._device), self._recipe.generate.offload, self._recipe.models.weights)

    def _less(self) -> str:
        offload, weights = self._recipe.generate.offload, self._recipe.models.weights
        stronger = {"none": "model", "model": "sequential"}.get(offload) if weights == "dtype" else None
        if stronger or not self.apart:
            return f"--set generate.offload={stronger or 'model'} (the same bytes)"
        return "--set models.weights=nf4 --set generate.offload=model, or a GPU with more memory"


class LatentsCache:
    """Sketches of an unfinished samples folder, in its `work`."""

    def __init__(self, folder: Path) -> None:
        self._log, self._folder = ResumeLog(folder, "sketches"), folder

    def make(
        self,
        orders: Sequence[ImageRequest],
        predict: Callable[[ImageRequest], PredictedLatents],
        check: Callable[[], None],
    ) -> None:
        """Sketch what is missing; `check` is called before each and may raise to stop."""
        for order in orders:
            if not self._log.done(order.index):
                check()
                made = predict(order)
                facts = {"plan": made.plan, "cut": made.cut}
                self._log.add(order.index, {self._name(order): latents_bytes(made)}, facts)

    def of(self, order: ImageRequest) -> PredictedLatents:
        """The sketch of an order that `make` was given."""
        latents = load((self._folder / self._name(order)).read_bytes())["latents"]
        facts = self._log.facts[order.index]
        return PredictedLatents(order.prompt, facts["plan"], facts["cut"], latents)

    def _name(self, order: ImageRequest) -> str:
        return f"work/sketches/{order.index:05d}.safetensors"


def latents_bytes(predict: PredictedLatents) -> bytes:
    """The patch latents as a safetensors file, exactly."""
    return save({"latents": predict.latents_PC.contiguous()})
