"""What differs between families of multimodal LLMs, and which family a model belongs to. A package adds a family by an
entry point of the group `bifrost.mllm_families`: its name is the `model_type` of config.json, its value an
`MllmAdapter`. Legend: B images, P patches, C channels (the decoder's width), N patches of all images, before Qwen's 2x2
merge."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from bifrost_cli.errors import ArtifactError
from bifrost_cli.models.branch.decoder_adapters import DECODERS
from bifrost_cli.models.mllm.chat_template import OPENING, ChatTemplate
from bifrost_cli.runtime.plugins import Plugins


class MllmAdapter(ABC):
    """How a family of multimodal LLMs writes prompts and encodes images. `towers`: model types of its vision tower."""

    towers: ClassVar[tuple[str, ...]]

    @abstractmethod
    def template(self, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """The chat template that puts a prompt before the branch's image tokens."""

    @abstractmethod
    def processor(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, images: Any) -> ProcessorMixin:
        """The stock processor for questions about images; `images` is the stock image processor."""

    @abstractmethod
    def pixels_per_patch(self, config: PreTrainedConfig) -> int:
        """Pixels on a side of one patch latent."""

    @abstractmethod
    def image_size(self, config: PreTrainedConfig) -> int | None:
        """The only image side that the visual encoder reads; None: any whole number of patches."""

    @abstractmethod
    def latents(self, model: PreTrainedModel, images: Any, pixels_BCHW: Tensor) -> Tensor:
        """uint8 images of a fitting size -> latents_BPC, patches row by row, unscaled, in the model's dtype."""

    @abstractmethod
    def visual(self, model: PreTrainedModel) -> nn.Module:
        """All modules between an image and its latents."""

    @abstractmethod
    def encoder_identity(self, model: PreTrainedModel) -> dict[str, Any]:
        """What two encoders of equal weights can still differ in: `activation` and `layer`, as JSON values."""


