"""train branch with branch.target queries: the branch and a control of the painter, trained together by its loss.

In: the job that `train branch` has prepared. Out: one that trains the control, too, and keeps both in one artifact. It
is the one training that needs the MLLM and the painter at once, and there for comparison with decoupled ones.
"""

from __future__ import annotations

from dataclasses import replace

from bifrost_cli.models.branch import VisualBranch
from bifrost_cli.models.controlnet import controlnet_config
from bifrost_cli.models.mllm import Mllm
from bifrost_cli.stages.bases import painter_hash
from bifrost_cli.stages.controlnet import new_control, painter_of, save_memory
from bifrost_cli.stages.placement import Placement
from bifrost_cli.stages.train import Job
from bifrost_cli.stages.ui import Ui
from bifrost_cli.training.queries import QueriesTask

ENCODER = {"name": "learned queries"}  # in the place of an encoder of pictures, so that no other part fits


def with_control(job: Job, branch: VisualBranch, mllm: Mllm, ui: Ui) -> Job:
    """The job of the untrained branch, with a new control of the recipe's kind, drawn from the branch's seed.

    Errors: those of `train controlnet` for the painter and the store's VAE latents.
    """
    recipe, store = job.recipe, job.store
    store.vae([0])  # a store without VAE latents is refused before the painter is loaded
    painter = painter_of(recipe, store, Placement(job.device), ui)
    control = new_control(recipe, store, painter, job.train.seed).float()
    if job.train.gradient_checkpointing:
        save_memory(control, painter.transformer)
    base, config = painter_hash(recipe.models, painter), controlnet_config(control)
    told = {"config": config, "drop_prompt": recipe.controlnet.drop_prompt}
    of_painter = {"painter": base, "painter_tokens": recipe.generate.painter_tokens, "control": told}
    return replace(
        job,
        identity={**job.identity, "encoder": ENCODER, **of_painter},
        task=QueriesTask(branch, control, mllm, painter, store, recipe),
        config={"branch": job.config, "control": config},
        frozen=lambda: job.frozen() + painter.weights_hash(),
        frozen_hash=job.frozen_hash + base,
    )
