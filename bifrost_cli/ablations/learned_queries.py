"""Learned queries instead of image latents (`branch.target: queries`), after MetaQueries (arXiv 2504.06256). From masks
alone the branch makes P tokens, and only the diffusion model's loss says what they are good for; branch and control are
trained together and kept in one artifact. B batch, P queries, C channels of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.loading.loaders import ModelLoader, decisive_files, fingerprint
from bifrost_cli.models import row_noise
from bifrost_cli.models.branch.visual_branch import VisualBranch
from bifrost_cli.models.diffusion.base import DiffusionModel
from bifrost_cli.models.mllm.frozen_mllm import Mllm, PromptCache
from bifrost_cli.models.row_noise import RowSlice
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.training.train_branch import BranchTask
from bifrost_cli.training.train_controlnet import SHOWN_GUIDANCE, load_with_control, rendered_pairs
from bifrost_cli.training.training_run import Batch, TrainingRun, say_cut

ENCODER = {"name": "learned queries"}  # stands where an image encoder's identity would, so that no other part fits


class LearnedQueries(nn.Module):
    """A branch and the control through which it conditions a diffusion model, trained as one module."""

    def __init__(self, branch: VisualBranch, control: nn.Module) -> None:
        super().__init__()
        self.branch: VisualBranch = branch
        self.control: nn.Module = control

    def forward(self, prefix: PromptCache) -> Tensor:
        """Returns tokens_BPC: what one decode step gives with every patch masked."""
        branch, count, device = self.branch, len(prefix.attention_BT), self.branch.mask_token.device
        masked_BP = torch.ones(count, branch.patches, dtype=torch.bool, device=device)
        return branch(torch.zeros(count, branch.patches, branch.channels, device=device), masked_BP, prefix)


class LearnedQueriesTask(BranchTask):
    """Rows, texts and health are the branch's; the loss is the diffusion model's, which reads captions that are dropped
    as often as in a ControlNet's training. The store's patch latents are never read in a step."""

    arrays = ("vae",)

    def __init__(
        self, branch: VisualBranch, control: nn.Module, mllm: Mllm, diffusion: DiffusionModel, store: LatentsStore,
        recipe: Recipe,
    ) -> None:  # fmt: skip
        super().__init__(branch, mllm, store, recipe.branch)
        self.queries, self._diffusion = LearnedQueries(branch, control), diffusion
        self.module = self.queries
        self._drop_text, self._max_tokens = recipe.controlnet.drop_prompt, recipe.models.diffusion_text_tokens

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        part = RowSlice(generator, batch.first, batch.total)
        dropped_B = row_noise.uniform((len(batch.rows),), part) < self._drop_text
        captions = ["" if drop else self._caption(row) for row, drop in zip(batch.rows, dropped_B, strict=True)]
        with torch.no_grad():
            text = self._diffusion.embed(captions, self._max_tokens)
        tokens_BPC = self.queries(batch.text)
        return self._diffusion.control_loss(self.queries.control, batch.vae_Bchw, tokens_BPC, text, part), {}

    def _pairs(self, rows: list[int]) -> Sequence[np.ndarray]:
        """A held-out image, and what is generated from its text."""
        batch = self._batch(rows, [self._best_text(row) for row in rows])
        tokens_BPC = self.module(batch.text)
        text = self._diffusion.embed([self._caption(row) for row in rows], self._max_tokens, SHOWN_GUIDANCE)
        seed = self._settings.train.seed
        return rendered_pairs(self._diffusion, self.queries.control, batch.vae_Bchw, tokens_BPC, text, seed)


def prepare(run: TrainingRun, branch: VisualBranch, mllm: Mllm, ui: Ui) -> TrainingRun:
    """The training of the branch, with a new control of the recipe's kind drawn from the branch's seed."""
    recipe, store = run.recipe, run.store
    diffusion, control = load_with_control(recipe, store, ModelLoader(recipe.models, run.device), run.train, ui)
    control = control.float()
    base, config = fingerprint("diffusion", recipe.models, diffusion), diffusion.controlnet_config(control)
    conditioner = {"config": config, "drop_prompt": recipe.controlnet.drop_prompt}
    tokens = recipe.models.diffusion_text_tokens
    say_cut(lambda row: diffusion.too_long(store.captions[row], tokens), store, tokens, ui)
    diffusion_identity = {"painter": base, "painter_tokens": tokens, "control": conditioner,
                          **decisive_files("diffusion", recipe.models)}  # fmt: skip
    return replace(
        run,
        identity={**run.identity, "encoder": ENCODER, **diffusion_identity},
        task=LearnedQueriesTask(branch, control, mllm, diffusion, store, recipe),
        config={"branch": run.config, "control": config},
        frozen=lambda: run.frozen() + diffusion.weights_hash(),
        frozen_hash=run.frozen_hash + base,
    )