class Qwen25VLAdapter(MllmAdapter):
    """Qwen2.5-VL (3B to 72B), the paper's MLLM: patch latents are the merged visual tokens."""

    towers = ("qwen2_5_vl_vision",)
    _processor, _video = "Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"

    def template(self, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """The published text, pinned by tests/vectors, whatever chat template lies beside the weights."""
        return ChatTemplate(tokenizer)

    def processor(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, images: Any) -> ProcessorMixin:
        video = getattr(transformers, self._video)()
        return getattr(transformers, self._processor)(images, tokenizer, video, chat_template=tokenizer.chat_template)

    def pixels_per_patch(self, config: PreTrainedConfig) -> int:
        """28 as published: patches of 14 pixels, merged 2x2."""
        return config.vision_config.patch_size * config.vision_config.spatial_merge_size

    def image_size(self, config: PreTrainedConfig) -> int | None:
        return None

    def latents(self, model: PreTrainedModel, images: Any, pixels_BCHW: Tensor) -> Tensor:
        if getattr(images, "backend", None) == "torchvision":  # which computes where its images lie
            pixels_BCHW = pixels_BCHW.to(model.model.visual.device)
        inputs = images(images=list(pixels_BCHW), do_resize=False, return_tensors="pt")
        tokens_NC = encode_patches(model, inputs["pixel_values"], inputs["image_grid_thw"])
        return tokens_NC.unflatten(0, (len(pixels_BCHW), -1))

    def visual(self, model: PreTrainedModel) -> nn.Module:
        return model.model.visual

    def encoder_identity(self, model: PreTrainedModel) -> dict[str, Any]:
        activation = model.model.visual.config.hidden_act
        return {"activation": activation, "layer": "visual encoder after the 2x2 merge (pooler_output)"}


class Qwen3VLAdapter(Qwen25VLAdapter):
    """Qwen3-VL. The branch norms the keys of every head, as it does; its three rotary axes are interleaved, which is
    the same for text (one position on all three) and image tokens (0). DeepStack, which adds features of earlier visual
    layers to the first hidden states at image positions, is not copied: the branch predicts only the merged tokens,
    which are what the ControlNet reads. The template is the checkpoint's own (no system turn; a Thinking checkpoint
    opens `<think>` before the image), followed by `<|vision_start|>`."""

    towers = ("qwen3_vl_vision",)
    _processor, _video = "Qwen3VLProcessor", "Qwen3VLVideoProcessor"

    def template(self, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        return ChatTemplate.of_chat(tokenizer, OPENING)


@torch.no_grad()
def encode_patches(model: PreTrainedModel, pixel_rows: Tensor, grid_N3: Tensor) -> Tensor:
    """A stock Qwen's `pixel_values` (N, pixels of a patch) and `image_grid_thw` to the merged visual tokens of all
    images, one below the other, (N / 4, C)."""
    visual = model.model.visual
    return visual(pixel_rows.to(visual.device, visual.dtype), grid_thw=grid_N3.to(visual.device)).pooler_output


class LlavaAdapter(MllmAdapter):
    """LLaVA: a CLIP or SigLIP tower, a projector, and a Llama, Mistral or Qwen2 decoder; one image, one tile. Patch
    latents are the projector's outputs for the tower's patches, at the decoder's width; the class token is not a patch
    and is dropped, whatever the checkpoint's select strategy. A tower reads one image size: NeXT and OneVision cut
    large images into tiles when they answer questions, but a latent grid is of the whole image at the tower's size. No
    special token opens an image in these templates: the branch's tokens follow `ASSISTANT:`, or the checkpoint's
    own."""

    towers = ("clip_vision_model", "siglip_vision_model")  # the first has a class token
    _processor = "LlavaProcessor"

    def template(self, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        return ChatTemplate.of_chat(tokenizer, "")

    def processor(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, images: Any) -> ProcessorMixin:
        return getattr(transformers, self._processor)(
            image_processor=images,
            tokenizer=tokenizer,
            chat_template=tokenizer.chat_template,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            **self._sizes(config),
        )

    def _sizes(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {
            "patch_size": config.vision_config.patch_size,
            "num_additional_image_tokens": self._class_tokens(config),
        }

    def _class_tokens(self, config: PreTrainedConfig) -> int:
        return int(config.vision_config.model_type == self.towers[0])

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
        return model.model.multi_modal_projector(tower_BNc[:, self._class_tokens(model.config) :])

    def visual(self, model: PreTrainedModel) -> nn.Module:
        return nn.ModuleDict({name: getattr(model.model, name) for name in ("vision_tower", "multi_modal_projector")})

    def encoder_identity(self, model: PreTrainedModel) -> dict[str, Any]:
        config = model.config
        activation = f"{config.vision_config.hidden_act}, projector {config.projector_hidden_act}"
        return {"activation": activation, "layer": f"projected patches of hidden state {config.vision_feature_layer}"}


class LlavaNextAdapter(LlavaAdapter):
    _processor = "LlavaNextProcessor"


class LlavaOnevisionAdapter(LlavaAdapter):
    _processor = "LlavaOnevisionProcessor"

    def _sizes(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {
            "video_processor": transformers.LlavaOnevisionVideoProcessor(),
            "num_image_tokens": (config.vision_config.image_size // config.vision_config.patch_size) ** 2,
            "vision_aspect_ratio": config.vision_aspect_ratio,
        }


FAMILIES = Plugins(
    "bifrost.mllm_families",
    {
        "qwen2_5_vl": Qwen25VLAdapter,
        "qwen3_vl": Qwen3VLAdapter,
        "llava": LlavaAdapter,
        "llava_next": LlavaNextAdapter,
        "llava_onevision": LlavaOnevisionAdapter,
    },
    base=MllmAdapter,
)

_LINEAR = "most of its decoder's layers keep a running state instead of keys and values, so there is no prefix to read"
_EXPERTS = "a branch would copy every expert, and training it needs a load-balancing loss, which is not implemented"
_QUERIES = "its decoder sees a few learned queries of an image, which are not patches"
_CODEBOOK = "it reads images as tokens of a codebook, which are not CLIP latents"
_REASONS = {
    None: "a config.json without a model_type does not belong to a multimodal LLM",
    "qwen2_vl": "its visual encoder is another network than Qwen2.5-VL's, and has no adapter here",
    "qwen3_vl_moe": _EXPERTS,
    "qwen3_5_moe": _LINEAR,
    "qwen3_5": _LINEAR,
    "mllama": "its decoder reads images through cross-attention: there are no image tokens among the text tokens",
    "blip-2": _QUERIES,
    "instructblip": _QUERIES,
    "chameleon": _CODEBOOK,
    "emu3": _CODEBOOK,
    "gemma3": "its decoder scales embeddings and uses sliding-window attention, which a copied decoder does not",
    "paligemma": "its decoder scales embeddings, which a copied decoder does not",
}


def require_known(model_type: str | None) -> None:
    """Refuse a `model_type` (of a model's config.json) without an adapter: ArtifactError BF-ART-009."""
    if model_type in FAMILIES:
        return
    reason = _REASONS.get(model_type, "there is no adapter for it")
    raise ArtifactError(f"model_type {model_type} is not supported: {reason}", at=f"known: {', '.join(FAMILIES)}",
                        fix="set models.mllm to a model of a known type", code="BF-ART-009")  # fmt: skip


def adapter_of(config: PreTrainedConfig) -> MllmAdapter:
    """The adapter for a stock configuration; refuses a decoder or vision tower that is not a supported one, too."""
    require_known(config.model_type)
    adapter = FAMILIES[config.model_type]
    adapter = adapter() if isinstance(adapter, type) else adapter
    parts = ("decoder", config.text_config, DECODERS), ("visual encoder", config.vision_config, adapter.towers)
    for name, part, known in parts:
        if part.model_type not in known:
            raise ArtifactError(
                f"this {config.model_type} has a {name} of type {part.model_type}, which is not supported",
                at=f"known: {', '.join(known)}",
                fix="set models.mllm to a model with a known one",
                code="BF-ART-009",
            )
    return adapter
