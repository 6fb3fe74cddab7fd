"""Qwen3-VL: like Qwen2.5-VL, with these differences.

* Keys are normed in every head before they are rotated. The copied decoder does it too, and so does `kv_prefix` where
  it computes the last layer's keys itself.
* The three rotary axes are interleaved over the head's width. Text has one position on all three and image tokens have
  0, so any interleaving gives the same angles.
* DeepStack: while the frozen model reads an image, features of three earlier layers of the visual encoder are added to
  its first hidden states at image positions. The branch predicts only the merged tokens, which are what the ControlNet
  reads; a predicted token enters the next pass without that addition. `ask` uses the stock model, with DeepStack.
* There is no system turn, and a Thinking checkpoint opens `<think>` before the image: the template is the checkpoint's
  own, followed by `<|vision_start|>`.

The mixture-of-experts sizes have another model_type (see `adapters`).
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

    towers = ("qwen3_vl_vision",)

    def template(self, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        return ChatTemplate.of_chat(tokenizer, OPENING)

    def processor(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, images: Any) -> ProcessorMixin:
        return Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(), chat_template=tokenizer.chat_template)
