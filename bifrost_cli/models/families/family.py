"""What differs between families of multimodal LLMs, and which family a model is of.

In: a stock configuration. Out: its `Family`, or an error that says why there is none. Everything else is the same for
all of them: a stock decoder at `model.model.language_model`, whose cache of a prompt is what the branch reads. This
file knows no weights and no folder. Legend: B pictures, P patches, C channels (= the decoder's width).
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from bifrost_cli.errors import ArtifactError
from bifrost_cli.models.decoder import DECODERS
from bifrost_cli.models.families.qwen2_5_vl import Qwen25VL
from bifrost_cli.models.prompt import Template


class Family(Protocol):
    """The places where one multimodal LLM is not like another."""

    def template(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        """How a prompt is put before the branch's image tokens."""
        ...

    def processor(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, images: Any) -> ProcessorMixin:
        """The stock processor of questions about pictures, around a tokenizer and an image processor."""
        ...

    def pixels_per_patch(self, config: PreTrainedConfig) -> int:
        """Pixels on the side of one patch latent."""
        ...

    def image_size(self, config: PreTrainedConfig) -> int | None:
        """The one picture side that the visual encoder reads; None: any whole number of patches."""
        ...

    def latents(self, model: PreTrainedModel, images: Any, pixels_BCHW: Tensor) -> Tensor:
        """uint8 pictures of a fitting size -> latents_BPC, patches row by row, raw, in the model's type."""
        ...

    def encoder_identity(self, model: PreTrainedModel) -> dict[str, Any]:
        """What makes latents of this model comparable: weights, dtype, activation and layer, as JSON values."""
        ...


FAMILIES: dict[str, Family] = {"qwen2_5_vl": Qwen25VL()}

# Why not: what a reader of the error would ask next.
_REASONS = {
    "qwen2_vl": "its visual encoder is another network under the same tensor names, and has no adapter here",
}


def require_known(model_type: str | None) -> None:
    """ArtifactError BF-ART-009 for a `model_type` (the word in a model's config.json) that has no family here."""
    if model_type in FAMILIES:
        return
    reason = _REASONS.get(model_type or "", "there is no adapter for it")
    raise ArtifactError(
        f"model_type {model_type} is not one that Bifrost reads: {reason}",
        at=f"known: {', '.join(FAMILIES)}",
        fix="set models.mllm to a model of a known type",
        code="BF-ART-009",
    )


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a stock configuration. ArtifactError BF-ART-009: none, or one around a decoder we cannot copy."""
    require_known(config.model_type)
    decoder = config.text_config.model_type
    if decoder not in DECODERS:
        raise ArtifactError(
            f"this {config.model_type} writes with a {decoder} decoder, of which a branch cannot be made",
            at=f"known decoders: {', '.join(DECODERS)}",
            fix="set models.mllm to a model with a known decoder",
            code="BF-ART-009",
        )
    return FAMILIES[config.model_type]
