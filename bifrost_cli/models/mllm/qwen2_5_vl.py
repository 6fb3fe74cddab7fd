"""Qwen2.5-VL, the paper's MLLM: the published prompt, and the visual encoder after its 2x2 merge as patch latents.

In: stock tokenizer, image processor and model. Out: what `family.MllmAdapter` asks for, for any size from 3B to 72B.
N patches of all images, before the merge; otherwise the legend of family.py.
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

from bifrost_cli.models.mllm.chat_template import ChatTemplate


class Qwen25VLAdapter:
    """The adapter of Qwen2.5-VL."""

    towers: tuple[str, ...] = ("qwen2_5_vl_vision",)

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
        return encode_patches(model, inputs["pixel_values"], inputs["image_grid_thw"]).unflatten(
            0, (len(pixels_BCHW), -1)
        )

    def visual(self, model: PreTrainedModel) -> nn.Module:
        return model.model.visual

    def encoder_identity(self, model: PreTrainedModel) -> dict[str, Any]:
        return {
            "activation": model.model.visual.config.hidden_act,
            "layer": "visual encoder after the 2x2 merge (pooler_output)",
        }


@torch.no_grad()
def encode_patches(model: PreTrainedModel, pixel_rows: Tensor, grid_N3: Tensor) -> Tensor:
    """Stock inputs (pixel rows in Qwen order; frames, rows, columns of every image) -> latents (all patches, C)."""
    visual = model.model.visual
    return visual(pixel_rows.to(visual.device, visual.dtype), grid_thw=grid_N3.to(visual.device)).pooler_output
