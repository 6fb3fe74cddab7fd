"""One step of the latent ControlNet's training: rows of a latents store, the flow loss of a frozen diffusion model.

Images are never decoded to pixels, except for the sample grids.
B batch, P patches, C latent channels, c h w the VAE grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from bifrost_cli.artifacts.files import make_folder, write_bytes
from bifrost_cli.config.schema import ControlNet
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.data.png import contact_sheet, png_bytes
from bifrost_cli.models import row_noise
from bifrost_cli.models.diffusion.base import ControlInput, DiffusionModel
from bifrost_cli.models.row_noise import RowSlice
from bifrost_cli.runtime import distributed
from bifrost_cli.training.data_order import batch_indices, derive, held_out, uniform

SHOWN, SHOWN_STEPS, SHOWN_GUIDANCE, SHOWN_SCALE = 8, 28, 3.5, 0.7  # a sample grid; the paper's settings (section 4)


@dataclass(frozen=True)
class Batch:
    """Rows of the store: patch latents, VAE latents, the diffusion model's encoding of the captions.

    `total` rows are drawn together; the `first` of them belong to the processes before this one.
    """

    rows: list[int]
    latents_BPC: Tensor
    vae_Bchw: Tensor
    text: Any
    first: int
    total: int


class ControlNetTask:
    """A ControlNet trained on a store. Dropped texts and noise follow from (seed, step, row)."""

    def __init__(
        self,
        controlnet: nn.Module,
        diffusion: DiffusionModel,
        store: LatentsStore,
        settings: ControlNet,
        max_tokens: int,
    ) -> None:
        self.module, self._diffusion, self._store, self._settings = controlnet, diffusion, store, settings
        self._max_tokens, self._encoded = max_tokens, dict[Any, Any]()
        self.train_rows, self.held_rows = held_out(store.keys, settings.train.validation_rows)
        self._std_C = torch.from_numpy(store.std_C).to(diffusion.device)

    # ---- a step -----------------------------------------------------------------------------------------------------

    def batch(self, step: int, micro: int) -> Batch:
        train = self._settings.train
        number = step * train.accumulate + micro
        indices = batch_indices(train.seed, number, train.batch_size, len(self.train_rows))
        mine = distributed.share(train.batch_size, "controlnet.train.batch_size")
        rows = [self.train_rows[index] for index in indices[mine]]
        return self._batch(rows, [self._text(row, number) for row in rows], mine.start, train.batch_size)

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        control_BPC, part = batch.latents_BPC, RowSlice(generator, batch.first, batch.total)
        if self._settings.latent_noise:
            control_BPC = self._noisy(control_BPC, part)
        return self._diffusion.control_loss(self.module, batch.vae_Bchw, control_BPC, batch.text, part), {}

    def keys(self, batch: Batch) -> list[str]:
        return [self._store.keys[row] for row in batch.rows]

    def _noisy(self, latents_BPC: Tensor, part: RowSlice) -> Tensor:
        """Each row gets its own noise level, uniform up to `latent_noise` channel deviations, so that the ControlNet
        tolerates the errors of predicted latents."""
        level_B11 = row_noise.uniform((len(latents_BPC), 1, 1), part) * self._settings.latent_noise
        noise_BPC = row_noise.normal(latents_BPC.shape, part) * level_B11
        return latents_BPC + noise_BPC.to(latents_BPC) * self._std_C

    def too_long(self, row: int) -> bool:
        """Whether the diffusion model does not read the row's caption to its end."""
        return self._diffusion.too_long(self._store.captions[row], self._max_tokens)

    # ---- health -----------------------------------------------------------------------------------------------------

    def validate(self) -> dict[str, float]:
        """The loss on held-out rows, with no text, and with another row's latents (which must be much higher)."""
        if not self.held_rows:
            return {}
        captions = [self._store.captions[row] for row in self.held_rows]
        metrics = {
            "loss": self._held(self.held_rows, captions),
            "loss_no_text": self._held(self.held_rows, [""] * len(captions)),
        }
        if len(self.held_rows) > 1:
            metrics["loss_shuffled"] = self._held(self.held_rows[1:] + self.held_rows[:1], captions)
        return metrics

    def _held(self, control_rows: list[int], texts: Sequence[str]) -> float:
        size, total = self._settings.train.batch_size, 0.0
        for start in range(0, len(self.held_rows), size):
            part = slice(start, start + size)
            batch = self._batch(self.held_rows[part], texts[part])
            control_BPC = self._latents(control_rows[part])
            generator = torch.Generator().manual_seed(derive(self._settings.train.seed, "validate", start))
            loss = self._diffusion.control_loss(self.module, batch.vae_Bchw, control_BPC, batch.text, generator)
            total += float(loss) * len(batch.rows) / len(self.held_rows)
        return total

    def samples(self, folder: Path, step: int) -> None:
        """A sheet of pairs: a held-out image (its VAE latents decoded) and what is generated from its patch latents."""
        rows, seed = self.held_rows[:SHOWN], self._settings.train.seed
        if not rows:
            return
        captions = [self._store.captions[row] for row in rows]
        batch, text = self._batch(rows, captions), self._embed(captions, SHOWN_GUIDANCE)
        rendered_sheet(self._diffusion, self.module, batch.vae_Bchw, batch.latents_BPC, text, seed, folder, step)

    # ---- rows -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _batch(self, rows: list[int], texts: Sequence[str], first: int = 0, total: int | None = None) -> Batch:
        options: Any = {"device": self._diffusion.device, "dtype": torch.float32}
        vae_Bchw = torch.from_numpy(self._store.vae(rows)).to(**options)
        return Batch(rows, self._latents(rows), vae_Bchw, self._embed(texts), first, total or len(rows))

    def _embed(self, texts: Sequence[str], guidance: float = 1.0) -> Any:
        """The encoded texts. Those of validations and sample grids, the same each time, are kept in main memory."""
        key = (guidance, *texts)
        if key in self._encoded:
            return send_to_device(self._encoded[key], self._diffusion.device)
        text = self._diffusion.embed(texts, self._max_tokens, guidance)
        if not self.module.training:
            self._encoded[key] = send_to_device(text, "cpu")
        return text

    def _latents(self, rows: list[int]) -> Tensor:
        return torch.from_numpy(self._store.latents(rows)).to(self._diffusion.device, torch.float32)

    def _text(self, row: int, number: int) -> str:
        dropped = uniform(self._settings.train.seed, number, row, "drop prompt") < self._settings.drop_prompt
        return "" if dropped else self._store.captions[row]


def rendered_sheet(
    diffusion: DiffusionModel,
    control: nn.Module,
    vae_Bchw: Tensor,
    control_BPC: Tensor,
    text: Any,
    seed: int,
    folder: Path,
    step: int,
) -> None:
    """`folder`/step-NNNNNNN.png: pairs of an image (its VAE latents decoded) and one generated from `control_BPC`."""
    generator = torch.Generator().manual_seed(derive(seed, "samples"))
    pixels = vae_Bchw.shape[-1] * diffusion.factor
    noise_Bchw = torch.cat([diffusion.noise(pixels, generator) for _ in vae_Bchw])
    control_input = ControlInput(control, control_BPC, SHOWN_SCALE)
    made_Bchw = diffusion.denoise(noise_Bchw, text, control=control_input, steps=SHOWN_STEPS, guidance=SHOWN_GUIDANCE)
    true, made = diffusion.decode(vae_Bchw).numpy(), diffusion.decode(made_Bchw).numpy()
    make_folder(folder)
    sheet = contact_sheet([np.concatenate(pair, axis=1) for pair in zip(true, made, strict=True)])
    write_bytes(folder / f"step-{step:07d}.png", png_bytes(sheet))
