"""`bifrost bench decode`: masked sampling over a prompt's cache against a plain loop as in the published code.

Both run on the same random weights, and their outputs are compared. The plain loop is for measuring alone.
B batch, T text tokens, P patches, S = T + P, D width, C latent channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from bifrost_cli.errors import RecipeError, UsageError
from bifrost_cli.models.branch.masking import mask_from_orders, mask_schedule, random_orders, sample_masked
from bifrost_cli.models.branch.visual_branch import VisualBranch
from bifrost_cli.models.mllm.chat_template import TokenizedPrompts, additive, image_mask, text_mask, tokenize_prompts
from bifrost_cli.models.mllm.frozen_mllm import Mllm
from bifrost_cli.planning.bench.paired import BenchRow, BenchSetup, compare, random_weights
from bifrost_cli.planning.model_configs import configs

UNCONDITIONAL_TOKENS = 25  # what the template makes of an empty prompt with Qwen's tokenizer
PROMPT_TOKENS = 64
HEAD_WIDTH = 64
PROMPTS = 2
GUIDANCE = (3.0, 1.0)


def bench_decode(setup: BenchSetup) -> Iterator[BenchRow]:
    """Both loops with guidance and without (weight 1), the prompt's encoding included; a row for each.

    The plain loop pads a prompt to `text` tokens, as the published code does; ours needs no padding. `tokens` are
    patches; more `steps` favour ours, which encodes the prompt once. UsageError: a width that is not whole heads.
    """
    sizes, device = setup.sizes, setup.device
    mllm, branch = random_models(setup)
    tokens, text, steps = branch.patches, sizes.get("text", setup.recipe.branch.max_text_tokens), sizes.get("steps", 16)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (PROMPTS, min(PROMPT_TOKENS, text)), generator=generator).tolist()
    empty = [ids[0][:UNCONDITIONAL_TOKENS]] * PROMPTS
    padded = [tokenize_prompts(rows, text, (), 0) for rows in (ids, empty)]
    short = [tokenize_prompts(rows, len(rows[0]), (), 0) for rows in (ids, empty)]
    orders_BP = random_orders(PROMPTS, tokens, generator).to(device)

    def ours(guidance: float) -> Tensor:
        conditional, empty = short
        unconditional = mllm.encode_prompts(empty) if guidance != 1.0 else None
        return sample_masked(branch, mllm.encode_prompts(conditional), unconditional, steps=steps, guidance=guidance,
                             orders_BP=orders_BP)  # fmt: skip

    def plain(guidance: float) -> Tensor:
        return plain_decode(mllm, branch, *padded, steps=steps, guidance=guidance, orders_BP=orders_BP)

    shape = f"{tokens} tokens in {steps} steps, width {mllm.width}, {len(mllm.decoder.layers)} layers"
    for weight in GUIDANCE:
        yield compare(
            f"decode of {shape}, guidance {weight:g}", partial(ours, weight), partial(plain, weight), setup=setup,
            baseline="the published loop", flops=True, difference=lambda a, b: float((a - b).abs().max()),
        )  # fmt: skip


@torch.no_grad()
def plain_decode(
    mllm: Mllm, branch: VisualBranch, text: TokenizedPrompts, uncond_text: TokenizedPrompts, *, steps: int,
    guidance: float, orders_BP: Tensor,
) -> Tensor:  # fmt: skip
    """The published loop: at every step the whole sequence, both guidance halves, both weight sets on every token."""
    batch, patches = orders_BP.shape
    embed, head = cast(nn.Module, mllm.decoder.embed_tokens), cast(nn.Module, branch.vision_head)
    ids_BT, attention_BT, positions_BT = (
        torch.cat([getattr(half, name) for half in (text, uncond_text)]).to(mllm.device)
        for name in ("input_ids_BT", "attention_BT", "position_ids_BT")
    )
    positions_BS = nn.functional.pad(positions_BT, (0, patches))
    text_BTS = nn.functional.pad(text_mask(attention_BT), (0, patches))
    mask_B1SS = additive(torch.cat([text_BTS, image_mask(attention_BT, patches)], dim=1), mllm.model.dtype)
    orders_BP = orders_BP.to(mllm.device)
    latents_BPC = torch.zeros(batch, patches, branch.channels, device=mllm.device)
    masked_BP = torch.ones_like(orders_BP, dtype=torch.bool)
    for masked in mask_schedule(patches, steps):
        shown_BPD = torch.where(masked_BP[..., None], branch.mask_token, latents_BPC) + branch.position_embedding
        inputs_BSD = torch.cat([embed(ids_BT), shown_BPD.repeat(2, 1, 1)], dim=1)
        hidden_BSD = both_passes(mllm, branch, inputs_BSD, positions_BS, mask_B1SS)
        conditional, unconditional = head(hidden_BSD)[:, -patches:].chunk(2)
        still_BP = mask_from_orders(orders_BP, torch.full_like(orders_BP[:, 0], masked))
        predicted_BPC = unconditional + guidance * (conditional - unconditional)
        latents_BPC = torch.where((masked_BP & ~still_BP)[..., None], predicted_BPC, latents_BPC)
        masked_BP = still_BP
    return latents_BPC


def both_passes(mllm: Mllm, branch: VisualBranch, x_BSD: Tensor, positions_BS: Tensor, mask_B1SS: Tensor) -> Tensor:
    """Two decoders as one: both weight sets are applied to every token, and a 0/1 mask picks."""
    decoders: tuple[Any, Any] = (mllm.decoder, branch.decoder)
    index_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
    image_BS1 = (index_S >= len(index_S) - branch.patches).long().expand(len(x_BSD), -1)[..., None]

    def both(modules: tuple[Any, Any], name: str, value: Tensor) -> Tensor:
        first, second = (module.get_submodule(name) for module in modules)
        return second(value) * image_BS1 + first(value) * (1 - image_BS1)

    rotary = decoders[0].rotary_emb(x_BSD, positions_BS)
    for layers in zip(decoders[0].layers, decoders[1].layers, strict=True):
        attention, normed = layers[0].self_attn, both(layers, "input_layernorm", x_BSD)
        query, key, value = (
            both(layers, f"self_attn.{name}", normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        key, value = (part.repeat_interleave(attention.num_key_value_groups, dim=1) for part in (key, value))
        weights = (query @ key.transpose(2, 3)) * attention.scaling + mask_B1SS
        mixed = weights.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value
        x_BSD = x_BSD + both(layers, "self_attn.o_proj", mixed.transpose(1, 2).flatten(2))
        x_BSD = x_BSD + both(layers, "mlp", both(layers, "post_attention_layernorm", x_BSD))
    return both(decoders, "norm", x_BSD)


def random_models(setup: BenchSetup) -> tuple[Mllm, VisualBranch]:
    """A Qwen2.5-VL and its branch with random weights: of the recipe's widths, or of the given ones."""
    hidden = setup.sizes.get("hidden")
    if hidden is not None:
        config, tokens = _small_config(hidden, setup.sizes.get("layers", 8)), setup.sizes.get("tokens", 256)
    else:
        config = AutoConfig.from_pretrained(configs(setup.recipe.models.mllm), trust_remote_code=False)
        tokens = setup.sizes.get("tokens", (setup.recipe.images.input_size // 28) ** 2)
    if config.model_type != "qwen2_5_vl":
        raise RecipeError(f"the published loop is of Qwen2.5-VL, not of {config.model_type}",
                          fix="leave out --recipe, or give --hidden and --layers")  # fmt: skip
    with random_weights(setup):
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
        nothing: Any = None  # neither tokenizer nor image processor is read
        mllm = Mllm(model, nothing, nothing)
        branch = VisualBranch.from_mllm(mllm, tokens).eval()
        with torch.no_grad():
            for parameter in branch.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
    return mllm, branch


def _small_config(hidden: int, layers: int) -> Qwen2_5_VLConfig:
    if hidden < HEAD_WIDTH or hidden % HEAD_WIDTH:
        raise UsageError(f"the width {hidden} is not a multiple of {HEAD_WIDTH}, the width of one head")
    heads = hidden // HEAD_WIDTH
    text = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers, "vocab_size": 256,
            "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4),
            "bos_token_id": None, "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12]}}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": hidden}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=1, video_token_id=2)
