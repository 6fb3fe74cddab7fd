"""Decoders that can be copied into a branch: stock text models that keep keys and values of every token they read.

A copy needs layers of `self_attn` and `mlp` between two norms, a final `norm`, one rotary embedding for all layers, and
full attention.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, Cache, PreTrainedConfig

DECODERS = ("llama", "mistral", "qwen2", "qwen2_5_vl_text", "qwen3_vl_text")
_CACHE = ("cache", "past_key_values")  # transformers from 5.24 on, and before


def decoder_config(values: dict[str, Any]) -> PreTrainedConfig:
    """The stock configuration of JSON values, of the class that `model_type` names.

    Raises:
        ValueError: a decoder that cannot be copied.
    """
    kind = values["model_type"]
    if kind not in DECODERS:
        raise ValueError(f"a decoder of type {kind!r} cannot be copied; known are {', '.join(DECODERS)}")
    return AutoConfig.for_model(**values)


def new_decoder(text_config: PreTrainedConfig) -> nn.Module:
    """An untrained stock decoder without its embedding table, in the default dtype."""
    # A vocabulary of one: the table is dropped at once, and must not cost 2 GB until then.
    no_words = {"vocab_size": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = decoder_config({**text_config.to_dict(), **no_words})
    config._attn_implementation = text_config._attn_implementation
    with torch.random.fork_rng(devices=[]):
        kind: Any = MODEL_MAPPING[type(config)]
        decoder = kind(config)
    decoder.embed_tokens = None
    return decoder


def with_cache(module: nn.Module, cache: Cache) -> dict[str, Cache]:
    """The cache as the keyword argument of a stock model or layer, which transformers renamed.

    Raises:
        TypeError: it has no such argument, and would silently ignore the cache.
    """
    kind: Any = type(module)
    return {_cache_name(kind): cache}


@lru_cache
def _cache_name(kind: Any) -> str:
    parameters = inspect.signature(kind.forward).parameters
    for name in _CACHE:
        if name in parameters:
            return name
    raise TypeError(f"{kind.__name__} of this version of transformers takes neither {' nor '.join(_CACHE)}")
