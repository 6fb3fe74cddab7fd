"""train controlnet: latents -> controlnet. A few of the painter's blocks learn to paint what patch latents say.

In: a recipe and a latents artifact with VAE latents (given, or the newest). Out: a controlnet artifact. The painter is
read and hashed before and after, never changed; no picture is opened. Does not know the MLLM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from bifrost_cli.artifacts import Artifact
from bifrost_cli.artifacts.identity import differences
from bifrost_cli.config import Recipe
from bifrost_cli.data.store import LatentsStore
from bifrost_cli.errors import ArtifactError
from bifrost_cli.models.controlnet import controlnet_config
from bifrost_cli.models.encoders import VaeEncoder
from bifrost_cli.models.painter import Painter
from bifrost_cli.stages.bases import painter_hash
from bifrost_cli.stages.loading import load_painter
from bifrost_cli.stages.painter import check_settings
from bifrost_cli.stages.place import pick_device
from bifrost_cli.stages.placement import Placement
from bifrost_cli.stages.processes import together
from bifrost_cli.stages.train import Job, choose_store, require_precision, run_job, shared_identity
from bifrost_cli.stages.ui import Ui
from bifrost_cli.training.controlnet import ControlNetTask
from bifrost_cli.training.order import derive


@together
def train_controlnet(
    recipe: Recipe,
    *,
    latents: Path | str | None = None,
    output: Path | str | None = None,
    workspace: Path | str = "runs",
    resume: Path | str = "auto",
    device: str = "auto",
    dry_run: bool = False,
    ui: Ui | None = None,
) -> Artifact | dict[str, Any]:
    """Train the ControlNet of `recipe` on a latents store; the same call continues an interrupted training to the bit.

    Returns the controlnet artifact, or with `dry_run` the plan. Errors: StoreError 5 for a store without VAE latents or
    with damage, ArtifactError BF-ART-004 for VAE latents of another painter or size, RecipeError 2, Diverged 7,
    Stopped 75, DiskFull 3.
    """
    ui, settings, models = ui or Ui(), recipe.controlnet, recipe.models
    require_precision("controlnet", settings.train, models)
    store, place = choose_store(recipe, latents, workspace, ui), pick_device(device)
    store.vae([0])  # a store without VAE latents is refused before anything is loaded
    placement = Placement(place, weights=models.weights)
    painter = painter_of(recipe, store, placement, ui)
    controlnet = new_control(recipe, store, painter, settings.train.seed)
    if settings.train.gradient_checkpointing:
        save_memory(controlnet, painter.transformer)  # the gradient passes through the frozen painter, too
    base, small = painter_hash(models, painter), {}
    placement.settle(*painter.frozen_modules(), frozen=painter.frozen_modules(but=("vae",)))
    if models.weights != "dtype":
        small = {"weights": models.weights}
    tokens = recipe.generate.painter_tokens
    job = Job(
        kind="controlnet",
        recipe=recipe,
        train=settings.train,
        store=store,
        identity={**shared_identity(store, settings), "painter": base, "painter_tokens": tokens, **small},
        task=ControlNetTask(controlnet.float(), painter, store, settings, tokens),
        config=controlnet_config(controlnet),
        frozen=painter.weights_hash,
        frozen_hash=painter.weights_hash() if small else base,
        device=place,
    )
    made = run_job(job, output=output, workspace=workspace, resume=resume, dry_run=dry_run, ui=ui)
    if isinstance(made, Artifact):
        ui.say(f"controlnet: {made.path}")
    return made


def painter_of(recipe: Recipe, store: LatentsStore, placement: Placement, ui: Ui) -> Painter:
    """The recipe's painter, loaded to where `placement` says; the store's VAE latents are its own."""
    models = recipe.models
    painter = load_painter(models.painter, placement.home, getattr(torch, models.dtype), revision=models.revision)
    check_settings(recipe, painter, ui)
    _require_painter(recipe, store, painter)
    return painter


def save_memory(*modules: nn.Module) -> None:
    """Keep only the inputs of layers for the gradient; the small controls have no layers to forget."""
    for module in modules:
        if hasattr(module, "enable_gradient_checkpointing"):
            module.enable_gradient_checkpointing()


def new_control(recipe: Recipe, store: LatentsStore, painter: Painter, seed: int) -> nn.Module:
    """The untrained control of the recipe's kind, sized for the store; its new layers drawn from the seed."""
    settings, patches = recipe.controlnet, store.grid[0] * store.grid[1]
    ratio = _ratio(store, painter)
    torch.manual_seed(derive(seed, "init"))
    if settings.control != "controlnet":
        return painter.new_control(settings.control, store.channels, patches, ratio).to(painter.device)
    return painter.new_controlnet(settings.double_blocks, settings.single_blocks, store.channels, ratio)


def _require_painter(recipe: Recipe, store: LatentsStore, painter: Painter) -> None:
    """The VAE latents must be those of this painter, at the recipe's size."""
    now, then = VaeEncoder(painter.vae, recipe.latents.paint_size).identity, store.attributes["painter"]
    if now != then:
        sides = ({"kind": "latents", "parents": [], "identity": side} for side in (then or {}, now))
        raise ArtifactError(
            f"the VAE latents of {store.artifact.path} are not of the painter of recipe {recipe.name}",
            at=differences(*sides),
            fix=f"give the recipe that the store was made with: --recipe {store.artifact.path}, or extract again",
            code="BF-ART-004",
        )


def _ratio(store: LatentsStore, painter: Painter) -> int:
    """Image tokens a side for each patch: 2 in the paper. ArtifactError BF-ART-004 when that is no whole number."""
    (channels, height, width), (rows, columns) = store.vae_shape, store.grid
    ratio = height // (2 * rows)
    if ratio and (channels, height, width) == (painter.latent_channels, 2 * ratio * rows, 2 * ratio * columns):
        return ratio
    raise ArtifactError(
        f"the VAE latents of {store.artifact.path} do not fit its patch latents in this painter",
        at=f"they are {tuple(store.vae_shape)}; a {rows}x{columns} grid needs "
        f"{(painter.latent_channels, 4 * rows, 4 * columns)}, or another whole number of image tokens for each patch",
        fix=f"extract again with --set latents.paint_size={4 * rows * painter.factor}",
        code="BF-ART-004",
    )
