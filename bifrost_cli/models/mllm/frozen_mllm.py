"""The frozen multimodal LLM: caches prompts, encodes images, writes plans, answers questions. Legend: B batch, T text
tokens, h key-value heads, d head width, P patches, C latent channels (the MLLM's width D)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from bifrost_cli.data.safetensors_io import weights_hash
from bifrost_cli.models.branch.decoder_adapters import with_cache
from bifrost_cli.models.mllm import chat_template
from bifrost_cli.models.mllm.adapters import adapter_of
from bifrost_cli.models.mllm.chat_template import ChatTemplate, TokenizedPrompts
from bifrost_cli.models.transfer import to_device


@dataclass(frozen=True)
class PromptCache:
    """Prompts as the branch reads them: keys and values of every layer, each (B, h, T, d), and the real tokens."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    attention_BT: Tensor
    padded: bool = True  # False: every token is real, known without asking the device

    def expand(self, batch: int) -> PromptCache:
        """The same one prompt `batch` times, without copies."""
        if len(self.attention_BT) == batch:
            return self
        keys, values = (tuple(part.expand(batch, -1, -1, -1) for part in parts) for parts in (self.keys, self.values))
        return PromptCache(keys, values, self.attention_BT.expand(batch, -1))


class Completion(NamedTuple):
    """What the model wrote, and whether it was cut at the longest length before it came to its end."""

    text: str
    cut: bool


