"""The tiny tokenizers: every word is one token, and the vocabulary is the same in every process."""

from __future__ import annotations

import hashlib
import json

from bifrost_cli.toy_system.tiny_models import clip_tokenizer, qwen_tokenizer

WORDS = ("red", "circle", "blue", "square", "a", "above", "Picture", "of")


def test_the_vocabulary_is_that_of_any_other_run():
    """The trainer orders the ends of words by a hash of its own process: a golden digest is the test."""
    vocabulary = sorted(clip_tokenizer(WORDS).get_vocab().items())
    assert hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:12] == "6dd77f595778"


def test_every_word_is_one_token_and_others_fall_apart():
    clip = clip_tokenizer(WORDS)
    assert clip.tokenize("A red picture") == ["a</w>", "red</w>", "picture</w>"]
    assert len(clip.tokenize("zebra")) == 5 and clip.decode(clip("a red zebra")["input_ids"], True) == "a red zebra"
    assert clip("red")["input_ids"][-1] == max(clip.get_vocab().values())
    assert qwen_tokenizer(WORDS).tokenize("red circle") == ["red", "Ġcircle"]
