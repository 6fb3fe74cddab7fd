"""train branch: a trainable copy of the MLLM's decoder learns to predict patch latents from text. B batch, P patches, C
latent channels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bifrost_cli.artifacts import Artifact
from bifrost_cli.config.schema import Branch, Recipe
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.data.safetensors_io import weights_hash
from bifrost_cli.errors import RecipeError
from bifrost_cli.loading.compatibility import require_latents, require_precision, require_tuning
from bifrost_cli.loading.loaders import ModelLoader, decisive_files, fingerprint
from bifrost_cli.models.branch.masking import draw_masks, random_orders, sample_masked
from bifrost_cli.models.branch.visual_branch import VisualBranch
from bifrost_cli.models.mllm.chat_template import TokenizedPrompts, clean_caption, join_plan, tokenize_prompts
from bifrost_cli.models.mllm.frozen_mllm import Mllm, PromptCache
from bifrost_cli.models.row_noise import RowSlice
from bifrost_cli.runtime.launch import together
from bifrost_cli.runtime.plugins import Plugins
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.stats import as_colours, principal_axes
from bifrost_cli.training import training_run
from bifrost_cli.training.compiled import Compiled
from bifrost_cli.training.data_order import derive, micro_seed, uniform
from bifrost_cli.training.training_run import Batch, StoreTask, TrainingRun

CODEBOOK_ROWS = 4096  # rows of the store that a codebook is made of
SHOWN_STEPS, SHOWN_PIXELS = 8, 128  # of a sample grid's images: decode steps, pixels a side
# Other values of branch.target than latents: a function that changes the prepared run into one for that target.
TARGETS = Plugins("bifrost.branch_targets", {"queries": "bifrost_cli.ablations.learned_queries:prepare"})
# Other values of branch.init than mllm: a function that draws the decoder of a new branch from a seed.
STARTS = Plugins("bifrost.branch_starts", {"random": "bifrost_cli.ablations.random_start:draw_decoder"})


@together
def train_branch(
    recipe: Recipe,
    *,
    latents: Path | str | None = None,
    output: Path | str | None = None,
    workspace: Path | str = "runs",
    resume: Path | str = "auto",
    init: Path | str | None = None,
    device: str = "auto",
    dry_run: bool = False,
    ui: Ui | None = None,
) -> Artifact | dict[str, Any]:
    """Train the branch of `recipe` on a latents store; the same call continues an interrupted training to the bit.

    Args:
        recipe: its `branch`, `models` and `latents` sections decide the training.
        latents: a latents artifact; None takes the newest of the workspace.
        output: the artifact's folder; None names it by its id in `workspace`.
        resume: "auto" continues what the same call left; a run folder, or a checkpoint in one, names it. A finished
            one goes on in a new artifact when the recipe has more steps: to the bit where `train.schedule` kept lr,
            else from its weights, with a new warm-up and schedule for the steps that it lacks.
        init: an artifact whose weights the training begins with, in the place of the MLLM's.
        device: "auto" or a torch device.
        dry_run: return the plan and write nothing.

    Returns:
        The branch artifact, or the plan.

    Raises:
        ArtifactError: the latents are not of the recipe's encoder (BF-ART-004), a damaged store or checkpoint.
        RecipeError, Diverged, Stopped, DiskFull: as `training.loop.fit`.
    """
    ui, settings = ui or Ui(), recipe.branch
    if recipe.models.weights != "dtype":
        raise RecipeError(f"the branch is made of the MLLM's own weights, which {recipe.models.weights} has rounded",
                          fix="--set models.weights=dtype for this training", code="BF-RECIPE-005")  # fmt: skip
    if settings.tune != "full" or settings.target != "latents":
        require_precision("branch", settings.train, recipe.models)
    store, loader = training_run.choose_store(recipe, latents, workspace, ui), ModelLoader(recipe.models, device)
    mllm = loader.mllm()
    encoder = loader.encoder(recipe.latents, recipe.images, mllm=mllm)
    require_latents(store, recipe.name, encoder=encoder.identity)
    require_tuning(settings, mllm.text_config.num_hidden_layers)
    branch = build_branch(recipe, store, mllm)
    if settings.train.gradient_checkpointing:
        branch.enable_gradient_checkpointing()
    if settings.train.compile:
        branch.hidden = Compiled(branch.hidden, "the branch", ui)  # type: ignore[method-assign]
    task = BranchTask(branch, mllm, store, settings)
    training_run.say_cut(task.too_long, store, settings.max_text_tokens, ui)
    identity = {**training_run.shared_identity(store, settings), "mllm": fingerprint("mllm", recipe.models, mllm),
                **decisive_files("mllm", recipe.models)}  # fmt: skip
    job = TrainingRun(kind="branch", recipe=recipe, train=settings.train, store=store, identity=identity, task=task,
                      config=branch.config, frozen=lambda: weights_hash(mllm.model.state_dict()),
                      frozen_hash=identity["mllm"], device=loader.device)  # fmt: skip
    if settings.target != "latents":
        job = TARGETS[settings.target](job, branch, mllm, ui)
    result = training_run.run_training(
        job, output=output, workspace=workspace, resume=resume, init=init, dry_run=dry_run, ui=ui
    )
    if isinstance(result, Artifact):
        metrics = ", ".join(f"{name} {value:.3f}" for name, value in result.info["metrics"].items())
        ui.say(f"branch: {result.path} ({metrics or 'no validation'})")
    return result


def build_branch(recipe: Recipe, store: LatentsStore, mllm: Mllm) -> VisualBranch:
    """The untrained branch: copied from the MLLM, sized for the store, its new layers drawn from the recipe's seed."""
    settings = recipe.branch
    seed = derive(settings.train.seed, "init")
    form = {name: getattr(settings, name) for name in ("head", "codes", "code_levels", "normalize")}
    generator = torch.Generator().manual_seed(seed)
    patches = store.grid[0] * store.grid[1]
    branch = VisualBranch.from_mllm(mllm, patches, store.channels, **form, tune=tuned(recipe), generator=generator)
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


