"""Floating-point operations of a forward pass, from sizes alone.

In: numbers of parameters, tokens, widths. Out: operations, an addition and a multiplication counted as two. A backward
pass costs as much again for the inputs' gradients and as much again for the weights'. Norms, activations and softmax
are left out: they are a percent or two. Knows no model class and no device.
"""

from __future__ import annotations

FLUX_BLOCK = 12  # weights that one token meets in a block, in squares of the width: its own stream's in a double block


def linear(parameters: int, tokens: int) -> int:
    """Every weight once for every token."""
    return 2 * parameters * tokens


def attention(queries: int, seen: int, width: int, layers: int) -> int:
    """Scores and weighted values of `queries` tokens that see `seen` each."""
    return 4 * queries * seen * width * layers


def convolution(pixels: int, inputs: int, outputs: int, kernel: int = 3) -> int:
    """One convolution on `pixels` places."""
    return 2 * pixels * inputs * outputs * kernel * kernel


def vae_half(pixels: int, channels: tuple[int, ...], blocks: int) -> int:
    """The encoder with `blocks` residual blocks of two convolutions a level, halved between levels, and two blocks in
    the middle; the decoder, with one block more a level, is taken for the same."""
    total, inputs = 0, channels[0]
    for level, outputs in enumerate(channels):
        here = pixels // 4**level
        total += convolution(here, inputs, outputs) + (2 * blocks - 1) * convolution(here, outputs, outputs)
        if level < len(channels) - 1:
            total += convolution(here // 4, outputs, outputs)
        inputs = outputs
    return total + 4 * convolution(pixels // 4 ** (len(channels) - 1), channels[-1], channels[-1])
