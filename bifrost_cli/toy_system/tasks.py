"""What the bases of a built-in system learn from drawings of its world: VAE, MLLM, open_clip and FLUX.

open_clip is the external encoder of `extract-latents` and the feature network of `eval` in the built-in system.
Legend: B images or rows, H W pixels, c h w the VAE grid, T text tokens, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessor

from bifrost_cli.models.diffusion.flux import FluxModel
from bifrost_cli.toy_system.curricula import Curriculum, Row

NOISE = 0.05  # on the VAE's latents
DROPPED = 0.1  # share of FLUX's rows without their prompt


class VaeTask:
    """L1 + 2 L2 on crowded scenes. No KL term: at this size any weight of it wins and leaves an empty background.

    Latents get a fixed small noise instead, with a penalty on their size; the predicted log-variance is tied to it.
    """

    def __init__(self, vae: Any, curriculum: Curriculum, seed: int, batch_size: int) -> None:
        self.module, self.curriculum, self.seed, self.batch_size = vae.train(), curriculum, seed, batch_size

    def batch(self, step: int, micro: int) -> Tensor:
        return self.curriculum.vae_images(np.random.default_rng((self.seed, step, micro)), self.batch_size, crowded=0.7)

    def loss(self, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        posterior = self.module.encode(batch).latent_dist
        noise_Bchw = torch.randn(posterior.mean.shape, generator=generator)
        rendered_BcHW = self.module.decode(posterior.mean + NOISE * noise_Bchw).sample
        error = rendered_BcHW.float() - batch
        tie = (posterior.logvar - 2 * np.log(NOISE)).square().mean() + posterior.mean.square().mean()
        l1, l2 = error.abs().mean(), error.square().mean()
        return l1 + 2 * l2 + 1e-4 * tie, {"l1": l1.detach(), "l2": l2.detach()}

    def keys(self, batch: Tensor) -> list[str]:
        return [f"{len(batch)} drawings"]


@torch.no_grad()
def measure_scale(vae: Any, curriculum: Curriculum, seed: int, count: int = 512) -> None:
    """Set `shift_factor` and `scaling_factor` so that FLUX sees latents of mean 0 and standard deviation 1."""
    vae.eval()
    pixels_BcHW = curriculum.vae_images(np.random.default_rng((seed, 1)), count, crowded=0.0)
    latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in pixels_BcHW.split(64)])
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 6), scaling_factor=round(1 / latents.std().item(), 6)
    )


@dataclass
class MllmTask:
    """Next-word loss on the answers of all rows (see `Curriculum`), plus half the probe's loss on the images.

    Beside the language loss, a throw-away probe reads the visual tokens, which keeps shape and place in the latents; a
    caption loss alone loses them with depth.
    """

    mllm: Any
    tokenizer: Qwen2Tokenizer
    processor: Qwen2VLImageProcessor
    curriculum: Curriculum
    instruction: str
    seed: int
    batch_size: int

    def __post_init__(self) -> None:
        self.probe = self.curriculum.probe(self.mllm.config.text_config.hidden_size)
        self.module = nn.ModuleDict({"mllm": self.mllm.train(), "probe": self.probe})

    def batch(self, step: int, micro: int) -> dict[str, Any]:
        """Rows by kind, each kind padded apart, and the images of the last."""
        rng = np.random.default_rng((self.seed, step, micro))
        batch: dict[str, Any] = {}
        for kind, eighths in self.curriculum.eighths.items():
            rows, scenes = [], []
            for _ in range(eighths * (self.batch_size // 8)):
                prompt, scene = self.curriculum.sample(rng)
                scenes.append(scene)
                rows.append(self.curriculum.row(kind, rng, prompt, scene, self.instruction))
            batch[kind] = self.encode(rows)
        drawn = self.curriculum.drawn(scenes)
        pixels = self.processor(images=list(drawn.permute(0, 3, 1, 2)), do_resize=False, return_tensors="pt")
        return {**batch, "pixels": pixels, "scenes": scenes, "drawn": drawn}

    def encode(self, rows: list[Row]) -> dict[str, Tensor]:
        """Rows -> ids, attention and learnt (all (B, T)): learnt is True at the answer's words."""
        questions = self.tokenizer([row[0] for row in rows], add_special_tokens=False).input_ids
        answers = self.tokenizer([row[1] + "<|im_end|>" for row in rows], add_special_tokens=False).input_ids
        length = max(len(a) + len(b) for a, b in zip(questions, answers, strict=True))
        ids_BT = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        attention_BT = torch.zeros(len(rows), length, dtype=torch.long)
        learnt_BT = torch.zeros(len(rows), length, dtype=torch.bool)
        for index, (first, second, (_, _, given)) in enumerate(zip(questions, answers, rows, strict=True)):
            start, stop = len(first), len(first) + len(second)
            ids_BT[index, :stop] = torch.tensor(first + second)
            attention_BT[index, :stop] = 1
            learnt_BT[index, start:stop] = True
            if given:  # the cells come in random order: only what they hold can be learnt
                learnt_BT[index, start:stop:2] = False
        return {"ids": ids_BT, "attention": attention_BT, "learnt": learnt_BT}

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and for the log each kind's loss and share of right words."""
        grid = batch["pixels"].image_grid_thw
        visual = self.mllm.model.visual(batch["pixels"].pixel_values, grid_thw=grid).pooler_output
        probe, probed = self.probe.loss(visual.unflatten(0, (len(grid), -1)), batch["scenes"], batch["drawn"])
        losses, right = {}, {}
        for kind in self.curriculum.eighths:
            image = (visual, grid) if kind == "look" else None
            losses[kind], right[f"{kind}_right"] = self._answer_loss(batch[kind], image)
        metrics = {**losses, **right, **probed}
        loss = losses["plan"] + losses["fill"] + 0.5 * losses["look"] + 0.5 * probe
        return loss, {name: value.detach() for name, value in metrics.items()}

    def _answer_loss(self, rows: dict[str, Tensor], image: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        model = self.mllm.model
        embeds_BTD = model.get_input_embeddings()(rows["ids"])
        positions = None
        if image:
            visual_ND, grid_B3 = image
            image_BT = rows["ids"] == model.config.image_token_id
            embeds_BTD = embeds_BTD.masked_scatter(image_BT[..., None], visual_ND)
            positions, _ = model.get_rope_index(
                rows["ids"], image_BT.int(), image_grid_thw=grid_B3, attention_mask=rows["attention"]
            )
        hidden_BTD = model.language_model(
            inputs_embeds=embeds_BTD, attention_mask=rows["attention"], position_ids=positions, use_cache=False
        ).last_hidden_state
        learnt = rows["learnt"][:, 1:]
        logits = self.mllm.lm_head(hidden_BTD[:, :-1][learnt]).float()
        targets = rows["ids"][:, 1:][learnt]
        return nn.functional.cross_entropy(logits, targets), (logits.argmax(-1) == targets).float().mean()

    def keys(self, batch: dict[str, Any]) -> list[str]:
        return self.tokenizer.batch_decode(batch["plan"]["ids"])


@dataclass
class OpenClipTask:
    """CLIP's symmetric cross-entropy between drawings and sentences that name everything in them."""

    module: nn.Module
    tokenize: Callable[[list[str]], Tensor]
    card: dict[str, Any]  # with the mean and the std of its images
    curriculum: Curriculum
    seed: int
    batch_size: int

    def batch(self, step: int, micro: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, step, micro))
        scenes = [self.curriculum.sample(rng)[1] for _ in range(self.batch_size)]
        texts = [self.curriculum.sentence(rng, scene) for scene in scenes]
        pixels = self.curriculum.drawn(scenes).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(self.card[name]).view(3, 1, 1) for name in ("mean", "std"))
        return {"pixels": (pixels - mean) / std, "ids": self.tokenize(texts), "texts": texts}

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        image_BD, text_BD, scale = self.module(batch["pixels"], batch["ids"])
        logits_BB = scale.clamp(max=100) * image_BD @ text_BD.mT
        target_B = torch.arange(len(logits_BB))
        cross = nn.functional.cross_entropy
        right = (logits_BB.argmax(1) == target_B).float().mean()
        return (cross(logits_BB, target_B) + cross(logits_BB.mT, target_B)) / 2, {"right": right}

    def keys(self, batch: dict[str, Any]) -> list[str]:
        return list(batch["texts"])


