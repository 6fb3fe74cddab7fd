"""Qwen2.5-VL (3B to 72B), the paper's MLLM, and Qwen3-VL: patch latents are the merged visual tokens.

Legend as in `adapters`; N patches of all images, before the 2x2 merge. Qwen3-VL differs in this:

* Keys are normed in every head before they are rotated. The copied decoder does it too, and so does the branch where it
  computes the last layer's keys itself.
* The three rotary axes are interleaved over the head's width. Text has one position on all three and image tokens have
  0, so any interleaving gives the same angles.
* DeepStack: while the frozen model reads an image, features of three earlier layers of the visual encoder are added to
  its first hidden states at image positions. The branch predicts only the merged tokens, which are what the ControlNet
  reads; a predicted token enters the next pass without that addition. `ask` uses the stock model, with DeepStack.
* There is no system turn, and a Thinking checkpoint opens `<think>` before the image: the template is the checkpoint's
  own, followed by `<|vision_start|>`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from bifrost_cli.models.mllm.adapters import MllmAdapter
from bifrost_cli.models.mllm.chat_template import OPENING, ChatTemplate


class Qwen25VLAdapter(MllmAdapter):
    """The adapter of Qwen2.5-VL."""

    towers = ("qwen2_5_vl_vision",)

    def template(self, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """The published text, pinned by tests/vectors, whatever chat template lies beside the weights."""
        return ChatTemplate(tokenizer)

    def processor(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, images: Any) -> ProcessorMixin:
        return Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=tokenizer.chat_template)

    def pixels_per_patch(self, config: PreTrainedConfig) -> int:
        """28 as published: patches of 14 pixels, merged 2x2."""
        return config.vision_config.patch_size * config.vision_config.spatial_merge_size

    def image_size(self, config: PreTrainedConfig) -> int | None:
        return None

    def latents(self, model: PreTrainedModel, images: Any, pixels_BCHW: Tensor) -> Tensor:
        inputs = images(images=list(pixels_BCHW), do_resize=False, return_tensors="pt")
        tokens_NC = encode_patches(model, inputs["pixel_values"], inputs["image_grid_thw"])
        return tokens_NC.unflatten(0, (len(pixels_BCHW), -1))

    def visual(self, model: PreTrainedModel) -> nn.Module:
        return model.model.visual

    def encoder_identity(self, model: PreTrainedModel) -> dict[str, Any]:
        return {
            "activation": model.model.visual.config.hidden_act,
            "layer": "visual encoder after the 2x2 merge (pooler_output)",
        }


class Qwen3VLAdapter(Qwen25VLAdapter):
    """The adapter of Qwen3-VL."""

    towers = ("qwen3_vl_vision",)

    def template(self, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        return ChatTemplate.of_chat(tokenizer, OPENING)

    def processor(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, images: Any) -> ProcessorMixin:
        return Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(), chat_template=tokenizer.chat_template)


@torch.no_grad()
def encode_patches(model: PreTrainedModel, pixel_rows: Tensor, grid_N3: Tensor) -> Tensor:
    """Stock inputs to merged visual tokens.

    Args:
        model: a stock Qwen2.5-VL or Qwen3-VL.
        pixel_rows: `pixel_values` of the stock image processor, a row for each patch, (N, pixels of a patch).
        grid_N3: `image_grid_thw`: frames, rows and columns of patches of every image.

    Returns:
        Latents of all images, one below the other, (N / 4, C).
    """
    visual = model.model.visual
    return visual(pixel_rows.to(visual.device, visual.dtype), grid_thw=grid_N3.to(visual.device)).pooler_output
