"""The page of an artifact, by its kind: a training, a latents store, samples; and where it came from.

Nothing is measured; of models only the VAE is loaded, to show a store's images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bifrost_cli.artifacts import Artifact, find, lineage
from bifrost_cli.config.load import load_recipe
from bifrost_cli.data.image_sets import from_samples
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.data.png import GUTTER, png_bytes, png_pixels
from bifrost_cli.errors import BifrostError
from bifrost_cli.reports.page import Card, Cell, Page, Shown, flat, gallery, image_lines, lineage_lines, thumbnails
from bifrost_cli.reports.plots import MAP, channels, clouds, evenly, health, histogram, maps, training_plots
from bifrost_cli.reports.report import TRAININGS
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.training.data_order import held_out

ROWS_SHOWN, STEPS_SHOWN = 24, 4
GRID_ROWS = 8  # held-out rows of a training's sample grid
FUNNEL = ("seen", "readable", "captioned", "used")


def artifact_page(artifact: Artifact, workspace: Path, device: str, ui: Ui) -> Page:
    """The page of a finished artifact; its payload was checked."""
    made = artifact.manifest["made"]
    summary = (
        f"made {made['when'][:16].replace('T', ' ')} UTC, recipe {artifact.info.get('recipe', {}).get('name', '?')}"
    )
    page = Page(
        artifact.id,
        summary,
        lineage=lineage_lines([artifact], workspace),
        commands={"Made by": [made["command"]] if made.get("command") else []},
        folded={"Settings": settings(artifact), "Made with": made.get("versions", {})},
    )
    if artifact.kind in TRAININGS:
        parents = [line.artifact for line in lineage(artifact, workspace)[1:] if line.artifact]
        _add_training(page, artifact.path, artifact.path / "samples", parents, artifact.identity)
        if "parameters" in artifact.info:
            count = artifact.info["parameters"]
            short = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
            page.cards = [*page.cards, Card("trained parameters", short, [f"{count:,}"])]
    elif artifact.kind == "latents":
        _add_latents(page, artifact, device, ui)
    elif artifact.kind == "samples":
        images = from_samples(artifact, load_recipe(str(artifact.path)).images)
        page.gallery = gallery(image_lines(images), thumbnails(images.entries))
        page.plots = lineage_plots(artifact, workspace)
    return page


def unfinished_page(folder: Path, draft: Mapping[str, Any], workspace: Path) -> Page:
    """The page of a training that is still running, or was stopped; `draft` is what its draft.json holds."""
    known = {artifact.id: artifact for place in (folder.parent, workspace) for artifact in find(place, "latents")}
    parents = [known[parent["id"]] for parent in draft.get("parents", ()) if parent["id"] in known]
    page = Page(f"Training of a {draft['kind']}", f"unfinished, in {folder.name}")
    identity = draft.get("identity", {})
    _add_training(page, folder / "work", folder / "work" / "samples", parents, identity)
    page.folded = {"Settings": {name: str(value) for name, value in flat(identity)}}
    return page


def settings(artifact: Artifact) -> dict[str, str]:
    """What an artifact's identity says, one value a line."""
    return {name: str(value) for name, value in flat(artifact.identity)}


# ---- a training -----------------------------------------------------------------------------------------------------


def _add_training(
    page: Page, tables: Path, sheets: Path, parents: Sequence[Artifact], identity: Mapping[str, Any]
) -> None:
    last, page.notes = health(tables)
    page.cards = [Card(name.replace("_", " "), f"{value:.4g}", [f"at step {last['step']:.0f}"])
                  for name, value in last.items() if name != "step"]  # fmt: skip
    page.plots = training_plots({"training": tables})
    page.gallery_title, page.gallery_notes = "Sample grids", ["Held-out rows: true | predicted."]
    paths = sorted(sheets.glob("step-*.png")) if sheets.is_dir() else []
    paths = [paths[-1 - place] for place in evenly(len(paths), STEPS_SHOWN)][::-1]
    count = identity.get("settings", {}).get("train", {}).get("validation_rows", 0)
    try:
        (store,) = (LatentsStore.open(parent) for parent in parents if parent.kind == "latents")
        page.gallery = _held_rows(store, held_out(store.keys, count)[1][:GRID_ROWS], paths)
    except (ValueError, BifrostError):  # the latents, which hold the prompts, are not here any more, or not whole
        sheets_by_step = {path.stem: path.read_bytes() for path in paths}
        page.gallery = [Cell([Shown(sheet, png_pixels(sheet).shape[1])], {"name": step})
                        for step, sheet in sheets_by_step.items()]  # fmt: skip
        page.gallery_wide = True


