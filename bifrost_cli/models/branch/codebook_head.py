"""The codebook head: classifies a patch among the k-means centres of the training latents, and samples one.

Tokens of a codebook, as MaskGIT predicts them (arXiv 2202.04200): where a prompt leaves several latents open, a
categorical distribution holds them all and a draw is one of them, while mean squared error predicts their mean. With
several levels a latent is a sum of codes, each of what those before left over, drawn one after the other (residual
quantisation, arXiv 2203.01941). It is not part of the paper. Legend: D decoder width, C latent channels, K codes, L
levels, N tokens, ... any leading axes.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from bifrost_cli.models.row_noise import NoiseSource

FIT_TOKENS, FIT_STEPS = 65_536, 25  # what k-means reads, and for how many rounds


class CodebookHead(nn.Module):
    """Logits of K codes a level for each token of width D; a code is a latent of C channels, so that the branch reads
    what it wrote as it reads others."""

    codes_KC: Tensor

    def __init__(self, width: int, channels: int, codes: int, levels: int = 1) -> None:
        super().__init__()
        if levels > channels:
            raise ValueError(f"{levels} levels need as many numbers to draw from; a latent has {channels}")
        self.to_logits = nn.Linear(width, codes)
        self.register_buffer("codes_KC", torch.zeros(codes, channels))
        self.deeper = nn.ModuleList([ResidualLevel(width, channels, codes) for _ in range(levels - 1)])

    def fit(self, tokens_NC: Tensor, seed: int) -> None:
        """Set the codes to k-means centres of latents in the decoder's space, from a k-means++ start.

        Most patches of an image are its background: a start drawn evenly would leave rare latents without a code.

        Raises:
            ValueError: fewer latents than codes.
        """
        left_NC = tokens_NC[:: -(-len(tokens_NC) // FIT_TOKENS)].float().cpu()
        if len(left_NC) < len(self.codes_KC):
            raise ValueError(f"{len(self.codes_KC)} codes cannot be made of {len(left_NC)} latents")
        generator = torch.Generator().manual_seed(seed)
        for codes_KC in self._codes():
            codes_KC.copy_(_centres(left_NC, len(codes_KC), generator))
            left_NC = left_NC - codes_KC.cpu()[_nearest(left_NC, codes_KC.cpu())]

    def nearest(self, latents_NC: Tensor) -> Tensor:
        """The indices of the codes whose sum is near to each latent, chosen level by level: (N, L) int64."""
        left_NC, indices = latents_NC.float(), []
        for codes_KC in self._codes():
            indices.append(_nearest(left_NC, codes_KC.float()))
            left_NC = left_NC - codes_KC.float()[indices[-1]]
        return torch.stack(indices, dim=-1)

    def loss(self, hidden_ND: Tensor, target_NC: Tensor, generator: NoiseSource | None = None) -> Tensor:
        """Cross-entropy of the nearest codes, summed over levels, in float32; nothing is drawn from the generator."""
        indices_NL, loss = self.nearest(target_NC), hidden_ND.new_zeros((), dtype=torch.float32)
        written_NC = torch.zeros_like(target_NC)
        for level, codes_KC in enumerate(self._codes()):
            index_N = indices_NL[:, level]
            loss = loss + nn.functional.cross_entropy(self._logits(level, hidden_ND, written_NC), index_N)
            written_NC = written_NC + codes_KC[index_N].to(target_NC.dtype)
        return loss

    def mean(self, hidden_D: Tensor) -> Tensor:
        """The mean latents (..., C) under the predicted distributions; a deeper level sees the mean of those before."""
        mean_C = hidden_D.new_zeros(*hidden_D.shape[:-1], self.codes_KC.shape[1])
        for level, codes_KC in enumerate(self._codes()):
            mean_C = mean_C + (self._logits(level, hidden_D, mean_C).softmax(-1) @ codes_KC).to(hidden_D.dtype)
        return mean_C

    def guided(
        self, hidden_D: Tensor, uncond_D: Tensor | None, guidance: float, noise_C: Tensor | None,
        temperature: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """Draws a code a level for each token; guidance acts on log-probabilities: u + w * (c - u).

        A draw is the inverse of the distribution function at one uniform number, which is one of the token's normal
        numbers through theirs: a token's codes depend on no other token's noise.

        Raises:
            ValueError: there is no noise.
        """
        if noise_C is None:
            raise ValueError("a codebook head samples: give it noise")
        uniform_C = 0.5 * (1 + torch.erf(noise_C.double() / math.sqrt(2)))
        drawn_C = hidden_D.new_zeros(*hidden_D.shape[:-1], self.codes_KC.shape[1])
        for level, codes_KC in enumerate(self._codes()):
            logits_K = self._logits(level, hidden_D, drawn_C).log_softmax(-1)
            if uncond_D is not None:
                uncond_K = self._logits(level, uncond_D, drawn_C).log_softmax(-1)
                logits_K = uncond_K + guidance * (logits_K - uncond_K)
            cumulative_K = (logits_K / temperature).softmax(-1).double().cumsum(-1)
            # The last entry is 1 but for rounding: scaled by it, no uniform number falls beyond.
            chosen_1 = uniform_C[..., level : level + 1] * cumulative_K[..., -1:]
            index = torch.searchsorted(cumulative_K, chosen_1).squeeze(-1).clamp_max(len(codes_KC) - 1)
            drawn_C = drawn_C + codes_KC[index].to(hidden_D.dtype)
        return drawn_C

    def _codes(self) -> list[Tensor]:
        """The codes of each level."""
        levels: list[Any] = list(self.deeper)  # a ModuleList does not say of what
        return [self.codes_KC, *(level.codes_KC for level in levels)]

    def _logits(self, level: int, hidden_D: Tensor, written_C: Tensor) -> Tensor:
        """Float32 logits of a level's codes; `written_C` is the sum of the codes before it."""
        if level == 0:
            return self.to_logits(hidden_D).float()
        return self.deeper[level - 1](hidden_D, written_C).float()


