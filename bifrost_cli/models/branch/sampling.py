"""Masked autoregression: patch latents from a prompt, some patches at each step, in a given order.

The prompt is read once (see `Mllm.encode_prompts`): a step costs one pass of the branch over the P patches.
Legend: B batch, P patches, C latent channels, D width, n patches revealed in one step.
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
    prompt_cache: PromptCache,
    uncond_cache: PromptCache | None = None,
    *,
    steps: int,
    orders_BP: Tensor,
    guidance: float = 1.0,
    noise_BPC: Tensor | None = None,
    callback: Callable[[int, Tensor, Tensor], object] | None = None,
) -> Tensor:
    """Predict the latents of all patches, from a fully masked start. No random numbers are drawn.

    Args:
        branch: the visual generation branch.
        prompt_cache: the prompts.
        uncond_cache: the empty prompt; it is read only with guidance.
        steps: decode steps; see `mask_schedule`.
        orders_BP: the first patches of an order are revealed last.
        guidance: w in u + w * (c - u), c and u predicted with the prompt and without; 1 runs no unconditional pass.
        noise_BPC: what a flow head starts each patch from; a linear head needs none.
        callback: called after every step with its index from 0, latents_BPC, and masked_BP (True is still to be
            predicted). What it raises ends the loop.

    Returns:
        latents_BPC float32, in the encoder's own scale.

    Raises:
        ValueError: guidance without `uncond_cache`; orders of another number of patches.
    """
    caches = [prompt_cache]
    if guidance != 1.0:
        if uncond_cache is None:
            raise ValueError(f"guidance {guidance} needs the cache of the empty prompt")
        caches.append(uncond_cache)
    if orders_BP.shape[1] != branch.patches:
        raise ValueError(f"orders of {orders_BP.shape[1]} patches for a branch of {branch.patches}")
    batch, patches = orders_BP.shape
    orders_BP = orders_BP.to(branch.mask_token.device)
    latents_BPC = torch.zeros(batch, patches, branch.channels, device=orders_BP.device)
    masked_BP, masked = torch.ones_like(orders_BP, dtype=torch.bool), patches
    for step, still_masked in enumerate(mask_schedule(patches, steps)):
        revealed_Bn = orders_BP[:, still_masked:masked]
        if revealed_Bn.shape[1]:
            new_BnC = _predict(branch, caches, latents_BPC, masked_BP, revealed_Bn, guidance, noise_BPC)
            latents_BPC = latents_BPC.scatter(1, _across(revealed_Bn, branch.channels), new_BnC)
        masked_BP = mask_from_orders(orders_BP, torch.full_like(orders_BP[:, 0], still_masked))
        masked = still_masked
        if callback is not None:
            callback(step, latents_BPC, masked_BP)
    return latents_BPC


def _predict(
    branch: VisualBranch,
    caches: list[PromptCache],
    latents_BPC: Tensor,
    masked_BP: Tensor,
    revealed_Bn: Tensor,
    guidance: float,
    noise_BPC: Tensor | None,
) -> Tensor:
    """New latents_BnC of the patches that this step reveals."""
    hidden = [branch.hidden(latents_BPC, masked_BP, cache, revealed_Bn) for cache in caches]
    noise_BnC = None
    if noise_BPC is not None:
        noise_BnC = noise_BPC.to(revealed_Bn.device).gather(1, _across(revealed_Bn, branch.channels))
    uncond_BnD = hidden[1] if len(hidden) == 2 else None
    return branch.from_decoder(branch.vision_head.guided(hidden[0], uncond_BnD, guidance, noise_BnC)).float()


def _across(index_Bn: Tensor, channels: int) -> Tensor:
    return index_Bn[..., None].expand(-1, -1, channels)
