"""What differs between families of multimodal LLMs, and which family a model is of.

In: a stock configuration. Out: its `MllmAdapter`, or an error that says why there is none. Everything else is the same for
all of them: a stock decoder at `model.model.language_model`, whose cache of a prompt is what the branch reads. This
file knows no weights and no folder. Legend: B images, P patches, C channels (= the decoder's width).
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from bifrost_cli.errors import ArtifactError
from bifrost_cli.models.branch.decoder_adapters import DECODERS
from bifrost_cli.models.mllm.chat_template import ChatTemplate
from bifrost_cli.models.mllm.llava import LlavaAdapter, onevision, plain, tiled
from bifrost_cli.models.mllm.qwen2_5_vl import Qwen25VLAdapter
from bifrost_cli.models.mllm.qwen3_vl import Qwen3VLAdapter


class MllmAdapter(Protocol):
    """The places where one multimodal LLM is not like another. `towers`: model types of its visual encoder."""

    towers: tuple[str, ...]

    def template(self, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """How a prompt is put before the branch's image tokens."""
        ...

    def processor(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, images: Any) -> ProcessorMixin:
        """The stock processor of questions about images, around a tokenizer and an image processor."""
        ...

    def pixels_per_patch(self, config: PreTrainedConfig) -> int:
        """Pixels on the side of one patch latent."""
        ...

    def image_size(self, config: PreTrainedConfig) -> int | None:
        """The one image side that the visual encoder reads; None: any whole number of patches."""
        ...

    def latents(self, model: PreTrainedModel, images: Any, pixels_BCHW: Tensor) -> Tensor:
        """uint8 images of a fitting size -> latents_BPC, patches row by row, raw, in the model's type."""
        ...

    def visual(self, model: PreTrainedModel) -> nn.Module:
        """All modules that an image passes before it is latents."""
        ...

    def encoder_identity(self, model: PreTrainedModel) -> dict[str, Any]:
        """What two encoders of equal weights can still differ in: `activation` and `layer`, as JSON values."""
        ...


FAMILIES: dict[str, MllmAdapter] = {
    "qwen2_5_vl": Qwen25VLAdapter(),
    "qwen3_vl": Qwen3VLAdapter(),
    "llava": LlavaAdapter(plain),
    "llava_next": LlavaAdapter(tiled),
    "llava_onevision": LlavaAdapter(onevision),
}

_LINEAR = "most layers of its decoder carry a running state and no keys and values, so that there is no prefix to read"
_EXPERTS = "a branch of it would copy every expert, and its training needs a loss that balances them, which is not here"
_QUERIES = "its decoder sees a few learnt queries of a picture, which are no patches"
_REASONS = {
    None: "a config.json without a model_type is no multimodal LLM's",
    "qwen2_vl": "its visual encoder is another network than Qwen2.5-VL's, and has no adapter here",
    "qwen3_vl_moe": _EXPERTS,
    "qwen3_5_moe": _LINEAR,
    "qwen3_5": _LINEAR,
    "mllama": "its decoder reads pictures through layers of cross-attention: no image token stands among the words",
    "blip-2": _QUERIES,
    "instructblip": _QUERIES,
    "chameleon": "it reads pictures as words of a codebook, which are no CLIP latents",
    "emu3": "it reads pictures as words of a codebook, which are no CLIP latents",
    "gemma3": "its decoder scales its words and slides its attention, which a copied decoder would have to know",
    "paligemma": "its decoder scales its words, which a copied decoder would have to know",
}


def require_known(model_type: str | None) -> None:
    """ArtifactError BF-ART-009 for a `model_type` (the word in a model's config.json) that has no family here."""
    if model_type in FAMILIES:
        return
    reason = _REASONS.get(model_type, "there is no adapter for it")
    raise ArtifactError(
        f"model_type {model_type} is not one that Bifrost reads: {reason}",
        at=f"known: {', '.join(FAMILIES)}",
        fix="set models.mllm to a model of a known type",
        code="BF-ART-009",
    )


def adapter_of(config: PreTrainedConfig) -> MllmAdapter:
    """The family of a stock configuration. ArtifactError BF-ART-009: none, or one around parts that are not known."""
    require_known(config.model_type)
    family = FAMILIES[config.model_type]
    parts = ("decoder", config.text_config, DECODERS), ("visual encoder", config.vision_config, family.towers)
    for name, part, known in parts:
        if part.model_type not in known:
            raise ArtifactError(
                f"this {config.model_type} has a {name} of type {part.model_type}, which Bifrost does not read",
                at=f"known: {', '.join(known)}",
                fix="set models.mllm to a model with a known one",
                code="BF-ART-009",
            )
    return family
