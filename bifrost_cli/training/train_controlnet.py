"""train controlnet: copies of a few of the diffusion model's blocks learn to condition it on patch latents. No image is
opened, and none is decoded but for the sample grids. B batch, P patches, C latent channels, c h w VAE grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from bifrost_cli.artifacts import Artifact
from bifrost_cli.config.schema import ControlNet, Recipe, Train
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.errors import RecipeError
from bifrost_cli.loading.compatibility import check_settings, control_ratio, require_latents, require_precision
from bifrost_cli.loading.loaders import ModelLoader, decisive_files, encoder_errors, fingerprint
from bifrost_cli.models import row_noise
from bifrost_cli.models.diffusion.base import ControlInput, DiffusionModel, UnsupportedControl
from bifrost_cli.models.encoders import VaeEncoder
from bifrost_cli.models.row_noise import NoiseSource, RowSlice
from bifrost_cli.models.transfer import to_device
from bifrost_cli.runtime.launch import together
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.training import training_run
from bifrost_cli.training.compiled import Compiled
from bifrost_cli.training.data_order import derive, uniform
from bifrost_cli.training.training_run import Batch, StoreTask, TrainingRun

SHOWN_STEPS, SHOWN_GUIDANCE, SHOWN_SCALE = 28, 3.5, 0.7  # of a sample grid; the paper's settings (section 4)


@together
def train_controlnet(
    recipe: Recipe, *, latents: Path | str | None = None, output: Path | str | None = None,
    workspace: Path | str = "runs", resume: Path | str = "auto", init: Path | str | None = None, device: str = "auto",
    dry_run: bool = False, ui: Ui | None = None,
) -> Artifact | dict[str, Any]:  # fmt: skip
    """Train the ControlNet of `recipe` on a latents store; the same call continues an interrupted training to the bit.

    Args:
        recipe: its `controlnet` and `models` sections decide the training.
        latents: a latents artifact with VAE latents; the other arguments are as for `train_branch`.

    Returns:
        The controlnet artifact, or the plan.

    Raises:
        ArtifactError: VAE latents of another diffusion model or size (BF-ART-004); StoreError: a store without any.
    """
    ui, settings, models = ui or Ui(), recipe.controlnet, recipe.models
    require_precision("controlnet", settings.train, models)
    store, loader = training_run.choose_store(recipe, latents, workspace, ui), ModelLoader(models, device)
    diffusion, controlnet = load_with_control(recipe, store, loader, settings.train, ui)
    base = fingerprint("diffusion", models, diffusion)
    small = {} if models.weights == "dtype" else {"weights": models.weights}
    loader.policy.settle(*diffusion.frozen_modules(), frozen=diffusion.frozen_modules(but=("vae",)))
    tokens = models.diffusion_text_tokens
    task = ControlNetTask(controlnet.float(), diffusion, store, settings, tokens)
    training_run.say_cut(lambda row: diffusion.too_long(store.captions[row], tokens), store, tokens, ui)
    shared = training_run.shared_identity(store, settings)
    job = TrainingRun(kind="controlnet", recipe=recipe, train=settings.train, store=store,
                      identity={**shared, "painter": base, "painter_tokens": tokens, **small,
                                **decisive_files("diffusion", models)}, task=task,
                      config=diffusion.controlnet_config(controlnet), frozen=diffusion.weights_hash,
                      frozen_hash=diffusion.weights_hash() if small else base, device=loader.device)  # fmt: skip
    result = training_run.run_training(
        job, output=output, workspace=workspace, resume=resume, init=init, dry_run=dry_run, ui=ui
    )
    if isinstance(result, Artifact):
        ui.say(f"controlnet: {result.path}")
    return result


def load_with_control(
    recipe: Recipe, store: LatentsStore, loader: ModelLoader, train: Train, ui: Ui
) -> tuple[DiffusionModel, nn.Module]:
    """The recipe's diffusion model, which must be the store's VAE latents' own, and a new control for it."""
    store.vae([0])  # a store without VAE latents is refused before anything is loaded
    diffusion = loader.diffusion()
    check_settings(recipe, diffusion, ui)
    with encoder_errors("images.output_size"):
        vae = VaeEncoder(diffusion.vae, recipe.images.output_size)
    require_latents(store, recipe.name, vae=vae.identity)
    control = new_control(recipe, store, diffusion, train.seed)
    if train.gradient_checkpointing:  # the gradient passes through the frozen diffusion model, too
        for module in (control, diffusion.transformer):
            getattr(module, "enable_gradient_checkpointing", lambda: None)()  # small controls have no layers to forget
    if train.compile:
        control.forward = Compiled(control.forward, "the control", ui)
        diffusion.transformer.forward = Compiled(diffusion.transformer.forward, "the diffusion model", ui)
    return diffusion, control


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


