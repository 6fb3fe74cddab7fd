"""Rectified flow: the straight path from data to noise, its loss, its Euler sampler, noise levels and their shifts. A
model comes in as its velocity. Letters: x0 clean, e noise, s (sigma) noise level in [0, 1] with 1 = pure noise. B
images, other axes free."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bifrost_cli.models.row_noise import NoiseSource, normal


def noisy(clean: Tensor, noise: Tensor, sigma_B: Tensor) -> Tensor:
    """The point at noise level s on the straight path: x_s = (1 - s) x0 + s e (SD3, arXiv 2403.03206, eq. 13)."""
    sigma = sigma_B.to(clean.dtype).reshape(-1, *[1] * (clean.ndim - 1))
    return (1 - sigma) * clean + sigma * noise


def flow_target(clean: Tensor, noise: Tensor) -> Tensor:
    """The velocity dx_s/ds = e - x0, which the model learns; the same at every noise level."""
    return noise - clean


def flow_matching_loss(
    velocity: Callable[[Tensor, Tensor], Tensor], clean: Tensor, noise: Tensor, sigma_B: Tensor
) -> Tensor:
    """Conditional flow matching (SD3, section 2): the mean squared error of `velocity(x_s, sigma_B)` to e - x0, a
    float32 scalar. There is a noise level for each entry of the batch, (B,) or (B, 1, ...)."""
    predicted = velocity(noisy(clean, noise, sigma_B), sigma_B)
    return torch.nn.functional.mse_loss(predicted.float(), flow_target(clean, noise).float())


def euler(
    velocity: Callable[[Tensor, Any], Tensor],
    x: Tensor,
    sigmas: Iterable[Any],
    callback: Callable[[int, Any, Tensor], object] | None = None,
) -> Tensor:
    """Integrate dx/ds = v from the first to the last of `sigmas`, one more than there are steps, by Euler's method; the
    callback gets each step's index from 0, the noise level it started at, and the new x."""
    # The sum is taken in float32 and rounded to the velocity's type at every step: bit for bit what `step` of
    # FlowMatchEulerDiscreteScheduler does.
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        slope = velocity(x, sigma)
        x = (x.float() + (following - sigma) * slope).to(slope.dtype)
        if callback is not None:
            callback(step, sigma, x)
    return x


def logit_normal(count: int, generator: NoiseSource, mean: float = 0.0, sd: float = 1.0) -> Tensor:
    """`count` noise levels s = sigmoid(u), u ~ N(mean, sd) (SD3, section 3.1; the draw of diffusers' FLUX trainers)."""
    return torch.sigmoid(mean + sd * normal((count,), generator))


def shift_mu(
    image_tokens: int, base_tokens: int = 256, max_tokens: int = 4096, base_shift: float = 0.5, max_shift: float = 1.15
) -> float:
    """FLUX's shift exponent: the line through (base_tokens, base_shift) and (max_tokens, max_shift)."""
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return image_tokens * slope + (base_shift - slope * base_tokens)


def shift_exponential(sigma: Tensor, mu: float) -> Tensor:
    """s' = e^mu / (e^mu + 1/s - 1): more noise for larger images (FLUX.1-dev, dynamic shifting)."""
    return math.exp(mu) / (math.exp(mu) + (1 / sigma - 1))


def shift_constant(sigma: Tensor, shift: float) -> Tensor:
    """s' = k s / (1 + (k - 1) s), the same at every size (SD3, eq. 23; FLUX.1-schnell has k = 1)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sampling_sigmas(steps: int) -> list[float]:
    """The unshifted noise levels of a sampler: 1, ..., 1/steps, evenly spaced (the scheduler appends the 0)."""
    return torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64).tolist()
