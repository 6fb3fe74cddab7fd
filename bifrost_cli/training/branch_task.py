"""One step of the branch's training: rows of a latents store, the frozen MLLM's prompt cache, the branch's loss.

B batch, P patches, C latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bifrost_cli.artifacts.files import make_folder, write_bytes
from bifrost_cli.config.schema import Branch
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.data.png import contact_sheet, png_bytes
from bifrost_cli.models.branch.masking import draw_masks, random_orders, sample_masked
from bifrost_cli.models.branch.visual_branch import VisualBranch
from bifrost_cli.models.mllm.chat_template import clean_caption, join_plan, tokenize_prompts
from bifrost_cli.models.mllm.frozen_mllm import Mllm, PromptCache
from bifrost_cli.models.row_noise import RowSlice
from bifrost_cli.runtime import distributed
from bifrost_cli.stats import as_colours, principal_axes
from bifrost_cli.training.data_order import batch_indices, derive, held_out, micro_seed, uniform

SHOWN, SHOWN_STEPS, SHOWN_PIXELS = 8, 8, 128  # images of a sample grid, their decode steps, pixels a side


@dataclass(frozen=True)
class Batch:
    """Rows of the store, their latents, and the MLLM's cache of their texts.

    `total` rows are drawn together; the `first` of them belong to the processes before this one.
    """

    rows: list[int]
    latents_BPC: Tensor
    prefix: PromptCache
    first: int
    total: int


class BranchTask:
    """A branch trained on a store. Texts and masks are functions of (seed, step, row); the MLLM is only read."""

    def __init__(self, branch: VisualBranch, mllm: Mllm, store: LatentsStore, settings: Branch) -> None:
        self.module: nn.Module = branch
        self._branch, self._mllm, self._store, self._settings = branch, mllm, store, settings
        self.train_rows, self.held_rows = held_out(store.keys, settings.train.validation_rows)
        self._closing = mllm.template.closing()
        self._ids = lru_cache(maxsize=100_000)(mllm.template.ids)

    # ---- a step -----------------------------------------------------------------------------------------------------

    def batch(self, step: int, micro: int) -> Batch:
        train = self._settings.train
        number = step * train.accumulate + micro
        indices = batch_indices(train.seed, number, train.batch_size, len(self.train_rows))
        mine = distributed.share(train.batch_size, "branch.train.batch_size")
        rows = [self.train_rows[index] for index in indices[mine]]
        return self._batch(rows, [self._text(row, number) for row in rows], mine.start, train.batch_size)

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        settings, (count, patches) = self._settings, batch.latents_BPC.shape[:2]
        masked_RP = self._masks(batch.total, patches, generator)  # R: rows of all processes
        tokens_R = masked_RP.sum(1) if settings.loss_on == "masked" else torch.full((batch.total,), patches)
        mine = slice(batch.first, batch.first + count)
        tokens, all_tokens = int(tokens_R[mine].sum()), int(tokens_R.sum())
        loss, metrics = self._branch.loss(
            batch.latents_BPC,
            batch.prefix,
            masked_RP[mine].to(batch.latents_BPC.device),
            loss_on=settings.loss_on,
            generator=RowSlice(generator, int(tokens_R[: batch.first].sum()), all_tokens),
        )
        # The loop takes the mean over processes, which is that over tokens only when each has as many.
        weight = tokens * batch.total / (all_tokens * count)
        return loss * weight, {name: value * weight for name, value in metrics.items()}

    def weights(self, step: int) -> list[float]:
        """How much each micro-batch of a step counts: with `loss_on: masked`, as its number of masked tokens."""
        train, patches = self._settings.train, self._branch.patches
        if self._settings.loss_on != "masked" or train.accumulate == 1:
            return [1.0] * train.accumulate
        counts = []
        for micro in range(train.accumulate):
            generator = torch.Generator().manual_seed(micro_seed(train.seed, step, micro))
            counts.append(int(self._masks(train.batch_size, patches, generator).sum()))
        return [count * len(counts) / sum(counts) for count in counts]

    def _masks(self, rows: int, patches: int, generator: torch.Generator) -> Tensor:
        """masked_RP: drawn first of everything random in a loss."""
        of = self._settings
        return draw_masks(
            rows, patches, generator, mean=of.mask_mean, sd=of.mask_sd, low=of.mask_low, high=of.mask_high
        )

    def keys(self, batch: Batch) -> list[str]:
        return [self._store.keys[row] for row in batch.rows]

    def too_long(self, row: int) -> bool:
        """Whether the row has a text that is cut to `max_text_tokens`."""
        return len(self._ids(self._best_text(row))) > self._settings.max_text_tokens

    # ---- health -----------------------------------------------------------------------------------------------------

    def validate(self) -> dict[str, float]:
        """Loss, cosine and variance on the held-out rows, and the loss with less text and with another row's text.

        A branch that uses its text has a `loss` well below `loss_shuffled`, and a `variance` that nears 1.
        """
        if not self.held_rows:
            return {}
        metrics = self._held("", [self._best_text(row) for row in self.held_rows])
        if self._settings.plan_share:
            metrics |= self._held("_caption", [self._caption(row) for row in self.held_rows])
        if len(self.held_rows) > 1:
            texts = [self._best_text(row) for row in self.held_rows]
            metrics |= self._held("_shuffled", texts[1:] + texts[:1])
        return metrics

    def _held(self, suffix: str, texts: Sequence[str]) -> dict[str, float]:
        size = self._settings.train.batch_size
        total: dict[str, float] = {}
        for start in range(0, len(self.held_rows), size):
            rows = self.held_rows[start : start + size]
            generator = torch.Generator().manual_seed(derive(self._settings.train.seed, "validate", start))
            loss, metrics = self.loss(self._batch(rows, texts[start : start + size]), generator)
            for name, value in {"loss": loss, **({} if suffix else metrics)}.items():
                total[name + suffix] = total.get(name + suffix, 0.0) + float(value) * len(rows) / len(self.held_rows)
        return total

    def samples(self, folder: Path, step: int) -> None:
        """A sheet of held-out latents beside the decoded ones: their first three principal components as colours."""
        rows = self.held_rows[:SHOWN]
        if not rows:
            return
        true = self._batch(rows, [self._best_text(row) for row in rows])
        generator = torch.Generator().manual_seed(derive(self._settings.train.seed, "samples"))
        orders_BP = random_orders(len(rows), self._branch.patches, generator)
        noise_BPC = torch.randn(true.latents_BPC.shape, generator=generator)
        predicted_BPC = sample_masked(
            self._branch, true.prefix, steps=SHOWN_STEPS, orders_BP=orders_BP, noise_BPC=noise_BPC
        )
        sheet = latent_sheet(true.latents_BPC.cpu(), predicted_BPC.cpu(), self._store.grid)
        make_folder(folder)
        write_bytes(folder / f"step-{step:07d}.png", png_bytes(sheet))

    # ---- rows -------------------------------------------------------------------------------------------------------

    def _batch(self, rows: list[int], texts: Sequence[str], first: int = 0, total: int | None = None) -> Batch:
        device = self._branch.mask_token.device
        latents_BPC = torch.from_numpy(self._store.latents(rows)).to(device, torch.float32)
        ids = [self._ids(text) for text in texts]
        length = min(self._settings.max_text_tokens, max(map(len, ids)))
        prefix = self._mllm.encode_prompts(
            tokenize_prompts(ids, length, self._closing, self._mllm.tokenizer.pad_token_id)
        )
        return Batch(rows, latents_BPC, prefix, first, total or len(rows))

    def _text(self, row: int, number: int) -> str:
        settings = self._settings
        if uniform(settings.train.seed, number, row, "drop prompt") < settings.drop_prompt:
            return ""
        if uniform(settings.train.seed, number, row, "plan") < settings.plan_share:
            return self._best_text(row)
        return self._caption(row)

    def _best_text(self, row: int) -> str:
        """Caption and plan, or the caption alone when this training has no plans."""
        plan = self._store.plans[row] if self._settings.plan_share else None
        return join_plan(self._caption(row), plan)

    def _caption(self, row: int) -> str:
        return clean_caption(self._store.captions[row])


def latent_sheet(true_BPC: Tensor, predicted_BPC: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Pairs (true, predicted) as uint8 (H, W, 3): the true latents' first three principal components as colours,
    2 deviations to black and white."""
    true_NC = true_BPC.flatten(0, 1).double()
    mean_C, axes_C3 = principal_axes(true_NC, 3)
    axes = mean_C, axes_C3, ((true_NC - mean_C) @ axes_C3).std(0)
    pixels = [as_colours(side_BPC, *axes).unflatten(1, grid).numpy() for side_BPC in (true_BPC, predicted_BPC)]
    size = max(1, SHOWN_PIXELS // grid[0])
    pairs = [np.concatenate(pair, axis=1) for pair in zip(*pixels, strict=True)]
    return contact_sheet([pair.repeat(size, axis=0).repeat(size, axis=1) for pair in pairs])
