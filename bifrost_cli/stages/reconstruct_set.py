"""Many pictures to patch latents and back: a samples artifact of reconstructions, restartable picture by picture.

In: a recipe, a set of square pictures, a ControlNet (given, or found). Out: a samples artifact whose picture i is the
i-th of the set, painted from its latents alone: the painter reads no text. Does not know how they are compared.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

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
from bifrost_cli.stages.placement import RUN_ONLY, Placement, forget
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

    The encoder and the painter are never in memory together. ArtifactError (5): a ControlNet for other latents or
    another painter; Stopped (75): a signal between pictures.
    """
    ui, place = ui or Ui(), pick_device(device)
    encoder = load_encoder(recipe, place)
    chosen, why = choose_controlnet(controlnet, encoder.identity, workspace)
    ui.say(why)
    settings = {**recipe.generate.model_dump(mode="json", exclude=RUN_ONLY), "paint_size": recipe.latents.paint_size,
                "dtype": recipe.models.dtype, "encoder": encoder.identity}  # fmt: skip
    identity = {"reconstructions of": pictures.digest, "count": len(pictures.entries), "seed": seed,
                "settings": settings}  # fmt: skip
    folder = default_path(workspace, "samples", identity_id("samples", identity, [chosen]))
    orders = [Order(index, entry.prompt or "", seed) for index, entry in enumerate(pictures.entries)]
    with StopFlag() as stop, Draft.open(folder, "samples", identity, [chosen]) as draft:
        if draft.complete:
            draft.complete.check()
            tidy(folder)
            return draft.complete
        log = WorkLog(draft.path)
        missing = [order for order in orders if not log.done(order.index)]

        def check(painted: int = 0) -> None:
            if stop.requested:
                raise stopped(len(orders) - len(missing) + painted, len(orders), draft.path)

        sketches = Sketches(draft.path)
        sketches.make(missing, partial(_encoded, pictures=pictures, encoder=encoder), check)
        del encoder
        forget()
        renderer = None
        with ui.progress(len(missing), "painting again") as bar:
            for done, order in enumerate(missing):
                check(done)
                weights = Placement(place, recipe.generate.offload, recipe.models.weights)
                renderer = renderer or Renderer.load(recipe, chosen, weights, ui)
                pixels_HWC = renderer.paint("", sketches.of(order).latents_PC, order.seed)
                log.add(order.index, {order.name: png_bytes(pixels_HWC, {"reconstruction": "yes"})}, {})
                bar.advance(1)
        write_bytes(draft.path / PROMPTS, _lines(orders, pictures))
        artifact = draft.commit({"settings": settings, "recipe": recipe.model_dump(mode="json")},
                                made={"seed": seed, "device": device}, cost={"samples": len(orders)})  # fmt: skip
    tidy(folder)
    return artifact


@torch.no_grad()
def _encoded(order: Order, pictures: PictureSet, encoder: Encoder) -> Sketch:
    """One at a time: the same picture gives the same bits alone or among others."""
    pixels_BHWC = square(pictures.entries[order.index].load(), encoder.image_size)[None]
    return Sketch(order.prompt, None, False, encoder.encode(pixels_BHWC.copy())[0].float().cpu())


def _lines(orders: list[Order], pictures: PictureSet) -> bytes:
    lines = [{"index": order.index, "file": order.name, "prompt": order.prompt or None, "plan": None,
              "seed": order.seed, "of": pictures.entries[order.index].name} for order in orders]  # fmt: skip
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8")
