"""train controlnet: copies of a few of the diffusion model's blocks learn to condition it on patch latents.

The diffusion model is hashed before and after and never changed; no image is opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from bifrost_cli.artifacts import Artifact
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.errors import RecipeError
from bifrost_cli.loading.compatibility import check_settings, control_ratio, require_precision, require_vae_latents
from bifrost_cli.loading.fingerprints import diffusion_fingerprint
from bifrost_cli.loading.loaders import ModelLoader, encoder_errors
from bifrost_cli.models.diffusion.base import DiffusionModel, UnsupportedControl
from bifrost_cli.models.encoders import VaeEncoder
from bifrost_cli.runtime.launch import together
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.training.controlnet_task import ControlNetTask
from bifrost_cli.training.data_order import derive
from bifrost_cli.training.training_run import (
    TrainingRun,
    choose_store,
    run_training,
    say_cut,
    shared_identity,
)


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

    Args:
        recipe: its `controlnet` and `models` sections decide the training.
        latents: a latents artifact with VAE latents; None takes the newest of the workspace.
        output: the artifact's folder; None names it by its id in `workspace`.
        resume: "auto", a run folder, or a checkpoint in one.
        device: "auto" or a torch device.
        dry_run: return the plan and write nothing.

    Returns:
        The controlnet artifact, or the plan.

    Raises:
        StoreError: a store without VAE latents, or a damaged one.
        ArtifactError: VAE latents of another diffusion model or size (BF-ART-004), a damaged checkpoint.
        RecipeError, Diverged, Stopped, DiskFull: as `training.loop.fit` and `run_training`.
    """
    ui, settings, models = ui or Ui(), recipe.controlnet, recipe.models
    require_precision("controlnet", settings.train, models)
    store, loader = choose_store(recipe, latents, workspace, ui), ModelLoader(models, device)
    store.vae([0])  # a store without VAE latents is refused before anything is loaded
    diffusion = diffusion_of(recipe, store, loader, ui)
    controlnet = new_control(recipe, store, diffusion, settings.train.seed)
    if settings.train.gradient_checkpointing:
        save_memory(controlnet, diffusion.transformer)  # the gradient passes through the frozen diffusion model, too
    base, small = diffusion_fingerprint(models, diffusion), {}
    loader.policy.settle(*diffusion.frozen_modules(), frozen=diffusion.frozen_modules(but=("vae",)))
    if models.weights != "dtype":
        small = {"weights": models.weights}
    tokens = recipe.models.diffusion_text_tokens
    task = ControlNetTask(controlnet.float(), diffusion, store, settings, tokens)
    say_cut(task.too_long, store, tokens, ui)
    job = TrainingRun(
        kind="controlnet",
        recipe=recipe,
        train=settings.train,
        store=store,
        identity={**shared_identity(store, settings), "painter": base, "painter_tokens": tokens, **small},
        task=task,
        config=diffusion.controlnet_config(controlnet),
        frozen=diffusion.weights_hash,
        frozen_hash=diffusion.weights_hash() if small else base,
        device=loader.device,
    )
    result = run_training(job, output=output, workspace=workspace, resume=resume, dry_run=dry_run, ui=ui)
    if isinstance(result, Artifact):
        ui.say(f"controlnet: {result.path}")
    return result


def diffusion_of(recipe: Recipe, store: LatentsStore, loader: ModelLoader, ui: Ui) -> DiffusionModel:
    """The recipe's diffusion model; the store's VAE latents are its own."""
    diffusion = loader.diffusion()
    check_settings(recipe, diffusion, ui)
    with encoder_errors("images.output_size"):
        vae = VaeEncoder(diffusion.vae, recipe.images.output_size)
    require_vae_latents(store, vae.identity, recipe.name)
    return diffusion


def save_memory(*modules: nn.Module) -> None:
    """Keep only the inputs of layers for the gradient; the small controls have no layers to forget."""
    for module in modules:
        enable: Any = getattr(module, "enable_gradient_checkpointing", None)
        if enable is not None:
            enable()


def new_control(recipe: Recipe, store: LatentsStore, diffusion: DiffusionModel, seed: int) -> nn.Module:
    """The untrained control of the recipe's kind, sized for the store; its new layers drawn from the seed."""
    settings, patches = recipe.controlnet, store.grid[0] * store.grid[1]
    ratio = control_ratio(store, diffusion)
    torch.manual_seed(derive(seed, "init"))
    try:
        if settings.control != "controlnet":
            return diffusion.new_control(settings.control, store.channels, patches, ratio).to(diffusion.device)
        return diffusion.new_controlnet(settings.double_blocks, settings.single_blocks, store.channels, ratio)
    except UnsupportedControl as error:
        fix = f"--set controlnet.{error.key}={error.value}"
        raise RecipeError(f"controlnet.{error.key}: {error}", fix=fix, code="BF-RECIPE-005") from None
