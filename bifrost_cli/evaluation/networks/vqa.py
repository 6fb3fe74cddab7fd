"""A multimodal LLM as a judge: the probability that the answer to a question about an image is yes.

The first word's probabilities decide, so that an answer in many words, or in none, is still one of the two.
"""

from __future__ import annotations

from math import isnan
from typing import Any

import numpy as np

from bifrost_cli.errors import ArtifactError, DataError
from bifrost_cli.models.mllm.frozen_mllm import Mllm

ANSWERS = {"yes": ("yes", "Yes", " yes", " Yes", "YES"), "no": ("no", "No", " no", " No", "NO")}
INSTRUCTION = "{question} Answer yes or no."


class VqaJudge:
    """ArtifactError BF-ART-009: a tokenizer that does not tell yes from no."""

    def __init__(self, mllm: Mllm, name: str) -> None:
        self._mllm = mllm
        first = {answer: {token for word in words if (token := self._first(word)) is not None}
                 for answer, words in ANSWERS.items()}  # fmt: skip
        self._yes, self._no = sorted(first["yes"] - first["no"]), sorted(first["no"] - first["yes"])
        if not (self._yes and self._no):
            raise ArtifactError(f"{name} has no words for yes and no, so it cannot judge", fix="give another --judge",
                                code="BF-ART-009")  # fmt: skip
        self.device = str(mllm.device)
        self.identity: dict[str, Any] = {"name": name, "weights": mllm.weights_hash(), "instruction": INSTRUCTION}

    def yes(self, rgb_HWc: np.ndarray, question: str) -> float:
        """P(yes) / (P(yes) + P(no)) of the first token, over the ways to write them. DataError: that is no number."""
        inputs = self._mllm.question(rgb_HWc, INSTRUCTION.format(question=question))
        last_V = self._mllm.logits(**inputs)[0, -1].double()
        share = float((last_V[self._yes].logsumexp(0) - last_V[self._no].logsumexp(0)).sigmoid())
        if isnan(share):
            raise DataError(f"{self.identity['name']} gives no number for {question!r}", code="BF-DATA-009",
                            fix="damaged weights, or a dtype too small: --set models.dtype=float32")  # fmt: skip
        return share

    def _first(self, word: str) -> int | None:
        """The first token of a word; None for a word that the tokenizer does not know."""
        tokenizer = self._mllm.tokenizer
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        return ids[0] if ids and ids[0] != tokenizer.unk_token_id else None
