"""train branch: a trainable copy of the MLLM's decoder learns to predict patch latents from text.

The MLLM is hashed before and after and never changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bifrost_cli.artifacts import Artifact
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.data.safetensors_io import weights_hash
from bifrost_cli.errors import RecipeError
from bifrost_cli.loading.compatibility import require_latents_of, require_precision, require_tuning
from bifrost_cli.loading.fingerprints import mllm_fingerprint
from bifrost_cli.loading.loaders import ModelLoader
from bifrost_cli.models.branch.visual_branch import VisualBranch
from bifrost_cli.models.mllm.frozen_mllm import Mllm
from bifrost_cli.runtime.launch import together
from bifrost_cli.runtime.plugins import plugins
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.training.branch_task import BranchTask
from bifrost_cli.training.data_order import derive
from bifrost_cli.training.training_run import (
    TrainingRun,
    choose_store,
    run_training,
    say_cut,
    shared_identity,
)

CODEBOOK_ROWS = 4096  # rows of the store that a codebook is made of
# Other values of branch.target than latents: a function that changes the prepared run into one for that target.
TARGETS = plugins("bifrost.branch_targets", {"queries": "bifrost_cli.ablations.learned_queries:prepare"})
# Other values of branch.init than mllm: a function that draws the decoder of a new branch from a seed.
STARTS = plugins("bifrost.branch_starts", {"random": "bifrost_cli.ablations.random_start:draw_decoder"})


@together
def train_branch(
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
    """Train the branch of `recipe` on a latents store; the same call continues an interrupted training to the bit.

    Args:
        recipe: its `branch`, `models` and `latents` sections decide the training.
        latents: a latents artifact; None takes the newest of the workspace.
        output: the artifact's folder; None names it by its id in `workspace`.
        resume: "auto", a run folder, or a checkpoint in one.
        device: "auto" or a torch device.
        dry_run: return the plan and write nothing.

    Returns:
        The branch artifact, or the plan.

    Raises:
        ArtifactError: the latents are not of the recipe's encoder (BF-ART-004), a damaged store or checkpoint.
        RecipeError, Diverged, Stopped, DiskFull: as `training.loop.fit` and `run_training`.
    """
    ui, settings = ui or Ui(), recipe.branch
    if recipe.models.weights != "dtype":
        raise RecipeError(f"the branch is made of the MLLM's own weights, which {recipe.models.weights} has rounded",
                          fix="--set models.weights=dtype for this training", code="BF-RECIPE-005")  # fmt: skip
    if settings.tune != "full" or settings.target != "latents":
        require_precision("branch", settings.train, recipe.models)
    store, loader = choose_store(recipe, latents, workspace, ui), ModelLoader(recipe.models, device)
    mllm = loader.mllm()
    encoder = loader.encoder(recipe.latents, recipe.images, mllm=mllm)
    require_latents_of(store, encoder.identity, recipe.name)
    require_tuning(settings, mllm.text_config.num_hidden_layers)
    branch = build_branch(recipe, store, mllm)
    if settings.train.gradient_checkpointing:
        branch.enable_gradient_checkpointing()
    task = BranchTask(branch, mllm, store, settings)
    say_cut(task.too_long, store, settings.max_text_tokens, ui)
    identity = {**shared_identity(store, settings), "mllm": mllm_fingerprint(recipe.models, mllm)}
    job = TrainingRun(
        kind="branch",
        recipe=recipe,
        train=settings.train,
        store=store,
        identity=identity,
        task=task,
        config=branch.config,
        frozen=lambda: weights_hash(mllm.model.state_dict()),
        frozen_hash=identity["mllm"],
        device=loader.device,
    )
    if settings.target != "latents":
        job = TARGETS[settings.target](job, branch, mllm, ui)
    result = run_training(job, output=output, workspace=workspace, resume=resume, dry_run=dry_run, ui=ui)
    if isinstance(result, Artifact):
        ui.say(f"branch: {result.path} ({_health(result)})")
    return result


def build_branch(recipe: Recipe, store: LatentsStore, mllm: Mllm) -> VisualBranch:
    """The untrained branch: copied from the MLLM, sized for the store, its new layers drawn from the recipe's seed."""
    settings = recipe.branch
    seed = derive(settings.train.seed, "init")
    branch = VisualBranch.from_mllm(
        mllm,
        store.grid[0] * store.grid[1],
        store.channels,
        head=settings.head,
        codes=settings.codes,
        normalize=settings.normalize,
        tune=tuned(recipe),
        generator=torch.Generator().manual_seed(seed),
    )
    if settings.init != "mllm":
        STARTS[settings.init](branch, seed)
    if settings.normalize:
        branch.set_statistics(torch.from_numpy(store.mean_C), torch.from_numpy(store.std_C))
    if settings.head == "codebook":
        rows = range(0, len(store.keys), -(-len(store.keys) // CODEBOOK_ROWS))
        latents_NC = torch.from_numpy(store.latents(list(rows))).flatten(0, 1).to(branch.mask_token.device)
        try:
            branch.vision_head.fit(branch.to_decoder(latents_NC), derive(settings.train.seed, "codes") % 2**32)
        except ValueError as error:
            raise RecipeError(f"branch.codes: {error}", fix="set fewer", code="BF-RECIPE-005") from None
    return branch


def tuned(recipe: Recipe) -> dict[str, Any] | None:
    """`branch.tune` as the branch takes it: None trains everything."""
    settings = recipe.branch
    return {"full": None, "layers": {"layers": settings.layers}, "lora": {"rank": settings.lora_rank}}[settings.tune]


def _health(artifact: Artifact) -> str:
    metrics = artifact.info["metrics"]
    return ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()) or "no validation"
