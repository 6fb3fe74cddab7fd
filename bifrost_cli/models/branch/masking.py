"""Masked autoregression (MAR, arXiv 2406.11838): orders, mask ratios, the cosine schedule, and sampling by them.

The Bifrost-1 paper masks as MAR does; the module that did it is missing from the published code, so this is MAR's.
Legend: B batch, P patches, C channels, D width, n patches revealed in one step. In a mask, True is to be predicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bifrost_cli.models.branch.visual_branch import VisualBranch, take
from bifrost_cli.models.mllm.frozen_mllm import PromptCache


def sample_mask_ratio(
    n: int, generator: torch.Generator, mean: float = 1.0, sd: float = 0.25, low: float = 0.7, high: float = 1.0
) -> Tensor:
    """n ratios from a normal distribution truncated to [low, high] (MAR, section 4.2), float64 on the CPU; one uniform
    number is drawn for each."""
    if not (0.0 <= low <= high <= 1.0 and sd > 0):
        raise ValueError(f"mask ratios need 0 <= low <= high <= 1 and sd > 0, not low={low}, high={high}, sd={sd}")
    below, above = (0.5 * (1 + math.erf((edge - mean) / sd / math.sqrt(2))) for edge in (low, high))
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    ratio = mean + sd * math.sqrt(2) * torch.erfinv(2 * (below + uniform * (above - below)) - 1)
    return ratio.clamp(low, high)


def random_orders(batch: int, patches: int, generator: torch.Generator) -> Tensor:
    """A random order of the patches for each image, orders_BP int64; decoding reveals it from its end to its start."""
    return torch.stack([torch.randperm(patches, generator=generator) for _ in range(batch)])


def raster_orders(batch: int, patches: int) -> Tensor:
    """Reading order for every image, orders_BP int64: decoding reveals the top left patch first."""
    return torch.arange(patches - 1, -1, -1).expand(batch, -1)


def mask_from_orders(orders_BP: Tensor, masked_count_B: Tensor) -> Tensor:
    """masked_BP bool: the first masked_count entries of each order are masked."""
    rank_P = torch.arange(orders_BP.shape[1], device=orders_BP.device)
    first_BP = rank_P < masked_count_B.to(orders_BP.device)[:, None]
    return torch.zeros_like(first_BP).scatter(1, orders_BP, first_BP)


def draw_masks(batch: int, patches: int, generator: torch.Generator, **distribution: float) -> Tensor:
    """Training masks, masked_BP bool: in each image ceil(P * `sample_mask_ratio`) random patches, at least one."""
    ratio_B = sample_mask_ratio(batch, generator, **distribution)
    count_B = (ratio_B * patches).ceil().long().clamp(1, patches)
    return mask_from_orders(random_orders(batch, patches, generator), count_B)


def mask_schedule(patches: int, steps: int) -> list[int]:
    """How many patches are still masked after each decode step: MaskGIT's cosine schedule, as MAR uses it.

    After step s (from 0) of K it is max(1, min(previous - 1, floor(P * cos(pi/2 * (s+1)/K)))), but 0 after the last.
    With more steps than patches, some steps reveal nothing.
    """
    if patches < 1 or steps < 1:
        raise ValueError(f"a schedule needs at least one patch and one step, not {patches} and {steps}")
    masked, previous = [], patches
    for step in range(steps - 1):
        # The expression and its rounding are the published ones: a floor can hang on the last bit of the cosine.
        cosine = int(np.floor(patches * np.cos(math.pi / 2.0 * (step + 1) / steps)))
        previous = max(1, min(previous - 1, cosine))
        masked.append(previous)
    return [*masked, 0]


@torch.no_grad()
def sample_masked(
    branch: VisualBranch, prompt_cache: PromptCache, uncond_cache: PromptCache | None = None, *, steps: int,
    orders_BP: Tensor, guidance: float = 1.0, noise_BPC: Tensor | None = None, temperature: float = 1.0,
    known: tuple[Tensor, Tensor] | None = None, callback: Callable[[int, Tensor, Tensor], object] | None = None,
) -> Tensor:  # fmt: skip
    """Predict the latents of the masked patches, by default of all, some at each step; nothing is drawn.

    Args:
        branch: it passes the P patches once a step, and with guidance twice.
        prompt_cache: the prompts.
        uncond_cache: the empty prompt; it is read only with guidance.
        steps: decode steps; see `mask_schedule`.
        orders_BP: the first patches of an order are revealed last.
        guidance: w in u + w * (c - u), c and u predicted with the prompt and without; 1 runs no unconditional pass.
        noise_BPC: what a sampling head starts each patch from; a linear head needs none.
        temperature: of a sampling head: below 1 nearer to the most probable latents.
        known: latents_BPC of which those stay whose masked_BP is False, and that masked_BP, with equally many True in
            each row; None begins with all masked.
        callback: called after every step with its index from 0, latents_BPC, and masked_BP (True is still to be
            predicted). What it raises ends the loop.

    Returns:
        latents_BPC float32, in the encoder's own scale.
    """
    if guidance == 1.0:
        uncond_cache = None
    elif uncond_cache is None:
        raise ValueError(f"guidance {guidance} needs the cache of the empty prompt")
    if orders_BP.shape[1] != branch.patches:
        raise ValueError(f"orders of {orders_BP.shape[1]} patches for a branch of {branch.patches}")
    orders_BP = orders_BP.to(branch.mask_token.device)
    if known is None:
        latents_BPC = torch.zeros(*orders_BP.shape, branch.channels, device=orders_BP.device)
        masked_BP, masked = torch.ones_like(orders_BP, dtype=torch.bool), branch.patches
    else:
        latents_BPC, masked_BP = (part.to(orders_BP.device) for part in known)
        masked = int(masked_BP[0].sum())
        if (masked_BP.sum(1) != masked).any():
            raise ValueError("rows with different numbers of masked patches cannot be predicted together")
        # An order that ends with what is known: it counts as revealed.
        orders_BP = orders_BP.gather(1, (~masked_BP).gather(1, orders_BP).int().argsort(dim=1, stable=True))
    for step, still_masked in enumerate(mask_schedule(masked, steps) if masked else []):
        revealed_Bn = orders_BP[:, still_masked:masked]
        if revealed_Bn.shape[1]:
            hidden_BnD, uncond_BnD = branch.hidden(latents_BPC, masked_BP, prompt_cache, revealed_Bn), None
            if uncond_cache is not None:
                uncond_BnD = branch.hidden(latents_BPC, masked_BP, uncond_cache, revealed_Bn)
            noise_BnC = None if noise_BPC is None else take(noise_BPC.to(orders_BP.device), revealed_Bn)
            guided_BnC = branch.vision_head.guided(hidden_BnD, uncond_BnD, guidance, noise_BnC, temperature)
            new_BnC = branch.from_decoder(guided_BnC).float()
            latents_BPC = latents_BPC.scatter(1, revealed_Bn[..., None].expand_as(new_BnC), new_BnC)
        masked_BP = mask_from_orders(orders_BP, torch.full_like(orders_BP[:, 0], still_masked))
        masked = still_masked
        if callback is not None:
            callback(step, latents_BPC, masked_BP)
    return latents_BPC
