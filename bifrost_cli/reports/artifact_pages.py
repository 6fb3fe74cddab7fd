"""What the page of an artifact shows, by its kind: a training, a latents store, samples; and where it came from.

Comes in: an artifact, checked. Goes out: sections of HTML. Nothing is measured; of models only the VAE is loaded, to
show a store's images.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bifrost_cli.artifacts import Artifact, lineage
from bifrost_cli.config.load import load_recipe
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.image_sets import from_samples
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.data.png import png_bytes, png_pixels
from bifrost_cli.errors import BifrostError
from bifrost_cli.reports import page
from bifrost_cli.reports.evaluation_page import plots
from bifrost_cli.reports.facts import flat, image_lines, lineage_lines, thumbnails
from bifrost_cli.reports.latents_plots import channels, clouds, evenly, histogram, maps
from bifrost_cli.reports.training_curves import health, training_plots
from bifrost_cli.runtime.ui import Ui

ROWS_SHOWN = 24
TRAININGS = ("branch", "controlnet")
FUNNEL = ("seen", "readable", "captioned", "used")


def origin_sections(artifact: Artifact, workspace: Path) -> list[str]:
    """What any artifact's page ends with: settings, lineage with costs, the command, versions."""
    made = artifact.manifest["made"]
    return [
        page.section("Settings", page.facts(settings(artifact))),
        page.lineage(lineage_lines([artifact], workspace)),
        page.section("Made by", page.command(made.get("command", ""))),
        page.section("Made with", page.facts(made.get("versions", {}))),
    ]


def settings(artifact: Artifact) -> dict[str, str]:
    """What an artifact's identity says, one value a line."""
    return {name: str(value) for name, value in flat(artifact.identity)}


# ---- a training -----------------------------------------------------------------------------------------------------


def training_sections(tables: Path, sheets: Path, info: Mapping[str, Any]) -> list[str]:
    """Health, curves and sample grids; `info` is that of the artifact, where it is one."""
    last, warned = health(tables)
    numbers = [page.card(name.replace("_", " "), f"{value:.4g}", [f"at step {last['step']:.0f}"])
               for name, value in last.items() if name != "step"]  # fmt: skip
    found = sorted(sheets.glob("step-*.png")) if sheets.is_dir() else []
    shown = [found[place] for place in evenly(len(found), 6)]
    grids = "".join(f"<h3>{page.text(path.stem)}</h3>{_sheet(path)}" for path in shown)
    if "parameters" in info:
        numbers.append(page.card("trained parameters", f"{info['parameters']:,}", []))
    return [page.cards(numbers), *map(page.note, warned), plots(training_plots({"training": tables})),
            page.section("Sample grids", grids)]  # fmt: skip


def _sheet(path: Path) -> str:
    data = path.read_bytes()
    return page.image(data, png_pixels(data).shape[1], f"sample grid of {path.stem}")


# ---- latents --------------------------------------------------------------------------------------------------------


def latents_sections(artifact: Artifact, device: str, ui: Ui) -> list[str]:
    store, recipe = LatentsStore.open(artifact), load_recipe(str(artifact.path))
    rows = evenly(store.rows, ROWS_SHOWN)
    coloured, decoded = maps(store, rows), _decoded(store, rows, recipe, device, ui)
    entries = [{"name": store.keys[row], "prompt": store.captions[row], "plan": store.plans[row]} for row in rows]
    images = [_beside(*pair) for pair in zip(decoded, coloured, strict=True)]
    named = {entry["name"]: image for entry, image in zip(entries, images, strict=True)}
    shape = "x".join(map(str, (*store.grid, store.channels)))
    stored, encoder = artifact.identity.get("storage", "float16"), store.encoder["name"]
    numbers = [page.card("Rows", f"{store.rows:,}", [f"of {shape} {stored}"]),
               page.card("Mean norm of a token", f"{store.norm:.4g}", [f"encoder {encoder}"])]  # fmt: skip
    seen = decoded[0] is not None
    beside = "An image as the diffusion model's VAE keeps it, beside its patch latents" if seen else "Latents"
    colours = f"{beside}: a token has the colour of its first three principal components, the same in all pictures."
    return [page.cards(numbers), plots([channels(store), histogram(store)]),
            page.section("Funnel", page.facts({name: artifact.info["funnel"][name] for name in FUNNEL})),
            page.section("Counted", page.facts(artifact.info["counts"])),
            page.gallery(entries, named, colours)]  # fmt: skip


@torch.no_grad()
def _decoded(store: LatentsStore, rows: list[int], recipe: Recipe, device: str, ui: Ui) -> list[Any]:
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


def _beside(rgb_HWC: Any, coloured: bytes) -> tuple[bytes, int]:
    map_HWC = png_pixels(coloured)
    if rgb_HWC is None:
        return coloured, map_HWC.shape[1]
    height = rgb_HWC.shape[0]
    scaled = torch.nn.functional.interpolate(torch.from_numpy(map_HWC.copy()).permute(2, 0, 1)[None].float(),
                                             (height, height))[0]  # fmt: skip
    pair = torch.cat([torch.from_numpy(rgb_HWC), scaled.permute(1, 2, 0).byte()], 1)
    return png_bytes(pair.numpy()), 2 * height


# ---- samples --------------------------------------------------------------------------------------------------------


def samples_sections(artifact: Artifact, workspace: Path) -> list[str]:
    images = from_samples(artifact, load_recipe(str(artifact.path)).images)
    shown = thumbnails(images.entries)
    return [plots(lineage_plots(artifact, workspace)), page.gallery(image_lines(images), shown)]


def lineage_plots(samples: Artifact, workspace: Path) -> list[dict[str, Any]]:
    """Of what samples came from, as far as it is here: losses of the trainings, and true beside predicted latents."""
    found = []
    for kind in TRAININGS:
        for artifact in parents_of(samples, kind, workspace):
            (losses, *_) = training_plots({kind: artifact.path}) or [None]
            found += [{**losses, "title": f"Loss of the {kind}'s training"}] if losses else []
    stores = parents_of(samples, "latents", workspace)
    return found + (clouds(stores[0], samples) if stores else [])


def parents_of(artifact: Artifact, kind: str, workspace: Path) -> list[Any]:
    """The latents stores, or other artifacts of a kind, that an artifact was made from and that are here."""
    found = {one.id: one.artifact for one in lineage(artifact, workspace) if one.kind == kind and one.artifact}
    return [LatentsStore.open(one) if kind == "latents" else one for one in found.values()]