class BranchTask(StoreTask):
    """Its texts and masks are functions of (seed, step, row); the MLLM is only read."""

    section = "branch"

    def __init__(self, branch: VisualBranch, mllm: Mllm, store: LatentsStore, settings: Branch) -> None:
        super().__init__(branch, store, settings, mllm.device)
        self._branch, self._mllm = branch, mllm
        self._closing = mllm.template.closing()
        self._tokenizing = Lock()  # a fast tokenizer has settings that its calls change: one thread at a time
        self._ids = lru_cache(maxsize=100_000)(self._template_ids)

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        settings, (count, patches) = self._settings, batch.latents_BPC.shape[:2]
        masked_RP = self._masks(batch.total, patches, generator)  # R: rows of all processes
        tokens_R = masked_RP.sum(1) if settings.loss_on == "masked" else torch.full((batch.total,), patches)
        mine = slice(batch.first, batch.first + count)
        tokens, all_tokens = int(tokens_R[mine].sum()), int(tokens_R.sum())
        source = RowSlice(generator, int(tokens_R[: batch.first].sum()), all_tokens)
        seen = batch.latents_BPC, batch.text, masked_RP[mine]
        loss, metrics = self._branch.loss(*seen, loss_on=settings.loss_on, generator=source)
        # The loop takes the mean over processes, which is that over tokens only when each has as many.
        weight = tokens * batch.total / (all_tokens * count)
        return loss * weight, {name: value * weight for name, value in metrics.items()}

    def weights(self, step: int) -> list[float]:
        """How much each micro-batch of a step counts: with `loss_on: masked`, as its number of masked tokens."""
        train, patches = self._settings.train, self._branch.patches
        if self._settings.loss_on != "masked" or train.accumulate == 1:
            return [1.0] * train.accumulate
        seeds = (micro_seed(train.seed, step, micro) for micro in range(train.accumulate))
        generators = (torch.Generator().manual_seed(seed) for seed in seeds)
        counts = [int(self._masks(train.batch_size, patches, generator).sum()) for generator in generators]
        return [count * len(counts) / sum(counts) for count in counts]

    def _masks(self, rows: int, patches: int, generator: torch.Generator) -> Tensor:
        """masked_RP: drawn first of everything random in a loss."""
        of = self._settings
        spread = {"mean": of.mask_mean, "sd": of.mask_sd, "low": of.mask_low, "high": of.mask_high}
        return draw_masks(rows, patches, generator, **spread)

    def too_long(self, row: int) -> bool:
        """Whether the row has a text that is cut to `max_text_tokens`."""
        return len(self._ids(self._best_text(row))) > self._settings.max_text_tokens

    def validate(self) -> dict[str, float]:
        """Loss, cosine and variance on the held-out rows, and the loss with less text and with another row's text: a
        branch that uses its text has a `loss` well below `loss_shuffled`, and a `variance` that nears 1."""
        texts = [self._best_text(row) for row in self.held_rows]
        metrics = self._held("", texts)
        if self._settings.plan_share:
            metrics |= self._held("_caption", [self._caption(row) for row in self.held_rows])
        if len(texts) > 1:
            metrics |= self._held("_shuffled", texts[1:] + texts[:1])
        return metrics

    def _pairs(self, rows: list[int]) -> Sequence[np.ndarray]:
        """Held-out latents beside the decoded ones: the true ones' first three principal components as colours, 2
        deviations to black and white."""
        true = self._batch(rows, [self._best_text(row) for row in rows])
        generator = torch.Generator().manual_seed(derive(self._settings.train.seed, "samples"))
        orders_BP = random_orders(len(rows), self._branch.patches, generator)
        noise_BPC = torch.randn(true.latents_BPC.shape, generator=generator)
        options: dict[str, Any] = {"orders_BP": orders_BP, "noise_BPC": noise_BPC, "steps": SHOWN_STEPS}
        predicted_BPC = sample_masked(self._branch, true.text, **options).cpu()
        true_BPC, grid = true.latents_BPC.cpu(), self._store.grid
        true_NC = true_BPC.flatten(0, 1).double()
        mean_C, axes_C3 = principal_axes(true_NC, 3)
        axes, size = (mean_C, axes_C3, ((true_NC - mean_C) @ axes_C3).std(0)), max(1, SHOWN_PIXELS // grid[0])
        pixels = (as_colours(side_BPC, *axes).unflatten(1, grid) for side_BPC in (true_BPC, predicted_BPC))
        return [side.numpy().repeat(size, axis=1).repeat(size, axis=2) for side in pixels]

    def _template_ids(self, text: str) -> list[int]:
        with self._tokenizing:
            return self._mllm.template.ids(text)

    def _tokenize(self, texts: Sequence[str]) -> TokenizedPrompts:
        ids = [self._ids(text) for text in texts]
        length = min(self._settings.max_text_tokens, max(map(len, ids)))
        return tokenize_prompts(ids, length, self._closing, self._mllm.tokenizer.pad_token_id)

    def _encode(self, tokens: TokenizedPrompts) -> PromptCache:
        return self._mllm.encode_prompts(tokens)

    def _text(self, row: int, number: int) -> str:
        settings = self._settings
        if uniform(settings.train.seed, number, row, "drop prompt") < settings.drop_prompt:
            return ""
        planned = uniform(settings.train.seed, number, row, "plan") < settings.plan_share
        return self._best_text(row) if planned else self._caption(row)

    def _best_text(self, row: int) -> str:
        """Caption and plan, or the caption alone when this training has no plans."""
        plan = self._store.plans[row] if self._settings.plan_share else None
        return join_plan(self._caption(row), plan)

    def _caption(self, row: int) -> str:
        return clean_caption(self._store.captions[row])