def _held_rows(store: LatentsStore, rows: Sequence[int], paths: Sequence[Path]) -> list[Cell]:
    """A cell for each held-out row: the true side of its pair, and the predicted side at each step."""
    if not paths:
        return []
    pairs = {int(path.stem.rpartition("-")[2]): _cut(png_pixels(path.read_bytes()), len(rows)) for path in paths}
    cells = []
    for place, row in enumerate(rows):
        sides = {step: np.split(pair[place], 2, axis=1) for step, pair in pairs.items()}
        images = {"true": next(iter(sides.values()))[0]}
        images |= {f"predicted, step {step}": predicted for step, (_, predicted) in sides.items()}
        shown = [Shown(png_bytes(pixels), pixels.shape[1], label) for label, pixels in images.items()]
        cells.append(Cell(shown, {"name": store.keys[row], "prompt": store.captions[row]}))
    return cells


def _cut(sheet_HWC: np.ndarray, count: int) -> list[np.ndarray]:
    """The images of a contact sheet of `count`."""
    columns = math.ceil(math.sqrt(count))
    height = (sheet_HWC.shape[0] - GUTTER) // math.ceil(count / columns)
    width = (sheet_HWC.shape[1] - GUTTER) // columns
    corners = [(GUTTER + place // columns * height, GUTTER + place % columns * width) for place in range(count)]
    return [sheet_HWC[top : top + height - GUTTER, left : left + width - GUTTER] for top, left in corners]


# ---- latents --------------------------------------------------------------------------------------------------------


def _add_latents(page: Page, artifact: Artifact, device: str, ui: Ui) -> None:
    store, recipe = LatentsStore.open(artifact), load_recipe(str(artifact.path))
    rows = evenly(store.rows, ROWS_SHOWN)
    shape = "x".join(map(str, (*store.grid, store.channels)))
    page.cards = [
        Card("Rows", f"{store.rows:,}", [f"of {shape} {artifact.identity.get('storage', 'float16')}"]),
        Card("Mean norm of a token", f"{store.norm:.4g}", [f"encoder {store.encoder['name']}"]),
    ]
    page.gallery_notes = [
        "An image as the diffusion model's VAE keeps it, beside its patch latents." if store.vae_shape else "",
        "A token has the colour of its first three principal components, the same in all images.",
    ]
    for row, rgb, coloured in zip(rows, _decoded(store, rows, recipe, device, ui), maps(store, rows), strict=True):
        entry = {"name": store.keys[row], "prompt": store.captions[row], "plan": store.plans[row]}
        image = [] if rgb is None else [Shown(png_bytes(rgb), rgb.shape[1], "image")]
        page.gallery = [*page.gallery, Cell([*image, Shown(coloured, MAP, "patch latents" if image else "")], entry)]
    page.plots = [channels(store), histogram(store)]
    page.facts = {"Funnel": {name: artifact.info["funnel"][name] for name in FUNNEL}}
    page.folded = {"Counted": artifact.info["counts"], **page.folded}


@torch.no_grad()
def _decoded(store: LatentsStore, rows: list[int], recipe: Any, device: str, ui: Ui) -> list[Any]:
    """The images of rows from their VAE latents, uint8 (H, W, 3); None each where that is not possible here."""
    if store.vae_shape is None:
        return [None] * len(rows)
    from bifrost_cli.loading.loaders import ModelLoader
    from bifrost_cli.models.diffusion.base import vae_decode  # seconds of imports, which other pages do without

    try:
        vae = ModelLoader(recipe.models.model_copy(update={"dtype": "float32"}), device).vae()
    except BifrostError as error:
        ui.say(f"the images are not shown: {error.message}")
        return [None] * len(rows)
    return list(vae_decode(vae, torch.from_numpy(store.vae(rows)).float()).numpy())


# ---- samples --------------------------------------------------------------------------------------------------------


def lineage_plots(samples: Artifact, workspace: Path) -> list[dict[str, Any]]:
    """Of what samples came from, as far as it is here: losses of the trainings, and true beside predicted latents."""
    plots: list[dict[str, Any]] = []
    for kind in TRAININGS:
        for artifact in parents_of(samples, kind, workspace):
            losses = training_plots({kind: artifact.path})[:1]
            plots += [{**plot, "title": f"Loss of the {kind}'s training"} for plot in losses]
    stores = parents_of(samples, "latents", workspace)
    return plots + (clouds(stores[0], samples) if stores else [])


def parents_of(artifact: Artifact, kind: str, workspace: Path) -> list[Any]:
    """The latents stores, or other artifacts of a kind, that an artifact was made from and that are here."""
    ancestors = {line.id: line.artifact for line in lineage(artifact, workspace) if line.kind == kind and line.artifact}
    return [LatentsStore.open(parent) if kind == "latents" else parent for parent in ancestors.values()]
