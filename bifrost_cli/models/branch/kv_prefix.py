"""A stock decoder over image tokens, behind a prompt whose keys and values are given.

In: a stock decoder (see decoder.py), a `PromptCache`, embedded image tokens. Out: hidden states. Knows no latents and
nothing of the decode loop.
B batch, P patches, n wanted patches, T text tokens, D width, h key-value heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicLayer
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from bifrost_cli.models.branch.decoder_adapters import with_cache
from bifrost_cli.models.mllm.chat_template import additive, image_mask
from bifrost_cli.models.mllm.frozen_mllm import PromptCache


class FrozenCache(Cache):
    """A prompt's keys and values for one call of a stock decoder; nothing is copied and nothing is stored."""

    def __init__(self, prefix: PromptCache) -> None:
        super().__init__(layers=[_PrefixLayer(*pair) for pair in zip(prefix.keys, prefix.values, strict=True)])


class _PrefixLayer(DynamicLayer):
    """One layer: its keys and values are returned in front of the new ones, never stored with them."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys = torch.cat([self.keys.to(key_states.dtype), key_states], dim=-2)
        return keys, torch.cat([self.values.to(value_states.dtype), value_states], dim=-2)


def forward_subset(
    decoder: nn.Module, inputs_BPD: Tensor, position_ids_BP: Tensor, prefix: PromptCache, wanted_Bn: Tensor
) -> Tensor:
    """hidden_BnD after the final norm of the wanted patches only.

    The last layer needs keys and values of all patches, but queries and its MLP only where a prediction is wanted: with
    L layers that is about 1/L of a decode step.
    """
    mask = additive(image_mask(prefix.attention_BT, inputs_BPD.shape[1]), inputs_BPD.dtype)
    cache, rotary = FrozenCache(prefix), decoder.rotary_emb(inputs_BPD, position_ids_BP)
    hidden_BPD = inputs_BPD
    for layer in decoder.layers[:-1]:
        hidden_BPD = layer(hidden_BPD, attention_mask=mask, position_embeddings=rotary, **with_cache(layer, cache))
    last = decoder.layers[-1]
    cache.layers[-1] = _PrefixLayer(*_with_patches(last.self_attn, last.input_layernorm(hidden_BPD), rotary, cache))
    # The stock layer adds the wanted patches' own keys once more, at the end: those columns are masked.
    again = mask.new_full((*mask.shape[:2], wanted_Bn.shape[1], wanted_Bn.shape[1]), torch.finfo(mask.dtype).min)
    hidden_BnD = last(
        _take(hidden_BPD, wanted_Bn),
        attention_mask=torch.cat([mask[:, :, : wanted_Bn.shape[1]], again], dim=-1),
        position_embeddings=tuple(_take(part, wanted_Bn) for part in rotary),
        **with_cache(last, cache),
    )
    return decoder.norm(hidden_BnD)


def _with_patches(
    attention: nn.Module, normed_BPD: Tensor, rotary: tuple[Tensor, Tensor], cache: FrozenCache
) -> tuple[Tensor, Tensor]:
    """A layer's keys and values of the prompt and of all patches, (B, h, T + P, d) each."""
    keys_BPhd, values_BPhd = (
        projection(normed_BPD).unflatten(-1, (-1, attention.head_dim))
        for projection in (attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "k_norm"):  # Qwen3 norms the keys of every head
        keys_BPhd = attention.k_norm(keys_BPhd)
    keys_BhPd, values_BhPd = keys_BPhd.transpose(1, 2), values_BPhd.transpose(1, 2)
    # Every decoder of decoder.py turns whole heads, by this formula.
    keys_BhPd, _ = apply_rotary_pos_emb(keys_BhPd, keys_BhPd, *rotary)
    return cache.layers[attention.layer_idx].update(keys_BhPd, values_BhPd)


def _take(value_BPD: Tensor, wanted_Bn: Tensor) -> Tensor:
    return value_BPD.gather(1, wanted_Bn[..., None].expand(-1, -1, value_BPD.shape[-1]))
