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

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessor

from bifrost_cli.models.mllm.chat_template import chat_text, join_plan, user_turn
from bifrost_cli.shapes.captions import Prompt, sample_prompt, sample_scene
from bifrost_cli.shapes.draw import draw
from bifrost_cli.shapes.questions import sample_question
from bifrost_cli.shapes.scene import TONES, Scene
from bifrost_cli.shapes.scene_plan import cell_classes, cell_words, fill_cells, thing_words, write_plan

FILL_QUESTION = "What is in these cells?"
Row = tuple[str, str, bool]  # question, answer, whether every other word of the answer is given


class Probe(nn.Module):
    """Reads thing (31 classes), tone (3) and offset (2, in pixels) from visual tokens (B, P, D). Not shipped."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [len(thing_words()) + 1, len(TONES), 2]
        self.head = nn.Linear(width, sum(self.sizes))

    def loss(self, latents_BPD: torch.Tensor, scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of thing and tone plus squared error of the offsets where there is a thing; and accuracy."""
        thing_BPK, tone_BPK, offset_BP2 = self.head(latents_BPD).split(self.sizes, dim=-1)
        classes_BP = torch.from_numpy(np.stack([cell_classes(scene) for scene in scenes]))
        tones_BP = torch.tensor([list(TONES).index(scene.tone) for scene in scenes])[:, None].expand_as(classes_BP)
        error = (offset_BP2 - _offsets(scenes)).square().sum(-1)
        loss = nn.functional.cross_entropy(thing_BPK.flatten(0, 1), classes_BP.flatten())
        loss = loss + 0.2 * nn.functional.cross_entropy(tone_BPK.flatten(0, 1), tones_BP.flatten())
        right = (thing_BPK.argmax(-1) == classes_BP)[classes_BP > 0].float().mean()
        return loss + 0.1 * error[classes_BP > 0].mean(), right


def _offsets(scenes: list[Scene]) -> torch.Tensor:
    side = round(len(cell_words()) ** 0.5)
    offsets = torch.zeros(len(scenes), side * side, 2)
    for index, scene in enumerate(scenes):
        for thing in scene.things:
            offsets[index, thing.row * side + thing.col] = torch.tensor([thing.dx, thing.dy], dtype=torch.float32)
    return offsets


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

    # ---- rows -------------------------------------------------------------------------------------------------------

    def plan_row(self, rng: np.random.Generator, prompt: Prompt, scene: Scene) -> Row:
        """The planning instruction with the prompt, answered with the plan."""
        return user_turn(self.instruction.format(prompt=prompt.text)), write_plan(scene, prompt), False

    def fill_row(self, rng: np.random.Generator, prompt: Prompt, scene: Scene) -> Row:
        """The prompt and plan as the branch reads them, answered with what the cells hold."""
        return chat_text(join_plan(prompt.text, write_plan(scene, prompt))), " " + _filled(rng, scene), True

    def look_row(self, rng: np.random.Generator, prompt: Prompt, scene: Scene) -> Row:
        """An image and a question about it."""
        image = "<|vision_start|>" + "<|image_pad|>" * len(cell_words()) + "<|vision_end|>"
        if rng.random() < 0.3:
            return user_turn(image + FILL_QUESTION), _filled(rng, scene), True
        question, answer = sample_question(rng, scene)
        return user_turn(image + question), answer, False

    def batch(self, step: int, micro: int) -> dict[str, Any]:
        """Three eighths plan rows, as many fill rows, a quarter look rows; each kind padded apart."""
        rng = np.random.default_rng((self.seed, step, micro))
        share = self.batch_size // 8
        plan = [self._row(rng, self.plan_row) for _ in range(3 * share)]
        fill = [self._row(rng, self.fill_row) for _ in range(3 * share)]
        look = [self._row(rng, self.look_row) for _ in range(2 * share)]
        scenes = [scene for _, scene in look]
        pixels = [torch.from_numpy(draw(scene)).permute(2, 0, 1) for scene in scenes]
        return {
            "plan": self.encode([row for row, _ in plan]),
            "fill": self.encode([row for row, _ in fill]),
            "look": self.encode([row for row, _ in look]),
            "pixels": self.processor(images=pixels, do_resize=False, return_tensors="pt"),
            "scenes": scenes,
        }

    @staticmethod
    def _row(rng: np.random.Generator, kind: Callable[..., Row]) -> tuple[Row, Scene]:
        prompt = sample_prompt(rng, split="train")
        scene = sample_scene(rng, prompt)
        return kind(rng, prompt, scene), scene

    def encode(self, rows: list[Row]) -> dict[str, torch.Tensor]:
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

    # ---- loss -------------------------------------------------------------------------------------------------------

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a batch, and for the log each kind's loss and share of right words."""
        grid = batch["pixels"].image_grid_thw
        visual = self.mllm.model.visual(batch["pixels"].pixel_values, grid_thw=grid).pooler_output
        probe, right = self.probe.loss(visual.unflatten(0, (len(grid), -1)), batch["scenes"])
        plan, plan_right = self._answer_loss(batch["plan"], None, None)
        fill, fill_right = self._answer_loss(batch["fill"], None, None)
        look, look_right = self._answer_loss(batch["look"], visual, grid)
        metrics = {"plan": plan, "fill": fill, "look": look, "plan_right": plan_right, "fill_right": fill_right,
                   "look_right": look_right, "probe_right": right}  # fmt: skip
        return plan + fill + 0.5 * look + 0.5 * probe, {name: value.detach() for name, value in metrics.items()}

    def _answer_loss(
        self, rows: dict[str, torch.Tensor], visual_ND: torch.Tensor | None, grid_B3: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        model = self.mllm.model
        embeds_BTD = model.get_input_embeddings()(rows["ids"])
        positions = None
        if visual_ND is not None:
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
        """The rows with plans, for error messages."""
        return self.tokenizer.batch_decode(batch["plan"]["ids"])


def _filled(rng: np.random.Generator, scene: Scene) -> str:
    """What half of the cells hold, all cells with things among them, in random order."""
    classes = cell_classes(scene)
    order = sorted(rng.permutation(len(classes)), key=lambda cell: classes[cell] == 0)[: len(classes) // 2]
    return fill_cells(scene, rng.permutation(order).tolist())