class Mllm:
    """A frozen multimodal LLM of any family in `adapters.FAMILIES`, in eval mode and without gradients. Floating-point
    sums can differ in the last bit between batch sizes: call with one row where bytes must repeat."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, image_processor: Any) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.adapter = adapter_of(model.config)
        self.decoder: Any = self.model.model.language_model  # without its language head
        self.text_config: Any = model.config.text_config
        self.width: int = self.text_config.hidden_size  # also of the patch latents
        self.pixels_per_patch = self.adapter.pixels_per_patch(model.config)  # on a side of one patch latent
        self.image_size = self.adapter.image_size(model.config)  # the only side it reads; None: whole patches
        # transformers' stubs do not know attributes that depend on the checkpoint
        self.tokenizer: Any = tokenizer
        self.image_processor = image_processor
        self._hash: str | None = None

    @cached_property
    def template(self) -> ChatTemplate:
        return self.adapter.template(self.tokenizer)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def weights_hash(self) -> str:
        """sha256 over all weights, computed once: nothing in this class changes a weight."""
        self._hash = self._hash or weights_hash(self.model.state_dict())
        return self._hash

    def tokenize_prompts(
        self, prompts: Sequence[str], max_tokens: int, *, text_length: int | None = None
    ) -> TokenizedPrompts:
        """Prompts in the chat template (the empty one gives the unconditional text), left-padded to the longest row or
        to `text_length`, and truncated to `max_tokens` with the template's end kept."""
        ids = [self.template.ids(prompt) for prompt in prompts]
        length = min(max_tokens, max(map(len, ids))) if text_length is None else text_length
        return chat_template.tokenize_prompts(ids, length, self.template.closing(), self.tokenizer.pad_token_id)

    @torch.no_grad()
    def encode_prompts(self, prompts: TokenizedPrompts) -> PromptCache:
        """One causal pass of the decoder over the prompts; its cache is all that the branch needs of the text."""
        ids_BT, attention_BT = (to_device(x, self.device) for x in (prompts.input_ids_BT, prompts.attention_BT))
        cache = DynamicCache()
        self.decoder(
            inputs_embeds=self.decoder.embed_tokens(ids_BT),
            attention_mask=chat_template.additive(chat_template.text_mask(attention_BT), self.model.dtype),
            position_ids=to_device(prompts.position_ids_BT, self.device),
            **with_cache(self.decoder, cache),
            use_cache=True,
        )
        keys, values = zip(*((layer.keys, layer.values) for layer in cast(Any, cache.layers)), strict=True)
        return PromptCache(keys, values, attention_BT, padded=not bool(prompts.attention_BT.all()))

    @torch.no_grad()
    def encode(self, pixels_BHWC: np.ndarray | Tensor) -> Tensor:
        """Patch latents_BPC float32, row by row: the image tokens that the decoder would read, unscaled, of uint8
        images of a side that the visual encoder reads."""
        pixels_BCHW = _channels_first(pixels_BHWC)
        sides, patch, only = pixels_BCHW.shape[2:], self.pixels_per_patch, self.image_size
        if any(side != only if only else side % patch for side in sides):
            expected = f"{only}x{only} pixels" if only else f"whole patches of {patch} pixels"
            raise ValueError(f"images of {sides[0]}x{sides[1]} pixels are not {expected}")
        return self.adapter.latents(self.model, self.image_processor, pixels_BCHW).float()

    def write(self, texts: Sequence[str], instruction: str, max_new_tokens: int) -> list[Completion]:
        """Greedy answers to `instruction`, with each text in place of its `{prompt}`; special tokens are left out."""
        ids = [self.template.turn(instruction.replace("{prompt}", text)) for text in texts]
        rows = chat_template.tokenize_prompts(ids, max(map(len, ids)), (), self.tokenizer.pad_token_id)
        inputs = {"input_ids": rows.input_ids_BT, "attention_mask": rows.attention_BT}
        return self._generate(inputs, max_new_tokens)

    def answer(self, pixels_HWC: np.ndarray, question: str, max_new_tokens: int = 64) -> Completion:
        """The greedy answer to a question about one uint8 image, through the stock processor (which resizes)."""
        return self._generate(self.question(pixels_HWC, question), max_new_tokens)[0]

    def question(self, pixels_HWC: np.ndarray, question: str) -> dict[str, Tensor]:
        """Stock inputs (ids, masks, pixel values) for one image and one question."""
        # The stock processor reads special tokens anywhere in the text: a question must not open or close a turn.
        parts = [{"type": "image"}, {"type": "text", "text": chat_template.harmless(question, self.tokenizer)}]
        chat = [{"role": "user", "content": parts}]
        processor: Any = self.adapter.processor(self.model.config, self.tokenizer, self.image_processor)
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        image = _channels_first(pixels_HWC[None])[0]
        # Some chat templates write the first token themselves.
        has_bos = text.startswith(self.tokenizer.bos_token or "\0")
        return dict(processor(text=[text], images=[image], add_special_tokens=not has_bos, return_tensors="pt"))

    @torch.no_grad()
    def logits(self, **inputs: Tensor) -> Tensor:
        """The stock model's logits (B, T, vocabulary) on stock inputs, e.g. those of `question`."""
        return self.model(**self._on_device(inputs), use_cache=False).logits

    @torch.no_grad()
    def _generate(self, inputs: dict[str, Tensor], max_new_tokens: int) -> list[Completion]:
        # Greedy: the sampling settings that checkpoints ship would only raise warnings.
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        ids_BT = self.model.generate(**self._on_device(inputs), max_new_tokens=max_new_tokens, **greedy)
        written_BT = ids_BT[:, inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(written_BT, skip_special_tokens=True)
        end = self.model.generation_config.eos_token_id
        ends, rows = set(end) if isinstance(end, list) else {end}, written_BT.tolist()
        return [Completion(text.strip(), ends.isdisjoint(row)) for text, row in zip(texts, rows, strict=True)]

    def _on_device(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.device, self.model.dtype if value.is_floating_point() else None)
                for name, value in inputs.items()}  # fmt: skip


def _channels_first(pixels_BHWC: np.ndarray | Tensor) -> Tensor:
    pixels_BHWC = torch.as_tensor(pixels_BHWC)
    if pixels_BHWC.dtype != torch.uint8 or pixels_BHWC.ndim != 4 or pixels_BHWC.shape[-1] != 3:
        raise ValueError(f"images are uint8 (B, H, W, 3), not {pixels_BHWC.dtype} {tuple(pixels_BHWC.shape)}")
    return pixels_BHWC.permute(0, 3, 1, 2)
