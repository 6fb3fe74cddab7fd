"""Both halves of the chain, loaded when they are needed; with `generate.offload`, one after the other.

In: a recipe, a pair, a device, orders. Out: sketches and pictures. Sketches of many orders are kept in the unfinished
folder, so that an interrupted run makes none twice. Does not know how a picture is written or what a samples artifact
is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import load, save

from bifrost_cli.config import Recipe
from bifrost_cli.errors import memory_errors
from bifrost_cli.stages.bases import painter_hash
from bifrost_cli.stages.painting import Renderer, Sketch, Sketcher
from bifrost_cli.stages.pair import Pair, require_base
from bifrost_cli.stages.place import pick_device
from bifrost_cli.stages.placement import Placement, forget
from bifrost_cli.stages.prompts import Order
from bifrost_cli.stages.ui import Ui
from bifrost_cli.stages.worklog import WorkLog


class Studio:
    """`apart` is True when the two halves are never both in memory; `seconds` is the time of each stage so far."""

    def __init__(self, recipe: Recipe, pair: Pair, device: str, ui: Ui) -> None:
        self._recipe, self._pair, self._device, self._ui = recipe, pair, device, ui
        self.apart = recipe.generate.offload != "none"
        self.seconds: Counter[str] = Counter()
        self._sketcher: Sketcher | None = None
        self._renderer: Renderer | None = None
        self._told: str | None = None

    def sketch(self, order: Order) -> Sketch:
        """Patch latents of an order."""
        if self._sketcher is None:
            self._drop()
            if self.apart:  # a painter that does not fit is told of before hours of sketches, not after
                models = self._recipe.models
                require_base(self._pair.controlnet, "painter", models.painter, painter_hash(models))
            self._sketcher = Sketcher.load(self._recipe, self._pair.branch, self._placement())
            self._sketcher.seconds = self.seconds
        with memory_errors(f"sketching {order.name}", self._less()):
            sketch = self._sketcher.sketch(order.prompt, order.seed)
        if sketch.plan is not None and self._told != order.prompt:
            self._ui.say(f"plan {order.index}: {sketch.plan}")
            self._told = order.prompt
        return sketch

    def paint(self, order: Order, sketch: Sketch) -> tuple[np.ndarray, bool]:
        """The picture of a sketch, and whether any model read less than the whole prompt."""
        if self._renderer is None:
            self._drop()
            self._renderer = Renderer.load(self._recipe, self._pair.controlnet, self._placement(), self._ui)
            self._renderer.seconds = self.seconds
        with memory_errors(f"painting {order.name}", self._less()):
            pixels_HWC = self._renderer.paint(order.prompt, sketch.latents_PC, order.seed)
        return pixels_HWC, sketch.cut or self._renderer.cuts(order.prompt)

    def _drop(self) -> None:
        if self.apart:
            self._sketcher = self._renderer = None
            forget()

    def _placement(self) -> Placement:
        return Placement(pick_device(self._device), self._recipe.generate.offload, self._recipe.models.weights)

    def _less(self) -> str:
        offload, weights = self._recipe.generate.offload, self._recipe.models.weights
        stronger = {"none": "model", "model": "sequential"}.get(offload) if weights == "dtype" else None
        if stronger or not self.apart:
            return f"--set generate.offload={stronger or 'model'} (the same bytes)"
        return "--set models.weights=nf4 --set generate.offload=model, or a GPU with more memory"


class Sketches:
    """Sketches of an unfinished samples folder, in its `work`."""

    def __init__(self, folder: Path) -> None:
        self._log, self._folder = WorkLog(folder, "sketches"), folder

    def make(self, orders: Sequence[Order], sketch: Callable[[Order], Sketch], check: Callable[[], None]) -> None:
        """Sketch what is missing; `check` is called before each and may raise to stop."""
        for order in orders:
            if not self._log.done(order.index):
                check()
                made = sketch(order)
                facts = {"plan": made.plan, "cut": made.cut}
                self._log.add(order.index, {self._name(order): latents_bytes(made)}, facts)

    def of(self, order: Order) -> Sketch:
        """The sketch of an order that `make` was given."""
        latents = load((self._folder / self._name(order)).read_bytes())["latents"]
        facts = self._log.facts[order.index]
        return Sketch(order.prompt, facts["plan"], facts["cut"], latents)

    def _name(self, order: Order) -> str:
        return f"work/sketches/{order.index:05d}.safetensors"


def latents_bytes(sketch: Sketch) -> bytes:
    """The patch latents as a safetensors file, exactly."""
    return save({"latents": sketch.latents_PC.contiguous()})
