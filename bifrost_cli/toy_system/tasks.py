"""What the bases of the built-in system learn from drawings of the shapes world: VAE, MLLM, open_clip and FLUX.

open_clip is the external encoder of `extract-latents` and the feature network of `eval` in the built-in system.
Legend: B images or rows, H W pixels, c h w the VAE grid, T text tokens, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessor

from bifrost_cli.models.diffusion.flux import FluxModel
from bifrost_cli.models.mllm.chat_template import chat_text, join_plan, user_turn
from bifrost_cli.shapes import words
from bifrost_cli.shapes.captions import Prompt, sample_prompt, sample_scene
from bifrost_cli.shapes.draw import crowded_scene, draw
from bifrost_cli.shapes.scene import TONES, Scene

NOISE = 0.05  # on the VAE's latents
FILL_QUESTION = "What is in these cells?"
EIGHTHS = {"plan": 3, "fill": 3, "look": 2}  # of the MLLM's batch
Row = tuple[str, str, bool]  # question, answer, whether every other word of the answer is given
DROPPED = 0.1  # share of FLUX's rows without their prompt


def drawn(scenes: Iterable[Scene]) -> Tensor:
    """The scenes as images, uint8 (B, H, W, 3)."""
    return torch.from_numpy(np.stack([draw(scene) for scene in scenes]))


def _vae_images(rng: np.random.Generator, count: int, crowded: float) -> Tensor:
    """`count` drawings (B, 3, H, W) in -1 to 1, of which a share `crowded` have a thing in most cells."""
    scenes = [
        crowded_scene(rng) if rng.random() < crowded else sample_scene(rng, sample_prompt(rng)) for _ in range(count)
    ]
    return drawn(scenes).permute(0, 3, 1, 2).float() / 127.5 - 1


class VaeTask:
    """L1 + 2 L2 on crowded scenes. No KL term: at this size any weight of it wins and leaves an empty background.

    Latents get a fixed small noise instead, with a penalty on their size; the predicted log-variance is tied to it.
    """

    def __init__(self, vae: Any, seed: int, batch_size: int) -> None:
        self.module, self.seed, self.batch_size = vae.train(), seed, batch_size

    def batch(self, step: int, micro: int) -> Tensor:
        return _vae_images(np.random.default_rng((self.seed, step, micro)), self.batch_size, crowded=0.7)

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
def measure_scale(vae: Any, seed: int, count: int = 512) -> None:
    """Set `shift_factor` and `scaling_factor` so that FLUX sees latents of mean 0 and standard deviation 1."""
    vae.eval()
    pixels_BcHW = _vae_images(np.random.default_rng((seed, 1)), count, crowded=0.0)
    latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in pixels_BcHW.split(64)])
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 6), scaling_factor=round(1 / latents.std().item(), 6)
    )


class Probe(nn.Module):
    """Reads thing (31 classes), tone (3) and offset (2, in pixels) from visual tokens (B, P, D). Not shipped."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [len(words.THING_WORDS) + 1, len(TONES), 2]
        self.head = nn.Linear(width, sum(self.sizes))

    def loss(self, latents_BPD: Tensor, scenes: list[Scene]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of thing and tone plus squared error of the offsets where there is a thing; and accuracy."""
        thing_BPK, tone_BPK, offset_BP2 = self.head(latents_BPD).split(self.sizes, dim=-1)
        classes_BP = torch.from_numpy(np.stack([words.cell_classes(scene) for scene in scenes]))
        tones_BP = torch.tensor([list(TONES).index(scene.tone) for scene in scenes])[:, None].expand_as(classes_BP)
        true_BP2 = torch.zeros(*classes_BP.shape, 2)
        for index, scene in enumerate(scenes):
            for thing in scene.things:
                true_BP2[index, thing.cell] = torch.tensor([thing.dx, thing.dy], dtype=torch.float32)
        error = (offset_BP2 - true_BP2).square().sum(-1)
        loss = nn.functional.cross_entropy(thing_BPK.flatten(0, 1), classes_BP.flatten())
        loss = loss + 0.2 * nn.functional.cross_entropy(tone_BPK.flatten(0, 1), tones_BP.flatten())
        right = (thing_BPK.argmax(-1) == classes_BP)[classes_BP > 0].float().mean()
        return loss + 0.1 * error[classes_BP > 0].mean(), right


@dataclass
class MllmTask:
    """Next-word loss on the answers of all rows, plus half the probe's loss on the images.

    Three kinds of rows share every batch:

    * plan: the planning instruction of `generate --plan`, answered with a plan;
    * fill: the image prompt the branch will read, answered in words with what each cell holds, cells in random order
      (so that the prompt's keys and values can be looked up by place, which is what the branch does with them);
    * look: an image and a question about it, or the cells' words.

    Beside the language loss, a throw-away probe reads each visual token's cell (thing, offset, tone), which keeps shape
    and place in the latents; a caption loss alone loses them with depth.
    """

    mllm: Any
    tokenizer: Qwen2Tokenizer
    processor: Qwen2VLImageProcessor
    instruction: str
    seed: int
    batch_size: int

    def __post_init__(self) -> None:
        self.probe = Probe(self.mllm.config.text_config.hidden_size)
        self.module = nn.ModuleDict({"mllm": self.mllm.train(), "probe": self.probe})

    def row(self, kind: str, rng: np.random.Generator, prompt: Prompt, scene: Scene) -> Row:
        plan = words.write_plan(scene, prompt)
        if kind == "plan":
            return user_turn(self.instruction.format(prompt=prompt.text)), plan, False
        if kind == "fill":
            return chat_text(join_plan(prompt.text, plan)), " " + filled(rng, scene), True
        image = "<|vision_start|>" + "<|image_pad|>" * len(words.CELL_WORDS) + "<|vision_end|>"
        if rng.random() < 0.3:
            return user_turn(image + FILL_QUESTION), filled(rng, scene), True
        question, answer = words.sample_question(rng, scene)
        return user_turn(image + question), answer, False

    def batch(self, step: int, micro: int) -> dict[str, Any]:
        """Rows by kind, each kind padded apart, and the images of the last."""
        rng = np.random.default_rng((self.seed, step, micro))
        batch: dict[str, Any] = {}
        for kind, eighths in EIGHTHS.items():
            rows, scenes = [], []
            for _ in range(eighths * (self.batch_size // 8)):
                prompt = sample_prompt(rng, split="train")
                scenes.append(sample_scene(rng, prompt))
                rows.append(self.row(kind, rng, prompt, scenes[-1]))
            batch[kind] = self.encode(rows)
        pixels = list(drawn(scenes).permute(0, 3, 1, 2))
        return {**batch, "pixels": self.processor(images=pixels, do_resize=False, return_tensors="pt"),
                "scenes": scenes}  # fmt: skip

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
        probe, probe_right = self.probe.loss(visual.unflatten(0, (len(grid), -1)), batch["scenes"])
        losses, right = {}, {}
        for kind in EIGHTHS:
            image = (visual, grid) if kind == "look" else None
            losses[kind], right[f"{kind}_right"] = self._answer_loss(batch[kind], image)
        metrics = {**losses, **right, "probe_right": probe_right}
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


def filled(rng: np.random.Generator, scene: Scene) -> str:
    """What half of the cells hold, all cells with things among them, in random order."""
    classes = words.cell_classes(scene)
    order = sorted(rng.permutation(len(classes)), key=lambda cell: classes[cell] == 0)[: len(classes) // 2]
    return words.fill_cells(scene, rng.permutation(order).tolist())


@dataclass
class OpenClipTask:
    """CLIP's symmetric cross-entropy between drawings and sentences that name everything in them."""

    module: nn.Module
    tokenize: Callable[[list[str]], Tensor]
    card: dict[str, Any]  # with the mean and the std of its images
    seed: int
    batch_size: int

    def batch(self, step: int, micro: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, step, micro))
        scenes = [sample_scene(rng, sample_prompt(rng, split="train")) for _ in range(self.batch_size)]
        texts = [sentence(rng, scene) for scene in scenes]
        pixels = drawn(scenes).permute(0, 3, 1, 2).float() / 255
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


def sentence(rng: np.random.Generator, scene: Scene) -> str:
    """A sentence about a scene: its things, in half of the sentences the first one's place, and the background."""
    where = f" at the {words.place(scene.things[0])}" if scene.things and rng.random() < 0.5 else ""
    return f"{words.describe(scene)}{where} on a {scene.tone} background"


class FluxTask:
    """Flow matching (`FluxModel.base_loss`) of the transformer and both text encoders, to generate from text alone.

    A pool of drawings is encoded once, at the start.
    """

    def __init__(self, diffusion: FluxModel, max_tokens: int, seed: int, batch_size: int, pool: int) -> None:
        self.diffusion, self.seed, self.batch_size = diffusion, seed, batch_size
        trained: dict[str, Any] = {
            name: getattr(diffusion, name) for name in ("transformer", "text_encoder", "text_encoder_2")
        }
        self.module = nn.ModuleDict(trained).requires_grad_(True)
        rng = np.random.default_rng((seed, 0))
        self.prompts = [sample_prompt(rng, split="train") for _ in range(pool)]
        pixels = drawn(sample_scene(rng, prompt) for prompt in self.prompts)
        self.latents_Nchw = torch.cat([diffusion.encode(chunk).half() for chunk in pixels.split(64)])
        self.clip_NT, self.t5_NT = diffusion.tokenize([prompt.text for prompt in self.prompts], max_tokens)
        self.no_clip_1T, self.no_t5_1T = diffusion.tokenize([""], max_tokens)

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.seed, 1, step, micro))
        rows = torch.from_numpy(rng.integers(len(self.prompts), size=self.batch_size))
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
