"""What a training of learned queries does in a step: rows of a store, the frozen MLLM's prefix, the diffusion model's loss.

In: a store with VAE latents, a frozen MLLM and a frozen diffusion model, a branch and a control. Out: a `Task` for the loop.
The branch predicts no image's latents: from masks alone it makes P tokens, of which only the diffusion model's loss says what
they are good for (MetaQueries, arXiv 2504.06256, in our parts). It is what patch latents are compared with; the store's
patch latents are never read in a step. Knows no artifact.
B batch, P queries, C channels of one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.models import row_noise
from bifrost_cli.models.branch.visual_branch import VisualBranch
from bifrost_cli.models.diffusion.base import DiffusionModel
from bifrost_cli.models.mllm.frozen_mllm import Mllm, PromptCache
from bifrost_cli.models.row_noise import RowSlice
from bifrost_cli.training.branch_task import SHOWN, Batch, BranchTask
from bifrost_cli.training.controlnet_task import SHOWN_GUIDANCE, rendered_sheet


class Queries(nn.Module):
    """A branch and the control through which a diffusion model hears it, trained as one."""

    def __init__(self, branch: VisualBranch, control: nn.Module) -> None:
        super().__init__()
        self.branch, self.control = branch, control

    def forward(self, prefix: PromptCache) -> Tensor:
        """tokens_BPC: what one decode step gives, with every patch masked."""
        branch, count, device = self.branch, len(prefix.attention_BT), self.branch.mask_token.device
        masked_BP = torch.ones(count, branch.patches, dtype=torch.bool, device=device)
        return branch(torch.zeros(count, branch.patches, branch.channels, device=device), masked_BP, prefix)


class QueriesTask(BranchTask):
    """Rows, texts and health are the branch's, the loss is the diffusion model's; it reads captions, dropped as often as in a
    ControlNet's training."""

    def __init__(
        self,
        branch: VisualBranch,
        control: nn.Module,
        mllm: Mllm,
        diffusion: DiffusionModel,
        store: LatentsStore,
        recipe: Recipe,
    ) -> None:
        super().__init__(branch, mllm, store, recipe.branch)
        self.module, self._diffusion = Queries(branch, control), diffusion
        self._drop_text, self._max_tokens = recipe.controlnet.drop_prompt, recipe.models.diffusion_text_tokens

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        part = RowSlice(generator, batch.first, batch.total)
        dropped_B = row_noise.uniform((len(batch.rows),), part) < self._drop_text
        captions = ["" if drop else self._caption(row) for row, drop in zip(batch.rows, dropped_B, strict=True)]
        with torch.no_grad():
            text = self._diffusion.embed(captions, self._max_tokens)
        tokens_BPC, vae_Bchw = self.module(batch.prefix), self._vae(batch.rows)
        return self._diffusion.control_loss(self.module.control, vae_Bchw, tokens_BPC, text, part), {}

    def samples(self, folder: Path, step: int) -> None:
        """A sheet of pairs: a held-out image (its VAE latents decoded) and what is generated from its text."""
        rows = self.held_rows[:SHOWN]
        if not rows:
            return
        tokens_BPC = self.module(self._batch(rows, [self._best_text(row) for row in rows]).prefix)
        text = self._diffusion.embed([self._caption(row) for row in rows], self._max_tokens, SHOWN_GUIDANCE)
        seed = self._settings.train.seed
        rendered_sheet(self._diffusion, self.module.control, self._vae(rows), tokens_BPC, text, seed, folder, step)

    def _vae(self, rows: list[int]) -> Tensor:
        return torch.from_numpy(self._store.vae(rows)).to(self._diffusion.device, torch.float32)
