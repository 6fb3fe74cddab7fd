"""The page of an artifact, by its kind: a training, a latents store, samples; and where it came from.

Nothing is measured; of models only the VAE is loaded, to show a store's images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from bifrost_cli.artifacts import Artifact, find, lineage
from bifrost_cli.artifacts.identity import leaves
from bifrost_cli.config.load import load_recipe
from bifrost_cli.data.image_sets import from_samples
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.data.png import GUTTER, png_bytes, png_pixels
from bifrost_cli.errors import ArtifactError, BifrostError, StoreError, public
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
    made, recipe = artifact.manifest["made"], artifact.info.get("recipe", {}).get("name", "?")
    page = Page(
        artifact.id,
        f"made {made.get('when', '')[:16].replace('T', ' ')} UTC, recipe {recipe}",
        lineage=lineage_lines([artifact], workspace),
        commands={"Made by": [public(made["command"])] if made.get("command") else []},
        folded={"Settings": _settings(artifact.identity), "Made with": made.get("versions", {})},
    )
    if artifact.kind in TRAININGS:
        parents = [line.artifact for line in lineage(artifact, workspace)[1:] if line.artifact]
        _add_training(page, artifact.path, artifact.path / "samples", parents, artifact.identity)
        if count := artifact.info.get("parameters"):
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
    identity = draft.get("identity", {})
    page = Page(f"Training of a {draft['kind']}", f"unfinished: {draft['id']}")
    page.folded = {"Settings": _settings(identity)}
    _add_training(page, folder / "work", folder / "work" / "samples", parents, identity)
    return page


def _settings(identity: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in flat(identity)}


def _add_training(
    page: Page, tables: Path, sheets: Path, parents: Sequence[Artifact], identity: Mapping[str, Any]
) -> None:
    last, page.notes = health(tables)
    page.cards = [Card(name.replace("_", " "), f"{value:.4g}", [f"at step {last['step']:.0f}"])
                  for name, value in last.items() if name != "step"]  # fmt: skip
    page.plots = training_plots({"training": tables})
    page.gallery_title, page.gallery_notes = "Sample grids", ["Held-out rows: true | predicted."]
    paths = sorted(sheets.glob("step-*.png")) if sheets.is_dir() else []
    grids = {path.stem: path.read_bytes()
             for path in (paths[-1 - place] for place in evenly(len(paths), STEPS_SHOWN)[::-1])}  # fmt: skip
    count = dict(leaves(identity)).get("settings.train.validation_rows", 0)
    try:
        (store,) = (LatentsStore.open(parent) for parent in parents if parent.kind == "latents")
        page.gallery = _held_rows(store, held_out(store.keys, count)[1][:GRID_ROWS], grids)
    except (ValueError, TypeError, IndexError, BifrostError):  # the latents hold the prompts: gone, or not whole
        page.gallery = [Cell([Shown(grid, png_pixels(grid).shape[1])], {"name": step}) for step, grid in grids.items()]
        page.gallery_wide = True


def _held_rows(store: LatentsStore, rows: Sequence[int], grids: Mapping[str, bytes]) -> list[Cell]:
    """A cell for each held-out row, cut out of the contact sheets: the true side of its pair, and the predicted side at
    each step."""
    images: list[dict[str, np.ndarray]] = [{} for _ in rows]
    for step, png in grids.items():
        grid_HWC, columns = png_pixels(png), math.ceil(math.sqrt(len(rows)))
        height = (grid_HWC.shape[0] - GUTTER) // math.ceil(len(rows) / columns)
        width = (grid_HWC.shape[1] - GUTTER) // columns
        for place, shown in enumerate(images):
            top, left = GUTTER + place // columns * height, GUTTER + place % columns * width
            pair_HWC = grid_HWC[top : top + height - GUTTER, left : left + width - GUTTER]
            true, predicted = np.split(pair_HWC, 2, axis=1)
            shown.setdefault("true", true)
            shown[f"predicted, step {int(step.rpartition('-')[2])}"] = predicted
    return [
        Cell([Shown(png_bytes(pixels), pixels.shape[1], label) for label, pixels in shown.items()],
             {"name": store.keys[row], "prompt": store.captions[row]})
        for row, shown in zip(rows, images, strict=True) if shown
    ]  # fmt: skip


def _add_latents(page: Page, artifact: Artifact, device: str, ui: Ui) -> None:
    store = LatentsStore.open(artifact)
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
    cells = []
    for row, rgb, coloured in zip(rows, _decoded(store, rows, artifact, device, ui), maps(store, rows), strict=True):
        entry = {"name": store.keys[row], "prompt": store.captions[row], "plan": store.plans[row]}
        image = [] if rgb is None else [Shown(png_bytes(rgb), rgb.shape[1], "image")]
        cells.append(Cell([*image, Shown(coloured, MAP, "patch latents" if image else "")], entry))
    page.gallery, page.plots = cells, [channels(store), histogram(store)]
    page.facts = {"Funnel": {name: artifact.info.get("funnel", {}).get(name, "?") for name in FUNNEL}}
    page.folded = {"Counted": artifact.info.get("counts", {}), **page.folded}


def _decoded(store: LatentsStore, rows: list[int], artifact: Artifact, device: str, ui: Ui) -> list[Any]:
    """The images of rows from their VAE latents, uint8 (H, W, 3); None each where that is not possible here."""
    models = load_recipe(str(artifact.path)).models.model_copy(update={"dtype": "float32"})
    if store.vae_shape is None:
        return [None] * len(rows)
    import torch  # seconds of imports, which other pages do without

    from bifrost_cli.loading.loaders import ModelLoader
    from bifrost_cli.models.diffusion.base import vae_decode

    try:
        vae = ModelLoader(models, device).vae()
    except BifrostError as error:
        ui.say(f"the images are not shown: {error.message}")
        return [None] * len(rows)
    with torch.no_grad():
        return list(vae_decode(vae, torch.from_numpy(store.vae(rows)).float()).numpy())


def lineage_plots(samples: Artifact, workspace: Path) -> list[dict[str, Any]]:
    """Of what samples came from, as far as it is here: losses of the trainings, and true beside predicted latents."""
    plots: list[dict[str, Any]] = []
    for kind in TRAININGS:
        for artifact in parents_of(samples, kind, workspace):
            with suppress(ArtifactError):
                drawn = training_plots({kind: artifact.path})[:1]
                plots += [{**plot, "title": f"Loss of the {kind}'s training"} for plot in drawn]
    for store in parents_of(samples, "latents", workspace)[:1]:
        with suppress(StoreError):  # it was damaged, or emptied to save room
            plots += clouds(LatentsStore.open(store), samples)
    return plots


def parents_of(artifact: Artifact, kind: str, workspace: Path) -> list[Artifact]:
    """The artifacts of a kind that an artifact was made from and that are here."""
    ancestors = {line.id: line.artifact for line in lineage(artifact, workspace) if line.kind == kind and line.artifact}
    return list(ancestors.values())
