"""Pretraining of the tiny multimodal LLM: plans from prompts, words for cells, answers about images.

Three kinds of rows share every batch:

* plan: the planning instruction of `generate --plan`, answered with a plan;
* fill: the image prompt the branch will read, answered in words with what each cell holds, cells in random order
  (so that the prompt's keys and values can be looked up by place, which is what the branch does with them);
* look: an image and a question about it, or the cells' words.

Beside the language loss, a throw-away probe reads each visual token's cell (thing, offset, tone), which keeps shape and
place in the latents; a caption loss alone loses them with depth.
Legend: B rows, T tokens, P patches, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessor

from bifrost_cli.models.mllm.chat_template import chat_text, join_plan, user_turn
from bifrost_cli.shapes.captions import Prompt, sample_prompt, sample_scene
from bifrost_cli.shapes.questions import sample_question
from bifrost_cli.shapes.scene import TONES, Scene
from bifrost_cli.shapes.scene_plan import CELL_WORDS, THING_WORDS, cell_classes, fill_cells, write_plan
from bifrost_cli.toy_system.train_bases import drawn

FILL_QUESTION = "What is in these cells?"
EIGHTHS = {"plan": 3, "fill": 3, "look": 2}  # of a batch
Row = tuple[str, str, bool]  # question, answer, whether every other word of the answer is given


class Probe(nn.Module):
    """Reads thing (31 classes), tone (3) and offset (2, in pixels) from visual tokens (B, P, D). Not shipped."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [len(THING_WORDS) + 1, len(TONES), 2]
        self.head = nn.Linear(width, sum(self.sizes))

    def loss(self, latents_BPD: Tensor, scenes: list[Scene]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of thing and tone plus squared error of the offsets where there is a thing; and accuracy."""
        thing_BPK, tone_BPK, offset_BP2 = self.head(latents_BPD).split(self.sizes, dim=-1)
        classes_BP = torch.from_numpy(np.stack([cell_classes(scene) for scene in scenes]))
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


class MllmTask:
    """Next-word loss on the answers of all rows, plus half the probe's loss on the images."""

    def __init__(
        self,
        model: Any,
        tokenizer: Qwen2Tokenizer,
        processor: Qwen2VLImageProcessor,
        instruction: str,
        seed: int,
        batch_size: int,
    ) -> None:
        self.mllm, self.probe = model.train(), Probe(model.config.text_config.hidden_size)
        self.module = nn.ModuleDict({"mllm": self.mllm, "probe": self.probe})
        self.tokenizer, self.processor, self.instruction = tokenizer, processor, instruction
        self.seed, self.batch_size = seed, batch_size

    def row(self, kind: str, rng: np.random.Generator, prompt: Prompt, scene: Scene) -> Row:
        plan = write_plan(scene, prompt)
        if kind == "plan":
            return user_turn(self.instruction.format(prompt=prompt.text)), plan, False
        if kind == "fill":
            return chat_text(join_plan(prompt.text, plan)), " " + filled(rng, scene), True
        image = "<|vision_start|>" + "<|image_pad|>" * len(CELL_WORDS) + "<|vision_end|>"
        if rng.random() < 0.3:
            return user_turn(image + FILL_QUESTION), filled(rng, scene), True
        question, answer = sample_question(rng, scene)
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
    classes = cell_classes(scene)
    order = sorted(rng.permutation(len(classes)), key=lambda cell: classes[cell] == 0)[: len(classes) // 2]
    return fill_cells(scene, rng.permutation(order).tolist())
