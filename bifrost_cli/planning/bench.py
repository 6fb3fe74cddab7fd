"""`bifrost bench decode`: masked sampling over a prompt's cache against a plain loop as in the published code.

Both run on the same random weights; the result is CPU seconds (on a GPU wall seconds) of each, their ratio, and the
largest difference of their outputs. The plain loop is for measuring alone.
B batch, T text tokens, P patches, S = T + P, D width, C latent channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from bifrost_cli.errors import UsageError
from bifrost_cli.models.branch.masking import mask_from_orders, mask_schedule, random_orders, sample_masked
from bifrost_cli.models.branch.visual_branch import VisualBranch
from bifrost_cli.models.mllm.chat_template import TokenizedPrompts, additive, image_mask, text_mask, tokenize_prompts
from bifrost_cli.models.mllm.frozen_mllm import Mllm

UNCONDITIONAL_TOKENS = 25  # what the template makes of an empty prompt with Qwen's tokenizer
HEAD_WIDTH = 64


@dataclass(frozen=True)
class BenchRow:
    """Both loops at one guidance weight: their seconds, the ratio, and the largest difference of the latents."""

    guidance: float
    plain_seconds: float
    seconds: float
    ratio: float
    largest_difference: float

    def __str__(self) -> str:
        return (
            f"guidance {self.guidance:g}: plain {self.plain_seconds:.2f} s, ours {self.seconds:.2f} s, "
            f"{self.ratio:.1f} times less, outputs within {self.largest_difference:.1g}"
        )


def bench_decode(
    *,
    hidden: int = 512,
    layers: int = 8,
    tokens: int = 256,
    text: int = 300,
    prompt_tokens: int = 64,
    steps: int = 8,
    prompts: int = 2,
    guidance: float = 3.0,
    device: str = "cpu",
    on_row: Callable[[], None] = lambda: None,
) -> list[BenchRow]:
    """Time both loops with guidance and without (weight 1), the prompt's encoding included.

    Args:
        hidden: width of the decoder, a multiple of 64.
        layers: its layers.
        tokens: patches P.
        text: tokens to which the plain loop pads a prompt, as the published code does; ours needs no padding.
        prompt_tokens: tokens of a prompt.
        steps: decode steps; more of them favour ours, which encodes the prompt once.
        prompts: prompts B.
        guidance: the first guidance weight.
        device: torch device.
        on_row: called after each row.

    Returns:
        One row for each guidance weight.

    Raises:
        UsageError: a width that is not whole heads.
    """
    if hidden < HEAD_WIDTH or hidden % HEAD_WIDTH:
        raise UsageError(f"the width {hidden} is not a multiple of {HEAD_WIDTH}, the width of one head")
    mllm, branch = _random_models(hidden, layers, tokens, torch.device(device))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (prompts, min(prompt_tokens, text)), generator=generator).tolist()
    empty = [ids[0][:UNCONDITIONAL_TOKENS]] * prompts
    padded = [tokenize_prompts(rows, text, (), 0) for rows in (ids, empty)]
    short = [tokenize_prompts(rows, len(rows[0]), (), 0) for rows in (ids, empty)]
    orders_BP = random_orders(prompts, tokens, generator)
    rows = []
    for weight in (guidance, 1.0):
        settings: dict[str, Any] = {"steps": steps, "guidance": weight, "orders_BP": orders_BP}
        plain, plain_seconds = _timed(device, partial(plain_decode, mllm, branch, *padded, **settings))
        ours, seconds = _timed(device, partial(_decode, mllm, branch, *short, **settings))
        difference = float((plain - ours).abs().max())
        rows.append(BenchRow(weight, plain_seconds, seconds, plain_seconds / seconds, difference))
        on_row()
    return rows


@torch.no_grad()
def plain_decode(
    mllm: Mllm,
    branch: VisualBranch,
    text: TokenizedPrompts,
    uncond_text: TokenizedPrompts,
    *,
    steps: int,
    guidance: float,
    orders_BP: Tensor,
) -> Tensor:
    """The published loop: at every step the whole sequence, both guidance halves, both weight sets on every token."""
    batch, patches = orders_BP.shape
    embed, head = cast(nn.Module, mllm.decoder.embed_tokens), cast(nn.Module, branch.vision_head)
    halves = (text, uncond_text)
    ids_BT = torch.cat([half.input_ids_BT for half in halves]).to(mllm.device)
    attention_BT = torch.cat([half.attention_BT for half in halves]).to(mllm.device)
    positions_BT = torch.cat([half.position_ids_BT for half in halves]).to(mllm.device)
    positions_BS = nn.functional.pad(positions_BT, (0, patches))
    text_BTS = nn.functional.pad(text_mask(attention_BT), (0, patches))
    mask_B1SS = additive(torch.cat([text_BTS, image_mask(attention_BT, patches)], dim=1), mllm.model.dtype)
    orders_BP = orders_BP.to(mllm.device)
    latents_BPC = torch.zeros(batch, patches, branch.channels, device=mllm.device)
    masked_BP = torch.ones_like(orders_BP, dtype=torch.bool)
    for masked in mask_schedule(patches, steps):
        shown_BPD = torch.where(masked_BP[..., None], branch.mask_token, latents_BPC) + branch.position_embedding
        words_BTD = embed(ids_BT)
        inputs_BSD = torch.cat([words_BTD, shown_BPD.repeat(2, 1, 1)], dim=1)
        hidden_BSD = _both_passes(mllm, branch, inputs_BSD, positions_BS, mask_B1SS)
        conditional, unconditional = head(hidden_BSD)[:, -patches:].chunk(2)
        still_BP = mask_from_orders(orders_BP, torch.full_like(orders_BP[:, 0], masked))
        predicted_BPC = unconditional + guidance * (conditional - unconditional)
        latents_BPC = torch.where((masked_BP & ~still_BP)[..., None], predicted_BPC, latents_BPC)
        masked_BP = still_BP
    return latents_BPC


def _both_passes(mllm: Mllm, branch: VisualBranch, x_BSD: Tensor, positions_BS: Tensor, mask_B1SS: Tensor) -> Tensor:
    """Two decoders as one: both weight sets are applied to every token, and a 0/1 mask picks."""
    words: Any = mllm.decoder
    image: Any = branch.decoder
    index_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
    image_BS1 = (index_S >= len(index_S) - branch.patches).long().expand(len(x_BSD), -1)[..., None]

    def both(first: nn.Module, second: nn.Module, value: Tensor) -> Tensor:
        return second(value) * image_BS1 + first(value) * (1 - image_BS1)

    rotary = words.rotary_emb(x_BSD, positions_BS)
    for text_layer, image_layer in zip(words.layers, image.layers, strict=True):
        normed = both(text_layer.input_layernorm, image_layer.input_layernorm, x_BSD)
        heads = [
            both(getattr(text_layer.self_attn, name), getattr(image_layer.self_attn, name), normed)
            .unflatten(-1, (-1, text_layer.self_attn.head_dim)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        ]  # fmt: skip
        query, key = apply_rotary_pos_emb(heads[0], heads[1], *rotary)
        key, value = (
            part.repeat_interleave(text_layer.self_attn.num_key_value_groups, dim=1) for part in (key, heads[2])
        )
        weights = (query @ key.transpose(2, 3)) * text_layer.self_attn.scaling + mask_B1SS
        mixed = weights.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value
        x_BSD = x_BSD + both(
            text_layer.self_attn.o_proj, image_layer.self_attn.o_proj, mixed.transpose(1, 2).flatten(2)
        )
        normed = both(text_layer.post_attention_layernorm, image_layer.post_attention_layernorm, x_BSD)
        x_BSD = x_BSD + both(text_layer.mlp, image_layer.mlp, normed)
    return both(words.norm, image.norm, x_BSD)


def _decode(mllm: Mllm, branch: VisualBranch, text: TokenizedPrompts, uncond_text: TokenizedPrompts, **run) -> Tensor:
    unconditional = mllm.encode_prompts(uncond_text) if run["guidance"] != 1.0 else None
    return sample_masked(branch, mllm.encode_prompts(text), unconditional, **run)


def _random_models(hidden: int, layers: int, tokens: int, device: torch.device) -> tuple[Mllm, VisualBranch]:
    heads = hidden // HEAD_WIDTH
    text = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers, "vocab_size": 256,
            "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4),
            "bos_token_id": None, "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12]}}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": hidden}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=1, video_token_id=2)
    torch.manual_seed(0)
    model: Any = Qwen2_5_VLForConditionalGeneration(config)
    nothing: Any = None  # neither tokenizer nor image processor is read
    mllm = Mllm(model.to(device), nothing, nothing)
    branch = VisualBranch.from_mllm(mllm, tokens)
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape).to(device))
    return mllm, branch


def _timed(device: str, work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    gpu = torch.device(device).type == "cuda"
    # CPU time does not count other processes' share of a busy machine.
    clock = time.perf_counter if gpu else time.process_time
    if gpu:
        torch.cuda.synchronize()
    start = clock()
    result = work()
    if gpu:
        torch.cuda.synchronize()
    return result, clock() - start
