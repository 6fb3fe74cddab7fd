"""The stock text models that a branch is a copy of; they keep keys and values of every token they read.

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

from bifrost_cli.errors import EnvironmentProblem

DECODERS = ("llama", "mistral", "qwen2", "qwen2_5_vl_text", "qwen3_vl_text")
_CACHE = ("cache", "past_key_values")  # transformers from 5.24 on, and before


def decoder_config(values: dict[str, Any]) -> PreTrainedConfig:
    """The stock configuration of JSON values, of the class that `model_type` names."""
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


def tune_decoder(decoder: Any, tune: dict[str, int]) -> None:
    """Freeze all but what is trained: with {"layers": n} the last n layers, with {"rank": r} low-rank additions to
    every linear layer (LoRA, arXiv 2106.09685), with alpha = r, in float32."""
    decoder.requires_grad_(False)
    if "layers" in tune:
        if tune["layers"] > len(decoder.layers):
            raise ValueError(f"the decoder has {len(decoder.layers)} layers, fewer than {tune['layers']}")
        decoder.layers[len(decoder.layers) - tune["layers"] :].requires_grad_(True)
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise EnvironmentProblem(
            "the branch is trained with LoRA, and peft is not installed",
            code="BF-ENV-002",
            fix="pip install 'bifrost-cli[lora]', or train with branch.tune=full",
        ) from None
    linear = [f"layers.{name}" for name, module in decoder.layers.named_modules() if isinstance(module, nn.Linear)]
    rank = tune["rank"]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=linear, init_lora_weights=False)
    inject_adapter_in_model(config, decoder)
    for parameter in decoder.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def with_cache(module: nn.Module, cache: Cache) -> dict[str, Cache]:
    """The cache as the keyword argument of a stock model or layer, which transformers renamed; TypeError when it has
    none, and would silently ignore the cache."""
    kind: Any = type(module)
    return {_cache_name(kind): cache}


@lru_cache
def _cache_name(kind: Any) -> str:
    parameters = inspect.signature(kind.forward).parameters
    for name in _CACHE:
        if name in parameters:
            return name
    raise TypeError(f"{kind.__name__} of this version of transformers takes neither {' nor '.join(_CACHE)}")
