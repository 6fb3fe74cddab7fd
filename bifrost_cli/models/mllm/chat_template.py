"""Prompts as the branch reads them: chat template, left padding, truncation, positions and attention masks; as
published (Bifrost-1, arXiv 2508.05954), and pinned by tests/vectors. Legend: B batch, T text tokens, P patches.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

PADDING_POSITION = 1
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
REQUEST = "Generate an image of "
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
OPENING = "<|vision_start|>"
_PLACEHOLDER = "(the prompt)"
_DROPPED = ("Cc", "Cf")

# The published list has 19 openers. Not all of them are known here: the others are what captioning models write most.
_VERBS = "prominently features,features,depicts,displays,captures,presents,contains,showcases,shows,is of"
CAPTION_OPENERS = (
    "The image you sent shows",
    *(f"The image {verb}" for verb in _VERBS.split(",")),
    "An image of",
    *(f"This image {verb}" for verb in ("features", "depicts", "shows")),
    *(f"This is {medium} of" for medium in ("an image", "a picture", "a photo")),
    "In this image,",
)


@dataclass(frozen=True)
class TokenizedPrompts:
    """Left-padded prompts, int64; attention is 1 at real tokens, and positions are those of every rotary axis."""

    input_ids_BT: Tensor
    attention_BT: Tensor
    position_ids_BT: Tensor
    truncated: tuple[bool, ...]


@dataclass(frozen=True)
class ChatTemplate:
    """Turns prompts into ids of a chat: `head`, `lead` + text + `trail`, `tail` and, to generate, `opening`. Head, tail
    and opening are tokenized with their special tokens; what stands between is tokenized in one piece as ordinary
    characters, so that no prompt can open or close a turn. The defaults are as published: the text ends right after
    `<|vision_start|>`."""

    tokenizer: Any
    head: str = SYSTEM
    lead: str = ""
    trail: str = ""
    tail: str = ANSWER
    opening: str = OPENING

    @classmethod
    def of_chat(cls, tokenizer: Any, opening: str) -> ChatTemplate:
        """The tokenizer's own chat template around a user turn, up to where the assistant's text begins; `opening`
        stands before the first image token that the branch generates."""
        chat = [{"role": "user", "content": [{"type": "text", "text": _PLACEHOLDER}]}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        start = tokenizer.decode(tokenizer("")["input_ids"])  # what the tokenizer puts before every text
        before, after = (text if text.startswith(start) else start + text).split(_PLACEHOLDER)
        special = "|".join(map(re.escape, sorted(tokenizer.get_added_vocab(), key=len, reverse=True)))
        last = max((match.end() for match in re.finditer(special, before)), default=0)
        first = min((match.start() for match in re.finditer(special, after)), default=len(after))
        return cls(tokenizer, before[:last], before[last:], after[:first], after[first:], opening)

    def ids(self, prompt: str) -> list[int]:
        """Ids of the whole template text around one prompt; the empty prompt gives the unconditional text."""
        return self._around(REQUEST + prompt, self.tail + self.opening)

    def turn(self, text: str) -> list[int]:
        """Ids of a user turn, up to where the assistant's text begins."""
        return self._around(text, self.tail)

    def closing(self) -> list[int]:
        """Ids at the end of every prompt, truncated or not."""
        first, second = self.ids("a")[::-1], self.ids("b")[::-1]
        common = next(index for index, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
        return first[:common][::-1]

    def _around(self, text: str, tail: str) -> list[int]:
        # The pieces meet at special tokens or where the pre-tokenizer splits anyway: the ids are those of one text.
        ids: list[int] = []
        for piece, special in (self.head, True), (self.lead + text + self.trail, False), (tail, True):
            ids += self.tokenizer(piece, add_special_tokens=False, split_special_tokens=not special)["input_ids"]
        return ids


def chat_text(prompt: str) -> str:
    """The published template text around one prompt."""
    return SYSTEM + REQUEST + prompt + ANSWER + OPENING


def user_turn(text: str) -> str:
    """The published template text of a user turn, up to where the assistant's text begins."""
    return SYSTEM + text + ANSWER


def join_plan(prompt: str, plan: str | None) -> str:
    """The prompt and the plan that the MLLM wrote for it, as the branch reads them."""
    return f"{prompt}\n{plan}" if plan else prompt


def harmless(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text with a space inside everything that the tokenizer would read as one of its added tokens, also in other
    letters: CLIP's lower-cases, T5's takes wide letters for narrow ones and drops control characters."""
    tokens = [token for token in tokenizer.get_added_vocab() if token.strip()]
    pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)", re.IGNORECASE)
    plain = "".join(char for char in unicodedata.normalize("NFKC", text) if unicodedata.category(char) not in _DROPPED)
    if not pattern.search(text):
        if not pattern.search(plain):
            return text
        text = plain
    return pattern.sub(lambda match: f"{match[0][:1]} {match[0][1:]}", text)


def tokenize_prompts(
    ids: Sequence[Sequence[int]], text_length: int, closing: Sequence[int], pad_id: int
) -> TokenizedPrompts:
    """Left-pad rows of ids to `text_length`; longer ones are cut on the right, and end with `closing`, too."""
    if text_length < len(closing):
        raise ValueError(f"{text_length} text tokens cannot hold the {len(closing)} closing tokens of the template")
    cut = text_length - len(closing)
    rows = [[*row] if len(row) <= text_length else [*row[:cut], *closing] for row in ids]
    padded = [(text_length - len(row), row) for row in rows]
    return TokenizedPrompts(
        input_ids_BT=torch.tensor([[pad_id] * padding + row for padding, row in padded]),
        attention_BT=torch.tensor([[0] * padding + [1] * len(row) for padding, row in padded]),
        position_ids_BT=torch.tensor([[PADDING_POSITION] * padding + list(range(len(row))) for padding, row in padded]),
        truncated=tuple(len(row) > text_length for row in ids),
    )


def text_mask(attention_BT: Tensor) -> Tensor:
    """allowed_BTT bool: text attends to real text up to itself; padding attends to nothing."""
    real_BT = attention_BT.bool()
    causal_TT = torch.ones(real_BT.shape[1], real_BT.shape[1], dtype=torch.bool, device=real_BT.device).tril()
    return causal_TT & real_BT[:, None, :] & real_BT[:, :, None]


def image_mask(attention_BT: Tensor, patches: int) -> Tensor:
    """allowed_BPS bool, S = T + P: image tokens attend to all real text and all image tokens."""
    real_BT = attention_BT.bool()
    columns_BS = torch.cat([real_BT, real_BT.new_ones(real_BT.shape[0], patches)], dim=1)
    return columns_BS[:, None, :].expand(-1, patches, -1)


def additive(allowed_BQK: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask (B, 1, Q, K) of stock attention: 0 where allowed, else the lowest number that is finite in `dtype` and
    in bfloat16, to which autocast takes it: a row that may see nothing would become NaN. Not a boolean mask,
    which transformers' eager attention silently adds as if it were numbers."""
    zeros = torch.zeros(allowed_BQK.shape, dtype=dtype, device=allowed_BQK.device)
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min)
    return zeros.masked_fill(~allowed_BQK, lowest)[:, None]


def clean_caption(caption: str) -> str:
    """The published cleaning of training captions: a known opener is removed, and the rest capitalised (which
    lower-cases all but the first letter, including names)."""
    for opener in CAPTION_OPENERS:
        if caption.startswith(opener):
            return caption[len(opener) :].strip().capitalize()
    return caption