class ControlNetTask(StoreTask):
    """The flow loss of a frozen diffusion model; dropped texts and noise follow from (seed, step, row)."""

    section = "controlnet"
    arrays = ("latents", "vae")

    def __init__(
        self, control: nn.Module, diffusion: DiffusionModel, store: LatentsStore, settings: ControlNet, max_tokens: int
    ) -> None:
        super().__init__(control, store, settings, diffusion.device)
        self._diffusion, self._max_tokens, self._kept = diffusion, max_tokens, dict[Any, Any]()
        self._std_C = torch.from_numpy(store.std_C).to(diffusion.device)

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        control_BPC, part = batch.latents_BPC, RowSlice(generator, batch.first, batch.total)
        if self._settings.latent_noise and self.module.training:  # a validation is of the true latents
            control_BPC = self._noisy(control_BPC, part)
        return self._diffusion.control_loss(self.module, batch.vae_Bchw, control_BPC, batch.text, part), {}

    def _noisy(self, latents_BPC: Tensor, source: NoiseSource) -> Tensor:
        """Each row gets its own noise level, uniform up to `latent_noise` channel deviations, so that the ControlNet
        tolerates the errors of predicted latents."""
        level_B11 = row_noise.uniform((len(latents_BPC), 1, 1), source) * self._settings.latent_noise
        noise_BPC = to_device(row_noise.normal(latents_BPC.shape, source) * level_B11, latents_BPC.device)
        return latents_BPC + noise_BPC * self._std_C

    def validate(self) -> dict[str, float]:
        """The loss on held-out rows, with no text, and with another row's latents (which must be much higher)."""
        rows = self.held_rows
        captions = [self._store.captions[row] for row in rows]
        metrics = self._held("", captions) | self._held("_no_text", [""] * len(rows))
        return metrics | (self._held("_shuffled", captions, rows[1:] + rows[:1]) if len(rows) > 1 else {})

    def _pairs(self, rows: list[int]) -> Sequence[np.ndarray]:
        text = self._encode([self._store.captions[row] for row in rows], SHOWN_GUIDANCE)
        vae_Bchw, latents_BPC = self._loaded("vae", rows), self._loaded("latents", rows)
        seed = self._settings.train.seed
        return rendered_pairs(self._diffusion, self.module, vae_Bchw, latents_BPC, text, seed)

    def _encode(self, tokens: Sequence[str], guidance: float = 1.0) -> Any:
        """Those of validations and sample grids, the same each time, are kept in main memory."""
        texts, key = tokens, (guidance, *tokens)
        if key in self._kept:
            return send_to_device(self._kept[key], self._diffusion.device)
        text = self._diffusion.embed(texts, self._max_tokens, guidance)
        if not self.module.training:
            self._kept[key] = send_to_device(text, "cpu")
        return text

    def _text(self, row: int, number: int) -> str:
        dropped = uniform(self._settings.train.seed, number, row, "drop prompt") < self._settings.drop_prompt
        return "" if dropped else self._store.captions[row]


def rendered_pairs(
    diffusion: DiffusionModel, control: nn.Module, vae_Bchw: Tensor, control_BPC: Tensor, text: Any, seed: int
) -> Sequence[np.ndarray]:
    """Images (their VAE latents decoded), and those generated from `control_BPC` and `text`."""
    generator = torch.Generator().manual_seed(derive(seed, "samples"))
    pixels = vae_Bchw.shape[-1] * diffusion.factor
    noise_Bchw = torch.cat([diffusion.noise(pixels, generator) for _ in vae_Bchw])
    control_input = ControlInput(control, control_BPC, SHOWN_SCALE)
    made_Bchw = diffusion.denoise(noise_Bchw, text, control=control_input, steps=SHOWN_STEPS, guidance=SHOWN_GUIDANCE)
    return diffusion.decode(vae_Bchw).numpy(), diffusion.decode(made_Bchw).numpy()
