"""Qwen3-VL: the visual encoder and decoder of Qwen2.5-VL grown up, read through the same code.

In and out as qwen2_5_vl.py. What is new in this family, and what becomes of it here:

* Keys are normed in every head before they turn. The copied decoder does it too, and prefix_pass.py where it computes
  the last layer's keys itself.
* The three rotary axes are interleaved over the head's width. Text stands at one place on all three and image tokens at
  0, so that any mixing of the axes gives the same angles.
* DeepStack: while the frozen model reads an image, three earlier layers of the visual encoder are added to its first
  hidden states, at image positions. That only helps reading: an image must be there to take them from. The branch
  predicts the merged tokens alone, which are what the ControlNet gets, and a token that it has predicted enters its
  next pass without that help. `ask` is the stock model and keeps DeepStack whole.
* No system turn stands before a prompt; a Thinking checkpoint opens `<think>` before the image. The template is the
  checkpoint's own, followed by `<|vision_start|>`.

The mixture-of-experts sizes have another model_type (see family.py).
"""

from __future__ import annotations

from typing import Any

from transformers import (
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from bifrost_cli.models.mllm.chat_template import OPENING, ChatTemplate
from bifrost_cli.models.mllm.qwen2_5_vl import Qwen25VLAdapter


class Qwen3VLAdapter(Qwen25VLAdapter):
    """The adapter of Qwen3-VL."""

    towers: tuple[str, ...] = ("qwen3_vl_vision",)

    def template(self, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        return ChatTemplate.of_chat(tokenizer, OPENING)

    def processor(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, images: Any) -> ProcessorMixin:
        return Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(), chat_template=tokenizer.chat_template)
