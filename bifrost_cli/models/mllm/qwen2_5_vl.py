"""Qwen2.5-VL (3B to 72B), the paper's MLLM: the published prompt; patch latents are the merged visual tokens.

Legend as in `adapters`; N patches of all images, before the 2x2 merge.
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
)

from bifrost_cli.models.mllm.adapters import MllmAdapter
from bifrost_cli.models.mllm.chat_template import ChatTemplate


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
