"""Many pictures to patch latents and back: a samples artifact of reconstructions, restartable picture by picture.

In: a recipe, a set of square pictures, a ControlNet (given, or found). Out: a samples artifact whose picture i is the
i-th of the set, painted from its latents alone: the painter reads no text. Does not know how they are compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bifrost_cli.artifacts import Artifact, Draft, default_path, identity_id
from bifrost_cli.artifacts.files import write_bytes
from bifrost_cli.config import Recipe
from bifrost_cli.data.images import square
from bifrost_cli.data.picture_set import PROMPTS, PictureSet
from bifrost_cli.data.png import png_bytes
from bifrost_cli.models.encoders import Encoder
from bifrost_cli.stages.loading import load_encoder
from bifrost_cli.stages.painting import Renderer, Sketch
from bifrost_cli.stages.pair import choose_controlnet
from bifrost_cli.stages.place import pick_device
from bifrost_cli.stages.placement import Placement, deciding, forget
from bifrost_cli.stages.prompts import Order
from bifrost_cli.stages.studio import Sketches
from bifrost_cli.stages.ui import Ui
from bifrost_cli.stages.worklog import WorkLog, stopped, tidy
from bifrost_cli.training.signals import StopFlag


def reconstruct_set(
    recipe: Recipe,
    pictures: PictureSet,
    *,
    controlnet: Path | str | None = None,
    workspace: Path | str = "runs",
    seed: int = 0,
    device: str = "auto",
    ui: Ui | None = None,
) -> Artifact:
    """Encode each picture and paint it again. The same call again goes on where it was stopped, and makes none twice.

    ArtifactError (5): a ControlNet for other latents or another painter; Stopped (75): a signal between pictures.
    """
    ui = ui or Ui()
    chain = _Chain(recipe, pictures, pick_device(device), ui)
    chain.controlnet, why = choose_controlnet(controlnet, chain.encoder.identity, workspace)
    ui.say(why)
    settings = chain.settings()
    identity = {"reconstructions of": pictures.digest, "count": len(pictures.entries), "seed": seed,
                "settings": settings}  # fmt: skip
    folder = default_path(workspace, "samples", identity_id("samples", identity, [chain.controlnet]))
    orders = [Order(index, entry.prompt or "", seed) for index, entry in enumerate(pictures.entries)]
    with StopFlag() as stop, Draft.open(folder, "samples", identity, [chain.controlnet]) as draft:
        if draft.complete:
            draft.complete.check()
            tidy(folder)
            return draft.complete
        log = WorkLog(draft.path)
        for finished in (log.there, log.done):  # first what is missing, then what is damaged
            missing = [order for order in orders if not finished(order.index)]
            _paint_missing(chain, draft, log, missing, len(orders), stop, ui)
        write_bytes(draft.path / PROMPTS, _lines(orders, pictures))
        artifact = draft.commit({"settings": settings, "recipe": recipe.model_dump(mode="json")},
                                made={"seed": seed, "device": device}, cost={"samples": len(orders)})  # fmt: skip
    tidy(folder)
    return artifact


class _Chain:
    """Encoder and painter, of which one is in memory; `controlnet` is chosen after the encoder is known."""

    controlnet: Artifact

    def __init__(self, recipe: Recipe, pictures: PictureSet, place: torch.device, ui: Ui) -> None:
        self._recipe, self._pictures, self._place, self._ui = recipe, pictures, place, ui
        self._encoder: Encoder | None = None
        self._renderer: Renderer | None = None

    @property
    def encoder(self) -> Encoder:
        if self._encoder is None:
            self._renderer = None
            forget()
            self._encoder = load_encoder(self._recipe, self._place)
        return self._encoder

    def settings(self) -> dict[str, Any]:
        """What decides a picture beside its original, its seed and the ControlNet."""
        recipe, chosen = self._recipe, deciding(self._recipe.generate)
        small = {"weights": recipe.models.weights} if recipe.models.weights != "dtype" else {}
        sizes = {"paint_size": recipe.latents.paint_size, "dtype": recipe.models.dtype}
        return {**chosen, **sizes, **small, "encoder": self.encoder.identity}

    @torch.no_grad()
    def encode(self, order: Order) -> Sketch:
        """One at a time: the same picture gives the same bits alone or among others."""
        pixels_BHWC = square(self._pictures.entries[order.index].load(), self.encoder.image_size)[None]
        return Sketch(order.prompt, None, False, self.encoder.encode(pixels_BHWC.copy())[0].float().cpu())

    def paint(self, order: Order, sketch: Sketch) -> np.ndarray:
        if self._renderer is None:
            self._encoder = None
            forget()
            models, generate = self._recipe.models, self._recipe.generate
            where = Placement(self._place, generate.offload, models.weights)
            self._renderer = Renderer.load(self._recipe, self.controlnet, where, self._ui)
        return self._renderer.paint("", sketch.latents_PC, order.seed)


def _paint_missing(
    chain: _Chain, draft: Draft, log: WorkLog, missing: list[Order], total: int, stop: StopFlag, ui: Ui
) -> None:
    """Encode all, then paint all; the latents lie in the unfinished folder until then."""
    if not missing:
        return

    def check(painted: int = 0) -> None:
        if stop.requested:
            raise stopped(total - len(missing) + painted, total, draft.path)

    sketches = Sketches(draft.path)
    sketches.make(missing, chain.encode, check)
    with ui.progress(len(missing), "painting again") as bar:
        for done, order in enumerate(missing):
            check(done)
            pixels_HWC = chain.paint(order, sketches.of(order))
            log.add(order.index, {order.name: png_bytes(pixels_HWC, {"reconstruction": "yes"})}, {})
            bar.advance(1)


def _lines(orders: list[Order], pictures: PictureSet) -> bytes:
    lines = [{"index": order.index, "file": order.name, "prompt": order.prompt or None, "plan": None,
              "seed": order.seed, "of": pictures.entries[order.index].name} for order in orders]  # fmt: skip
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8")
