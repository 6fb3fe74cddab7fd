"""Peak memory of a training or of a forward pass, from sizes alone.

In: numbers of parameters and tokens, widths, settings. Out: bytes. What a backward pass keeps is counted tensor by
tensor in the stock layers (transformers 5, diffusers 0.42) with torch's own attention, which keeps queries, keys,
values and the result but no matrix of scores; neither training computes logits. Knows no model class and no recipe.
tests/planning/test_plan_memory.py holds the sums against measured peaks. `size`: bytes of one number of an activation, 4 or 2.
"""

from __future__ import annotations

FULL = 4  # bytes of float32: trained weights, their gradients and averages, whatever the arithmetic
EIGHT_BIT_AVERAGES = 2 * (1 + FULL / 256)  # one byte each and a float32 scale for a block of 256 (arXiv 2110.02861)

# What one token leaves behind in a FLUX block, in widths. Frozen weights need no inputs kept, only what the gradient
# passes through: normed inputs, queries and keys before and after their norm, values, the result, GELU's input.
FROZEN_DOUBLE, FROZEN_SINGLE = 12, 11
TRAINED_DOUBLE, TRAINED_SINGLE = 22, 19
FLUX_MOMENT = 24  # the last block's gradients beside what it kept
EMBEDDER_MAPS = 6  # maps of all channels on the fine grid that the ControlNet's embedder keeps


def trained_state(parameters: int, *, eight_bit: bool = False, averaged: bool = False) -> int:
    """Weights, Adam's two moments and the averaged weights; not the gradients, which are not always there."""
    moments = EIGHT_BIT_AVERAGES if eight_bit else 2 * FULL
    return round(parameters * (FULL + moments + (FULL if averaged else 0)))


def training_peak(held: int, kept: int, moment: int, gradients: int, *, accumulates: bool) -> int:
    """The highest point of a step.

    held: always there. kept: what forward leaves for backward, which gives it up as the gradients come; so the peak is
    at one end or the other, unless gradients of an earlier pass are there already. moment: what one layer needs while
    it works.
    """
    at_once = kept + gradients if accumulates else max(kept, gradients)
    return held + at_once + moment


# ---- the branch -----------------------------------------------------------------------------------------------------


def decoder_layer_kept(
    batch: int, patches: int, text: int, width: int, inner: int, *, size: int, weights: str = "trained"
) -> int:
    """One decoder layer of the branch: `patches` queries on `text` + `patches` keys and values.

    Trained weights: two norms keep input and normed input in float32; queries and the result once; four maps of the
    MLP; keys and values repeated for every head. In bfloat16 each of the five projections of a normed input keeps its
    own cast. Frozen weights need no inputs of their projections; weights with additions of low rank ("low rank") do.
    """
    tokens, seen = batch * patches, batch * (text + patches)
    inputs = 0 if weights == "frozen" else 2 * FULL if size == FULL else 5 * size
    normed = 2 * FULL if weights == "trained" else 0
    maps = 3 if weights == "frozen" else 4
    return tokens * (width * (2 * FULL + normed + inputs + 2 * size) + maps * inner * size) + 2 * seen * width * size


def branch_head_kept(batch: int, patches: int, width: int, channels: int) -> int:
    """The final norm, the head and the loss."""
    return batch * patches * FULL * (4 * width + 4 * channels)


def checkpointed_kept(batch: int, patches: int, width: int, layers: list[int]) -> int:
    """With gradient checkpointing: every layer's input, and the largest layer, which is computed again."""
    return len(layers) * batch * patches * width * FULL + max(layers)


def branch_moment(batch: int, patches: int, width: int, inner: int, channels: int, *, size: int) -> int:
    """The larger of the health numbers on all latents and the gradients inside the last MLP."""
    return batch * patches * max(6 * channels * FULL, 3 * inner * size + 2 * width * FULL)


def prefix_cache(batch: int, text: int, layers: int, key_width: int, *, size: int) -> int:
    """The prompt's keys and values of every layer."""
    return 2 * layers * batch * text * key_width * size


# ---- the ControlNet -------------------------------------------------------------------------------------------------


def controlnet_kept(
    tokens: int, width: int, frozen: tuple[int, int], trained: tuple[int, int], *, size: int, checkpointed: bool = False
) -> int:
    """Blocks (double, single) of frozen FLUX and of the ControlNet on `tokens` text and image tokens.

    The first double block of FLUX stands before the first residual, so no gradient passes it.
    """
    double, single = max(0, frozen[0] - 1), frozen[1]
    if checkpointed:  # the inputs of each block, and the largest block computed again
        widths = double + single + sum(trained) + TRAINED_DOUBLE
    else:
        widths = FROZEN_DOUBLE * double + FROZEN_SINGLE * single
        widths += TRAINED_DOUBLE * trained[0] + TRAINED_SINGLE * trained[1]
    return tokens * width * size * widths


def embedder_kept(image_tokens_: int, channels: int, *, size: int) -> int:
    """The ControlNet's embedder on its fine grid."""
    return EMBEDDER_MAPS * image_tokens_ * channels * size


# ---- without gradients ----------------------------------------------------------------------------------------------


def decoder_moment(batch: int, queries: int, seen: int, width: int, inner: int, *, size: int) -> int:
    """One decoder layer on `queries` tokens a row that see `seen`."""
    return batch * size * (queries * (4 * width + 3 * inner) + 2 * seen * width)


def flux_moment(tokens: int, width: int, *, size: int) -> int:
    """One single block: queries, keys, values, their normed copies, the MLP's four widths twice, their union."""
    return 24 * tokens * width * size


def vision_moment(patches: int, width: int, inner: int, patch_numbers: int, *, size: int) -> int:
    """The visual encoder on `patches` patches in all: pixels in float32 and cast, and the larger half of one block:
    its attention, which turns queries and keys in float32, or its MLP."""
    attention, mlp = width * (2 * size + 8 * FULL), 2 * width * size + 3 * inner * size
    return patches * (patch_numbers * (FULL + size) + max(attention, mlp))


def vae_encode_moment(batch: int, pixels: int, channels: int, layers: int, *, size: int) -> int:
    """The last of `layers` blocks at full size (`pixels` an image, `channels` there): its input, what came out of its
    convolutions, their sum, the sum scaled, and what the caller still holds."""
    return batch * pixels * ((4 + (layers > 1)) * channels * size + 3 * FULL)


def vae_decode_moment(batch: int, pixels: int, channels: int, *, size: int) -> int:
    """The last block at full size, which takes the `channels` of the one before, held by the caller too."""
    return 4 * batch * pixels * channels * size
