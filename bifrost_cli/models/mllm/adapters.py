"""What differs between families of multimodal LLMs, and which family a model belongs to.

Everything else is the same for all of them: a stock decoder at `model.model.language_model`, whose cache of a prompt is
what the branch reads. A package adds a family by an entry point of the group `bifrost.mllm_families`: its name is the
`model_type` of config.json, its value an `MllmAdapter`. Legend: B images, P patches, C channels (the decoder's width).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from bifrost_cli.errors import ArtifactError
from bifrost_cli.models.branch.decoder_adapters import DECODERS
from bifrost_cli.models.mllm.chat_template import ChatTemplate
from bifrost_cli.runtime.plugins import plugins


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


FAMILIES = plugins(
    "bifrost.mllm_families",
    {
        "qwen2_5_vl": "bifrost_cli.models.mllm.qwen:Qwen25VLAdapter",
        "qwen3_vl": "bifrost_cli.models.mllm.qwen:Qwen3VLAdapter",
        "llava": "bifrost_cli.models.mllm.llava:LlavaAdapter",
        "llava_next": "bifrost_cli.models.mllm.llava:LlavaNextAdapter",
        "llava_onevision": "bifrost_cli.models.mllm.llava:LlavaOnevisionAdapter",
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
    raise ArtifactError(
        f"model_type {model_type} is not supported: {reason}",
        at=f"known: {', '.join(FAMILIES)}",
        fix="set models.mllm to a model of a known type",
        code="BF-ART-009",
    )


def adapter_of(config: PreTrainedConfig) -> MllmAdapter:
    """The adapter for a stock configuration.

    Raises:
        ArtifactError: BF-ART-009, there is no adapter, or the decoder or vision tower is not a supported one.
        EnvironmentProblem: the adapter is a plug-in that does not load, or two have its name.
    """
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
