"""Principal components of tokens: the directions in which they differ most (Pearson 1901).

N tokens, C channels, K components.
"""

from __future__ import annotations

import torch
from torch import Tensor


def principal_axes(tokens_NC: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean (C,) and unit axes (C, K), the widest first, float64; K is `count`, or fewer for fewer tokens or channels.

    From the Gram matrix or the covariance, whichever is smaller. An axis points where its entries sum to more than 0.
    """
    tokens_NC = tokens_NC.double()
    mean_C = tokens_NC.mean(0)
    centred_NC = tokens_NC - mean_C
    tokens, channels = centred_NC.shape
    if tokens <= channels:
        vectors = torch.linalg.eigh(centred_NC @ centred_NC.T).eigenvectors[:, -count:]
        axes_CK = torch.nn.functional.normalize(centred_NC.T @ vectors, dim=0)
    else:
        axes_CK = torch.linalg.eigh(centred_NC.T @ centred_NC).eigenvectors[:, -count:]
    axes_CK = axes_CK.flip(1)
    return mean_C, axes_CK * torch.where(axes_CK.sum(0) < 0, -1.0, 1.0)


def as_colours(latents_BPC: Tensor, mean_C: Tensor, axes_CK: Tensor, scale_K: Tensor) -> Tensor:
    """uint8 (B, P, 3): the first three components as red, green and blue, two of `scale` from grey to either end."""
    parts_BPK = (latents_BPC.double() - mean_C) @ axes_CK / scale_K.clamp_min(1e-12) / 4 + 0.5
    colours_BPK = (parts_BPK.clamp(0, 1) * 255).round().byte()
    return torch.nn.functional.pad(colours_BPK, (0, 3 - colours_BPK.shape[-1]), value=127)
