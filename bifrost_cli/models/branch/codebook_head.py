"""The codebook head: classifies a patch among the k-means centres of the training latents, and samples one.

Tokens of a codebook, as MaskGIT predicts them (arXiv 2202.04200): where a prompt leaves several latents open, a
categorical distribution holds them all and a draw is one of them, while mean squared error predicts their mean. It is
not part of the paper. Legend: D decoder width, C latent channels, K codes, N tokens, ... any leading axes.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from bifrost_cli.models.row_noise import NoiseSource

FIT_TOKENS, FIT_STEPS = 65_536, 25  # what k-means reads, and for how many rounds


class CodebookHead(nn.Module):
    """Logits of K codes for each token of width D; a code is a latent of C channels, so that the branch reads what it
    wrote as it reads others."""

    codes_KC: Tensor

    def __init__(self, width: int, channels: int, codes: int) -> None:
        super().__init__()
        self.to_logits = nn.Linear(width, codes)
        self.register_buffer("codes_KC", torch.zeros(codes, channels))

    def fit(self, tokens_NC: Tensor, seed: int) -> None:
        """Set the codes to k-means centres of latents in the decoder's space, from a k-means++ start.

        Most patches of an image are its background: a start drawn evenly would leave rare latents without a code.

        Raises:
            ValueError: fewer latents than codes.
        """
        from scipy.cluster.vq import kmeans2  # half a second that only a training needs

        latents_NC = tokens_NC[:: -(-len(tokens_NC) // FIT_TOKENS)].float().cpu()
        if len(latents_NC) < len(self.codes_KC):
            raise ValueError(f"{len(self.codes_KC)} codes cannot be made of {len(latents_NC)} latents")
        generator = torch.Generator().manual_seed(seed)
        chosen, distance_N = [], torch.ones(len(latents_NC))
        for _ in self.codes_KC:
            if not distance_N.any():  # fewer different latents than codes: some codes repeat
                distance_N += 1
            chosen.append(int(torch.multinomial(distance_N, 1, generator=generator)))
            new_N = (latents_NC - latents_NC[chosen[-1]]).square().sum(-1)
            distance_N = torch.minimum(distance_N, new_N) if len(chosen) > 1 else new_N
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="One of the clusters is empty")
            start_KC = latents_NC[chosen].double().numpy()
            centres_KC, _ = kmeans2(latents_NC.double().numpy(), start_KC, iter=FIT_STEPS, minit="matrix")
        self.codes_KC.copy_(torch.from_numpy(centres_KC))

    def nearest(self, latents_NC: Tensor) -> Tensor:
        """The index of the code that is nearest to each latent, (N,) int64."""
        return torch.cdist(latents_NC.float(), self.codes_KC.float()).argmin(-1)

    def loss(self, hidden_ND: Tensor, target_NC: Tensor, generator: NoiseSource | None = None) -> Tensor:
        """Cross-entropy of the nearest codes, in float32; nothing is drawn from the generator."""
        return nn.functional.cross_entropy(self.to_logits(hidden_ND).float(), self.nearest(target_NC))

    def mean(self, hidden_D: Tensor) -> Tensor:
        """The mean latents (..., C) under the predicted distributions."""
        return self.to_logits(hidden_D).softmax(-1) @ self.codes_KC

    def guided(
        self, hidden_D: Tensor, uncond_D: Tensor | None, guidance: float, noise_C: Tensor | None,
        temperature: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """Draws a code for each token; guidance acts on log-probabilities: u + w * (c - u).

        The draw is the inverse of the distribution function at one uniform number, which is the first of the token's
        normal numbers through theirs: a token's code depends on no other token's noise.

        Raises:
            ValueError: there is no noise.
        """
        if noise_C is None:
            raise ValueError("a codebook head samples: give it noise")
        logits_K = self.to_logits(hidden_D).float().log_softmax(-1)
        if uncond_D is not None:
            uncond_K = self.to_logits(uncond_D).float().log_softmax(-1)
            logits_K = uncond_K + guidance * (logits_K - uncond_K)
        cumulative_K = (logits_K / temperature).softmax(-1).double().cumsum(-1)
        uniform_1 = 0.5 * (1 + torch.erf(noise_C[..., :1].double() / math.sqrt(2)))
        # The last entry is 1 but for rounding: scaled by it, no uniform number falls beyond.
        index = torch.searchsorted(cumulative_K, uniform_1 * cumulative_K[..., -1:]).squeeze(-1)
        return self.codes_KC[index.clamp_max(len(self.codes_KC) - 1)].to(hidden_D.dtype)
