"""Masked autoregression: patch latents from a prompt, a few patches a step, along a given random order.

In: a branch, the prompt's prefix (and the empty prompt's, for guidance), orders. Out: latents. It draws no random
numbers and encodes no text. The prompt is not touched again: a step costs one pass of the branch over the P patches.
B batch, P patches, C latent channels, D width, n patches revealed in one step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bifrost_cli.models.branch.masking import mask_from_orders, mask_schedule
from bifrost_cli.models.branch.visual_branch import VisualBranch
from bifrost_cli.models.mllm.frozen_mllm import PromptCache


@torch.no_grad()
def sample_masked(
    branch: VisualBranch,
    prefix: PromptCache,
    uncond_prefix: PromptCache | None = None,
    *,
    steps: int,
    orders_BP: Tensor,
    guidance: float = 1.0,
    noise_BPC: Tensor | None = None,
    callback: Callable[[int, Tensor, Tensor], object] | None = None,
) -> Tensor:
    """Latents_BPC float32 in the encoder's own scale, from a fully masked start.

    The first entries of an order are revealed last. guidance w: u + w * (c - u) with u from `uncond_prefix`; at w = 1
    that half is not run. noise_BPC: what a flow head starts each patch from. callback(step, latents_BPC, masked_BP) is
    called after every step, counted from 0; masked_BP is what is still to be predicted, and what it raises ends the
    loop. ValueError: guidance without an unconditional prefix, orders of another size.
    """
    if guidance != 1.0 and uncond_prefix is None:
        raise ValueError(f"guidance {guidance} needs the prefix of the empty prompt")
    if orders_BP.shape[1] != branch.patches:
        raise ValueError(f"orders of {orders_BP.shape[1]} patches for a branch of {branch.patches}")
    batch, patches = orders_BP.shape
    orders_BP = orders_BP.to(branch.mask_token.device)
    latents_BPC = torch.zeros(batch, patches, branch.channels, device=orders_BP.device)
    prefixes = [prefix] if guidance == 1.0 else [prefix, uncond_prefix]
    masked_BP, masked = torch.ones_like(orders_BP, dtype=torch.bool), patches
    for step, kept in enumerate(mask_schedule(patches, steps)):
        revealed_Bn = orders_BP[:, kept:masked]
        if revealed_Bn.shape[1]:
            new_BnC = _predict(branch, prefixes, latents_BPC, masked_BP, revealed_Bn, guidance, noise_BPC)
            latents_BPC = latents_BPC.scatter(1, _across(revealed_Bn, branch.channels), new_BnC)
        masked_BP = mask_from_orders(orders_BP, torch.full_like(orders_BP[:, 0], kept))
        masked = kept
        if callback is not None:
            callback(step, latents_BPC, masked_BP)
    return latents_BPC


def _predict(
    branch: VisualBranch,
    prefixes: list[PromptCache],
    latents_BPC: Tensor,
    masked_BP: Tensor,
    revealed_Bn: Tensor,
    guidance: float,
    noise_BPC: Tensor | None,
) -> Tensor:
    """New latents_BnC of the patches that this step reveals."""
    hidden = [branch.hidden(latents_BPC, masked_BP, prefix, revealed_Bn) for prefix in prefixes]
    noise_BnC = None
    if noise_BPC is not None:
        noise_BnC = noise_BPC.to(revealed_Bn.device).gather(1, _across(revealed_Bn, branch.channels))
    uncond_BnD = hidden[1] if len(hidden) == 2 else None
    return branch.from_decoder(branch.vision_head.guided(hidden[0], uncond_BnD, guidance, noise_BnC)).float()


def _across(index_Bn: Tensor, channels: int) -> Tensor:
    return index_Bn[..., None].expand(-1, -1, channels)
