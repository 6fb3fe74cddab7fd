"""Many images to patch latents and back: a samples artifact of reconstructions, restartable image by image.

In: a recipe, a set of square images, a ControlNet (given, or found). Out: a samples artifact whose image i is the
i-th of the set, generated from its latents alone: the diffusion model reads no text. Does not know how they are compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bifrost_cli.artifacts import Artifact, Draft, default_path, identity_id
from bifrost_cli.artifacts.files import write_bytes
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.image_sets import PROMPTS, ImageSet
from bifrost_cli.data.images import square
from bifrost_cli.data.png import png_bytes
from bifrost_cli.generation.offloaded import LatentsCache
from bifrost_cli.generation.pipeline import Decoder, PredictedLatents
from bifrost_cli.generation.requests import ImageRequest
from bifrost_cli.generation.resume_log import ResumeLog, stopped, tidy
from bifrost_cli.loading.compatibility import choose_controlnet
from bifrost_cli.loading.loaders import ModelLoader
from bifrost_cli.loading.offload import OffloadPolicy, deciding, forget
from bifrost_cli.loading.resolve import resolve_device
from bifrost_cli.models.encoders import Encoder
from bifrost_cli.runtime.signals import StopFlag
from bifrost_cli.runtime.ui import Ui


def reconstruct_set(
    recipe: Recipe,
    images: ImageSet,
    *,
    controlnet: Path | str | None = None,
    workspace: Path | str = "runs",
    seed: int = 0,
    device: str = "auto",
    ui: Ui | None = None,
) -> Artifact:
    """Encode each image and generate it again. The same call again goes on where it was stopped, and makes none twice.

    ArtifactError (5): a ControlNet for other latents or another diffusion model; Stopped (75): a signal between images.
    """
    ui = ui or Ui()
    chain = _Chain(recipe, images, resolve_device(device), ui)
    chain.controlnet, why = choose_controlnet(controlnet, chain.encoder.identity, workspace)
    ui.say(why)
    settings = chain.settings()
    identity = {"reconstructions of": images.digest, "count": len(images.entries), "seed": seed,
                "settings": settings}  # fmt: skip
    folder = default_path(workspace, "samples", identity_id("samples", identity, [chain.controlnet]))
    orders = [ImageRequest(index, entry.prompt or "", seed) for index, entry in enumerate(images.entries)]
    with StopFlag() as stop, Draft.open(folder, "samples", identity, [chain.controlnet]) as draft:
        if draft.complete:
            draft.complete.check()
            tidy(folder)
            return draft.complete
        log = ResumeLog(draft.path)
        for finished in (log.there, log.done):  # first what is missing, then what is damaged
            missing = [order for order in orders if not finished(order.index)]
            _generate_missing(chain, draft, log, missing, len(orders), stop, ui)
        write_bytes(draft.path / PROMPTS, _lines(orders, images))
        artifact = draft.commit({"settings": settings, "recipe": recipe.model_dump(mode="json")},
                                made={"seed": seed, "device": device}, cost={"samples": len(orders)})  # fmt: skip
    tidy(folder)
    return artifact


class _Chain:
    """Encoder and diffusion model, of which one is in memory; `controlnet` is chosen after the encoder is known."""

    controlnet: Artifact

    def __init__(self, recipe: Recipe, images: ImageSet, place: torch.device, ui: Ui) -> None:
        self._recipe, self._images, self._place, self._ui = recipe, images, place, ui
        self._encoder: Encoder | None = None
        self._decoder: Decoder | None = None

    @property
    def encoder(self) -> Encoder:
        if self._encoder is None:
            self._decoder = None
            forget()
            loader = ModelLoader(self._recipe.models, self._place)
            self._encoder = loader.encoder(self._recipe.latents, self._recipe.images)
        return self._encoder

    def settings(self) -> dict[str, Any]:
        """What decides an image beside its original, its seed and the ControlNet."""
        recipe, chosen = self._recipe, deciding(self._recipe)
        small = {"weights": recipe.models.weights} if recipe.models.weights != "dtype" else {}
        sizes = {"paint_size": recipe.images.output_size, "dtype": recipe.models.dtype}
        return {**chosen, **sizes, **small, "encoder": self.encoder.identity}

    @torch.no_grad()
    def encode(self, order: ImageRequest) -> PredictedLatents:
        """One at a time: the same image gives the same bits alone or among others."""
        pixels_BHWC = square(self._images.entries[order.index].load(), self.encoder.image_size)[None]
        return PredictedLatents(order.prompt, None, False, self.encoder.encode(pixels_BHWC.copy())[0].float().cpu())

    def render(self, order: ImageRequest, predict: PredictedLatents) -> np.ndarray:
        if self._decoder is None:
            self._encoder = None
            forget()
            models, generate = self._recipe.models, self._recipe.generate
            where = OffloadPolicy(self._place, generate.offload, models.weights)
            self._decoder = Decoder.load(self._recipe, self.controlnet, where, self._ui)
        return self._decoder.render("", predict.latents_PC, order.seed)


def _generate_missing(
    chain: _Chain, draft: Draft, log: ResumeLog, missing: list[ImageRequest], total: int, stop: StopFlag, ui: Ui
) -> None:
    """Encode all, then generate all; the latents lie in the unfinished folder until then."""
    if not missing:
        return

    def check(rendered: int = 0) -> None:
        if stop.requested:
            raise stopped(total - len(missing) + rendered, total, draft.path)

    cache = LatentsCache(draft.path)
    cache.make(missing, chain.encode, check)
    with ui.progress(len(missing), "reconstructing") as bar:
        for done, order in enumerate(missing):
            check(done)
            pixels_HWC = chain.render(order, cache.of(order))
            log.add(order.index, {order.name: png_bytes(pixels_HWC, {"reconstruction": "yes"})}, {})
            bar.advance(1)


def _lines(orders: list[ImageRequest], images: ImageSet) -> bytes:
    lines = [{"index": order.index, "file": order.name, "prompt": order.prompt or None, "plan": None,
              "seed": order.seed, "of": images.entries[order.index].name} for order in orders]  # fmt: skip
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8")
