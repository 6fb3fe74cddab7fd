"""A stock decoder over image tokens, behind a prompt whose keys and values are cached.

Legend: B batch, P patches, n selected patches, T text tokens, D width, h key-value heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from bifrost_cli.models.branch.decoder_adapters import with_cache
from bifrost_cli.models.mllm.chat_template import additive, image_mask
from bifrost_cli.models.mllm.frozen_mllm import PromptCache


class FrozenCache(Cache):
    """A `PromptCache` as the cache of one call of a stock decoder, which never grows: nothing is copied or stored."""

    def __init__(self, prompt_cache: PromptCache) -> None:
        pairs = zip(prompt_cache.keys, prompt_cache.values, strict=True)
        super().__init__(layers=[_FrozenLayer(*pair) for pair in pairs])


class _FrozenLayer(DynamicLayer):
    """One layer of it: returns its keys and values in front of the new ones, and does not store those."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys = torch.cat([self.keys.to(key_states.dtype), key_states], dim=-2)
        return keys, torch.cat([self.values.to(value_states.dtype), value_states], dim=-2)


def forward_subset(
    decoder: Any, inputs_BPD: Tensor, position_ids_BP: Tensor, prompt_cache: PromptCache, subset_Bn: Tensor
) -> Tensor:
    """Hidden states of some patches only.

    The last layer needs keys and values of all patches, but queries and its MLP only where a prediction is needed: with
    L layers this saves about 1/L of a decode step.

    Args:
        decoder: a stock decoder (see `decoder_adapters`).
        inputs_BPD: embedded image tokens.
        position_ids_BP: their rotary positions.
        prompt_cache: the prompts.
        subset_Bn: indices of the selected patches.

    Returns:
        hidden_BnD after the final norm.
    """
    mask = additive(image_mask(prompt_cache.attention_BT, inputs_BPD.shape[1]), inputs_BPD.dtype)
    cache, rotary = FrozenCache(prompt_cache), decoder.rotary_emb(inputs_BPD, position_ids_BP)
    hidden_BPD = inputs_BPD
    for layer in decoder.layers[:-1]:
        hidden_BPD = layer(hidden_BPD, attention_mask=mask, position_embeddings=rotary, **with_cache(layer, cache))
    last, count = decoder.layers[-1], subset_Bn.shape[1]
    cache.layers[-1] = _FrozenLayer(*_with_patches(last.self_attn, last.input_layernorm(hidden_BPD), rotary, cache))
    # The stock layer appends the selected patches' own keys once more: those columns are masked.
    repeated = mask.new_full((*mask.shape[:2], count, count), torch.finfo(mask.dtype).min)
    hidden_BnD = last(
        _take(hidden_BPD, subset_Bn),
        attention_mask=torch.cat([mask[:, :, :count], repeated], dim=-1),
        position_embeddings=tuple(_take(part, subset_Bn) for part in rotary),
        **with_cache(last, cache),
    )
    return decoder.norm(hidden_BnD)


def _with_patches(
    attention: Any, normed_BPD: Tensor, rotary: tuple[Tensor, Tensor], cache: FrozenCache
) -> tuple[Tensor, Tensor]:
    """A layer's keys and values of the prompt and of all patches, (B, h, T + P, d) each."""
    keys_BPhd, values_BPhd = (
        projection(normed_BPD).unflatten(-1, (-1, attention.head_dim))
        for projection in (attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "k_norm"):  # Qwen3 norms the keys of every head
        keys_BPhd = attention.k_norm(keys_BPhd)
    keys_BhPd, values_BhPd = keys_BPhd.transpose(1, 2), values_BPhd.transpose(1, 2)
    # Every decoder of decoder_adapters rotates whole heads, by this formula.
    keys_BhPd, _ = apply_rotary_pos_emb(keys_BhPd, keys_BhPd, *rotary)
    layer: Any = cache.layers[attention.layer_idx]
    return layer.update(keys_BhPd, values_BhPd)


def _take(value_BPD: Tensor, subset_Bn: Tensor) -> Tensor:
    return value_BPD.gather(1, subset_Bn[..., None].expand(-1, -1, value_BPD.shape[-1]))
