"""The prompt as the branch reads it: chat template, left padding, truncation, positions and masks.

In: prompts as strings or token ids. Out: `StoreLayout` tensors and the two attention masks. Knows no model and no weights.
B batch, T text tokens, P patches. Semantics as published (Bifrost-1, arXiv 2508.05954), pinned by tests/vectors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

PADDING_POSITION = 1
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
REQUEST = "Generate an image of "
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
OPENING = "<|vision_start|>"
_MARK = "(the prompt)"

# The published list has 19 openers, of which two could be read ("The image shows", "This is an image of").
# The other 17 are the ones that captioning models write most; longer ones stand first so that they win.
CAPTION_OPENERS = (
    "The image you sent shows",
    "The image prominently features",
    "The image features",
    "The image depicts",
    "The image displays",
    "The image captures",
    "The image presents",
    "The image contains",
    "The image showcases",
    "The image shows",
    "The image is of",
    "An image of",
    "This image features",
    "This image depicts",
    "This image shows",
    "This is an image of",
    "This is a picture of",
    "This is a photo of",
    "In this image,",
)


@dataclass(frozen=True)
class TokenizedPrompts:
    """Left-padded prompts: input_ids_BT, attention_BT (1 = real) and position_ids_BT, int64; `truncated` rows.

    One rotary axis: where a decoder has three (M-RoPE), text stands at the same place on each of them.
    """

    input_ids_BT: Tensor
    attention_BT: Tensor
    position_ids_BT: Tensor
    truncated: tuple[bool, ...]


@dataclass(frozen=True)
class ChatTemplate:
    """Turns prompts into ids of a chat: `head`, then `lead` + text + `trail`, then `tail` and, to generate, `opening`.

    Head, tail and opening are read with their special tokens. What stands between is read in one piece and as ordinary
    characters, so that no prompt can open or close a turn. Defaults: as published, cut right after `<|vision_start|>`.
    """

    tokenizer: PreTrainedTokenizerBase
    head: str = SYSTEM
    lead: str = ""
    trail: str = ""
    tail: str = ANSWER
    opening: str = OPENING

    @classmethod
    def of_chat(cls, tokenizer: PreTrainedTokenizerBase, opening: str) -> ChatTemplate:
        """The tokenizer's own chat template around a user's turn, up to where the assistant's words begin."""
        asked = [{"role": "user", "content": [{"type": "text", "text": _MARK}]}]
        text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        start = tokenizer.decode(tokenizer("")["input_ids"])  # what the tokenizer puts before every text
        before, after = (text if text.startswith(start) else start + text).split(_MARK)
        known = "|".join(map(re.escape, sorted(tokenizer.get_added_vocab(), key=len, reverse=True)))
        into = max((found.end() for found in re.finditer(known, before)), default=0)
        out = min((found.start() for found in re.finditer(known, after)), default=len(after))
        return cls(tokenizer, before[:into], before[into:], after[:out], after[out:], opening)

    def ids(self, prompt: str) -> list[int]:
        """Ids of the whole template text around one prompt; the empty prompt gives the unconditional text."""
        return self._around(REQUEST + prompt, self.tail + self.opening)

    def turn(self, text: str) -> list[int]:
        """Ids of a user's turn, up to where the assistant's words begin."""
        return self._around(text, self.tail)

    def closing(self) -> list[int]:
        """Ids that end every prompt, truncated or not."""
        one, other = self.ids("a")[::-1], self.ids("b")[::-1]
        same = next(place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
        return one[:same][::-1]

    def _around(self, text: str, tail: str) -> list[int]:
        # The pieces meet at special tokens or where the pre-tokenizer splits anyway: the ids are those of one text.
        pieces = (self.head, True), (self.lead + text + self.trail, False), (tail, True)
        return [token for piece, special in pieces for token in self._tokenize(piece, special)]

    def _tokenize(self, text: str, special: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special)["input_ids"]


def chat_text(prompt: str) -> str:
    """The template text around one prompt, as a reader sees it."""
    return SYSTEM + REQUEST + prompt + ANSWER + OPENING


def user_turn(text: str) -> str:
    """A user's turn as a reader sees it, up to where the assistant's words begin."""
    return SYSTEM + text + ANSWER


def join_plan(prompt: str, plan: str | None) -> str:
    """What the branch reads when the MLLM has written a plan: the prompt, a line break, the plan."""
    return f"{prompt}\n{plan}" if plan else prompt


def harmless(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text with a space inside whatever the tokenizer would read as one of its added tokens."""
    for token in sorted(tokenizer.get_added_vocab(), key=len, reverse=True):
        text = text.replace(token, f"{token[:1]} {token[1:]}")
    return text


def tokenize_prompts(
    ids: Sequence[Sequence[int]], text_length: int, closing: Sequence[int], pad_id: int
) -> TokenizedPrompts:
    """Rows of ids, left-padded to text_length; longer ones cut on the right, their last ids replaced by `closing`.

    Text positions count 0, 1, ... from the first real token; padding holds position 1.
    """
    if text_length < len(closing):
        raise ValueError(f"{text_length} text tokens cannot hold the {len(closing)} closing tokens of the template")
    rows = [_fit(list(row), text_length, list(closing)) for row in ids]
    missing = [text_length - len(row) for row in rows]
    positions = [[PADDING_POSITION] * gap + list(range(len(row))) for gap, row in zip(missing, rows, strict=True)]
    return TokenizedPrompts(
        input_ids_BT=torch.tensor([[pad_id] * gap + row for gap, row in zip(missing, rows, strict=True)]),
        attention_BT=torch.tensor([[0] * gap + [1] * (text_length - gap) for gap in missing]),
        position_ids_BT=torch.tensor(positions),
        truncated=tuple(len(row) > text_length for row in ids),
    )


def text_mask(attention_BT: Tensor) -> Tensor:
    """allowed_BTT bool: text sees real text up to itself; rows of padding see nothing."""
    real_BT = attention_BT.bool()
    causal_TT = torch.ones(real_BT.shape[1], real_BT.shape[1], dtype=torch.bool, device=real_BT.device).tril()
    return causal_TT & real_BT[:, None, :] & real_BT[:, :, None]


def image_mask(attention_BT: Tensor, patches: int) -> Tensor:
    """allowed_BPS bool, S = T + P: image tokens see all real text and all image tokens."""
    real_BT = attention_BT.bool()
    columns_BS = torch.cat([real_BT, real_BT.new_ones(real_BT.shape[0], patches)], dim=1)
    return columns_BS[:, None, :].expand(-1, patches, -1)


def additive(allowed_BQK: Tensor, dtype: torch.dtype) -> Tensor:
    """The 4-D additive mask (B, 1, Q, K) that stock attention takes: 0 where allowed, else the lowest finite number.

    Additive on purpose: transformers' eager attention adds a boolean mask as if it were numbers, silently.
    """
    zeros = torch.zeros(allowed_BQK.shape, dtype=dtype, device=allowed_BQK.device)
    return zeros.masked_fill(~allowed_BQK, torch.finfo(dtype).min)[:, None]


def clean_caption(caption: str) -> str:
    """The published cleaning of captions: a known opener is cut, and then the rest is capitalised.

    `str.capitalize` also lower-cases all but the first letter, names included. For training captions only.
    """
    for opener in CAPTION_OPENERS:
        if caption.startswith(opener):
            return caption[len(opener) :].strip().capitalize()
    return caption


def _fit(row: list[int], length: int, closing: list[int]) -> list[int]:
    return row if len(row) <= length else row[: length - len(closing)] + closing
