"""train branch with branch.target queries: the branch and a control of the diffusion model, trained together by its loss.

In: the job that `train branch` has prepared. Out: one that trains the control, too, and keeps both in one artifact. It
is the one training that needs the MLLM and the diffusion model at once, and there for comparison with decoupled ones.
"""

from __future__ import annotations

from dataclasses import replace

from bifrost_cli.loading.fingerprints import diffusion_fingerprint
from bifrost_cli.loading.loaders import ModelLoader
from bifrost_cli.models.branch.visual_branch import VisualBranch
from bifrost_cli.models.diffusion.controlnet import controlnet_config
from bifrost_cli.models.mllm.frozen_mllm import Mllm
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.training.queries_task import QueriesTask
from bifrost_cli.training.train_controlnet import diffusion_of, new_control, save_memory
from bifrost_cli.training.training_run import TrainingRun

ENCODER = {"name": "learned queries"}  # in the place of an encoder of images, so that no other part fits


def train_with_conditioner(job: TrainingRun, branch: VisualBranch, mllm: Mllm, ui: Ui) -> TrainingRun:
    """The job of the untrained branch, with a new control of the recipe's kind, drawn from the branch's seed.

    Errors: those of `train controlnet` for the diffusion model and the store's VAE latents.
    """
    recipe, store = job.recipe, job.store
    store.vae([0])  # a store without VAE latents is refused before the diffusion model is loaded
    diffusion = diffusion_of(recipe, store, ModelLoader(recipe.models, job.device), ui)
    control = new_control(recipe, store, diffusion, job.train.seed).float()
    if job.train.gradient_checkpointing:
        save_memory(control, diffusion.transformer)
    base, config = diffusion_fingerprint(recipe.models, diffusion), controlnet_config(control)
    told = {"config": config, "drop_prompt": recipe.controlnet.drop_prompt}
    of_painter = {"painter": base, "painter_tokens": recipe.models.diffusion_text_tokens, "control": told}
    return replace(
        job,
        identity={**job.identity, "encoder": ENCODER, **of_painter},
        task=QueriesTask(branch, control, mllm, diffusion, store, recipe),
        config={"branch": job.config, "control": config},
        frozen=lambda: job.frozen() + diffusion.weights_hash(),
        frozen_hash=job.frozen_hash + base,
    )
