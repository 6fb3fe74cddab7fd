"""`bifrost bench train`: a step of the branch's training against the published formulation of the same step.

Both run on the same random weights, rows and masks, and their losses are compared. A step is the pass forward and back,
without the optimizer's update, which is the same for both. The published formulation is for measuring alone.
B rows, T text tokens, P patches, S = T + P, C latent channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from bifrost_cli.models.branch.masking import draw_masks
from bifrost_cli.models.branch.visual_branch import VisualBranch
from bifrost_cli.models.mllm.chat_template import TokenizedPrompts, additive, image_mask, text_mask, tokenize_prompts
from bifrost_cli.models.mllm.frozen_mllm import Mllm
from bifrost_cli.planning.bench.bench_decode import PROMPT_TOKENS, both_passes, random_models
from bifrost_cli.planning.bench.paired import BenchRow, BenchSetup, compare

ROWS = 4  # of a batch on a GPU: the published formulation keeps S x S attention weights of each head


def bench_train(setup: BenchSetup) -> Iterator[BenchRow]:
    """One row: our step, the prompt's encoding included, against the published one.

    The published formulation pads every prompt to `text` tokens, and trains through both weight sets on every token.
    """
    sizes, device = setup.sizes, setup.device
    mllm, branch = random_models(setup)
    branch.train()
    rows, text = sizes.get("rows", ROWS), sizes.get("text", setup.recipe.branch.max_text_tokens)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (rows, min(PROMPT_TOKENS, text)), generator=generator).tolist()
    padded, short = tokenize_prompts(ids, text, (), 0), tokenize_prompts(ids, len(ids[0]), (), 0)
    latents_BPC = torch.randn(rows, branch.patches, branch.channels, generator=generator).to(device)
    masked_BP = draw_masks(rows, branch.patches, generator)

    def step(loss: Tensor) -> float:
        loss.backward()
        branch.zero_grad(set_to_none=True)
        return float(loss.detach())

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=setup.full)

    def ours() -> float:
        with autocast():
            loss, _ = branch.loss(latents_BPC, mllm.encode_prompts(short), masked_BP)
        return step(loss)

    def published() -> float:
        with autocast():
            loss = published_loss(mllm, branch, padded, latents_BPC, masked_BP)
        return step(loss)

    shape = f"{rows} rows of {branch.patches} tokens, width {mllm.width}, {len(mllm.decoder.layers)} layers"
    yield compare(
        f"training step of {shape}", ours, published, setup=setup, baseline="the published step", flops=True,
        work=(rows, "rows"), difference=lambda a, b: abs(a - b),
    )  # fmt: skip


def published_loss(
    mllm: Mllm, branch: VisualBranch, text: TokenizedPrompts, latents_BPC: Tensor, masked_BP: Tensor
) -> Tensor:
    """Mean squared error of all patches, from one pass over prompt and image in which both weight sets are applied to
    every token, with attention weights written out (Bifrost-1's published code)."""
    device, patches = latents_BPC.device, branch.patches
    ids_BT, attention_BT, positions_BT = (
        value.to(device) for value in (text.input_ids_BT, text.attention_BT, text.position_ids_BT)
    )
    masked_BP1 = masked_BP.to(device)[..., None]
    embed, head = cast(nn.Module, mllm.decoder.embed_tokens), cast(nn.Module, branch.vision_head)
    shown_BPD = torch.where(masked_BP1, branch.mask_token, latents_BPC) + branch.position_embedding
    text_BTS = nn.functional.pad(text_mask(attention_BT), (0, patches))
    allowed_BSS = torch.cat([text_BTS, image_mask(attention_BT, patches)], dim=1)
    hidden_BSD = both_passes(
        mllm,
        branch,
        torch.cat([embed(ids_BT).to(shown_BPD.dtype), shown_BPD], dim=1),
        nn.functional.pad(positions_BT, (0, patches)),
        additive(allowed_BSS, shown_BPD.dtype),
    )
    return nn.functional.mse_loss(head(hidden_BSD)[:, -patches:].float(), latents_BPC)