class FluxTask:
    """Flow matching (`FluxModel.base_loss`) of the transformer and both text encoders, to generate from text alone.

    A pool of drawings is encoded once, at the start.
    """

    def __init__(
        self, diffusion: FluxModel, curriculum: Curriculum, max_tokens: int, seed: int, batch_size: int, pool: int
    ) -> None:
        self.diffusion, self.seed, self.batch_size = diffusion, seed, batch_size
        trained: dict[str, Any] = {
            name: getattr(diffusion, name) for name in ("transformer", "text_encoder", "text_encoder_2")
        }
        self.module = nn.ModuleDict(trained).requires_grad_(True)
        rng = np.random.default_rng((seed, 0))
        texts: list[str] = []
        latents = []
        for start in range(0, pool, 64):
            samples = [curriculum.sample(rng) for _ in range(min(64, pool - start))]
            texts += [prompt.text for prompt, _ in samples]
            latents.append(diffusion.encode(curriculum.drawn(scene for _, scene in samples)).half())
        self.latents_Nchw = torch.cat(latents)
        self.clip_NT, self.t5_NT = diffusion.tokenize(texts, max_tokens)
        self.no_clip_1T, self.no_t5_1T = diffusion.tokenize([""], max_tokens)

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.seed, 1, step, micro))
        rows = torch.from_numpy(rng.integers(len(self.latents_Nchw), size=self.batch_size))
        dropped_B1 = torch.from_numpy(rng.random((self.batch_size, 1)) < DROPPED)
        return {
            "latents": self.latents_Nchw[rows].float(),
            "clip": torch.where(dropped_B1, self.no_clip_1T, self.clip_NT[rows]),
            "t5": torch.where(dropped_B1, self.no_t5_1T, self.t5_NT[rows]),
        }

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        text = self.diffusion.embed_ids(batch["clip"], batch["t5"])
        return self.diffusion.base_loss(batch["latents"], text.sequence_BTD, text.pooled_BD, generator), {}

    def keys(self, batch: dict[str, Tensor]) -> list[str]:
        return self.diffusion.tokenizer_2.batch_decode(batch["t5"], skip_special_tokens=True)