class ResidualLevel(nn.Module):
    """Logits of the codes of what is left over, from a token's hidden state and the codes before."""

    codes_KC: Tensor

    def __init__(self, width: int, channels: int, codes: int) -> None:
        super().__init__()
        self.from_latent = nn.Linear(channels, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width, elementwise_affine=False),
            nn.Linear(width, 2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, width),
        )
        self.to_logits = nn.Linear(width, codes)
        self.register_buffer("codes_KC", torch.zeros(codes, channels))

    def forward(self, hidden_D: Tensor, written_C: Tensor) -> Tensor:
        """(..., D) and (..., C) -> (..., K)."""
        state_D = hidden_D + self.from_latent(written_C.to(hidden_D.dtype))
        return self.to_logits(state_D + self.mlp(state_D))


def _nearest(latents_NC: Tensor, codes_KC: Tensor) -> Tensor:
    return torch.cdist(latents_NC, codes_KC).argmin(-1)


def _centres(latents_NC: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means centres (count, C) float64."""
    from scipy.cluster.vq import kmeans2  # half a second that only a training needs

    chosen, distance_N = [], torch.ones(len(latents_NC))
    for _ in range(count):
        if not distance_N.any():  # fewer different latents than codes: some codes repeat
            distance_N += 1
        chosen.append(int(torch.multinomial(distance_N, 1, generator=generator)))
        new_N = (latents_NC - latents_NC[chosen[-1]]).square().sum(-1)
        distance_N = torch.minimum(distance_N, new_N) if len(chosen) > 1 else new_N
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="One of the clusters is empty")
        start_KC = latents_NC[chosen].double().numpy()
        centres_KC, _ = kmeans2(latents_NC.double().numpy(), start_KC, iter=FIT_STEPS, minit="matrix")
    return torch.from_numpy(centres_KC)
