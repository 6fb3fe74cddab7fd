"""LLaVA, LLaVA-NeXT and LLaVA-OneVision: a CLIP or SigLIP tower, a projector, and a Llama, Mistral or Qwen2 decoder.

Patch latents are the projector's outputs for the tower's patches, at the decoder's width: the image tokens this MLLM
reads, like Qwen2.5-VL's merged tokens, so that the branch needs no input projection. (The tower's features before the
projector are what an `open_clip` encoder gives.)

* The tower's layer is the checkpoint's `vision_feature_layer`; its class token is not a patch and is dropped, whatever
  the checkpoint's select strategy.
* A tower reads one image size. NeXT and OneVision also cut large images into tiles when they answer questions; a latent
  grid is of the whole image at the tower's size, the first of their tiles.
* The decoder's one rotary axis is all that our positions need (see `chat_template`).
* No special token opens an image in these templates: the branch's tokens follow `ASSISTANT:`, or the checkpoint's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from bifrost_cli.models.mllm.adapters import MllmAdapter
from bifrost_cli.models.mllm.chat_template import ChatTemplate

_WITH_CLASS_TOKEN = "clip_vision_model"


class LlavaAdapter(MllmAdapter):
    """LLaVA: one image, one tile."""

    towers = (_WITH_CLASS_TOKEN, "siglip_vision_model")

    def template(self, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        return ChatTemplate.of_chat(tokenizer, "")

    def processor(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, images: Any) -> ProcessorMixin:
        return self._processor(
            config,
            image_processor=images,
            tokenizer=tokenizer,
            chat_template=tokenizer.chat_template,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )

    def _processor(self, config: PreTrainedConfig, **parts: Any) -> ProcessorMixin:
        return LlavaProcessor(
            patch_size=config.vision_config.patch_size, num_additional_image_tokens=_class_tokens(config), **parts
        )

    def pixels_per_patch(self, config: PreTrainedConfig) -> int:
        return config.vision_config.patch_size

    def image_size(self, config: PreTrainedConfig) -> int | None:
        return config.vision_config.image_size

    def latents(self, model: PreTrainedModel, images: Any, pixels_BCHW: Tensor) -> Tensor:
        mean_C11, std_C11 = (torch.tensor(value).view(-1, 1, 1) for value in (images.image_mean, images.image_std))
        pixels_BCHW = ((pixels_BCHW / 255 - mean_C11) / std_C11).to(model.device, model.dtype)
        hidden_states = model.model.vision_tower(pixels_BCHW, output_hidden_states=True).hidden_states
        layers = model.config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        tower_BNc = torch.cat([hidden_states[layer] for layer in layers], dim=-1)
        patches_BPc = tower_BNc[:, _class_tokens(model.config) :]
        return model.model.multi_modal_projector(patches_BPc)

    def visual(self, model: PreTrainedModel) -> nn.Module:
        names = ("vision_tower", "multi_modal_projector")
        return nn.ModuleDict({name: getattr(model.model, name) for name in names})

    def encoder_identity(self, model: PreTrainedModel) -> dict[str, Any]:
        config = model.config
        return {
            "activation": f"{config.vision_config.hidden_act}, projector {config.projector_hidden_act}",
            "layer": f"projected patches of hidden state {config.vision_feature_layer}",
        }


class LlavaNextAdapter(LlavaAdapter):
    """LLaVA-NeXT."""

    def _processor(self, config: PreTrainedConfig, **parts: Any) -> ProcessorMixin:
        return LlavaNextProcessor(
            patch_size=config.vision_config.patch_size, num_additional_image_tokens=_class_tokens(config), **parts
        )


class LlavaOnevisionAdapter(LlavaAdapter):
    """LLaVA-OneVision."""

    def _processor(self, config: PreTrainedConfig, **parts: Any) -> ProcessorMixin:
        side = config.vision_config.image_size // config.vision_config.patch_size
        return LlavaOnevisionProcessor(
            video_processor=LlavaOnevisionVideoProcessor(),
            num_image_tokens=side**2,
            vision_aspect_ratio=config.vision_aspect_ratio,
            **parts,
        )


def _class_tokens(config: PreTrainedConfig) -> int:
    return int(config.vision_config.model_type == _WITH_CLASS_TOKEN)
