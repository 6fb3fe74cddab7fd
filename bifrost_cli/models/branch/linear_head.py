"""The published vision head: one linear layer on each hidden state, trained with mean squared error.

In: hidden states (..., D). Out: latents (..., C) or a loss. Knows no masks, prompts or decode steps.
"""

from __future__ import annotations

from torch import Tensor, nn

from bifrost_cli.models.row_noise import NoiseSource


class LinearHead(nn.Linear):
    """Predicts the mean of the latents that a hidden state allows."""

    def mean(self, hidden_D: Tensor) -> Tensor:
        """Predicted latents (..., C)."""
        return self(hidden_D)

    def loss(self, hidden_ND: Tensor, target_NC: Tensor, generator: NoiseSource | None = None) -> Tensor:
        """Mean squared error over all entries, in float32. The generator is not needed."""
        return nn.functional.mse_loss(self(hidden_ND).float(), target_NC.float())

    def guided(self, hidden_D: Tensor, uncond_D: Tensor | None, guidance: float, noise_C: Tensor | None) -> Tensor:
        """u + w * (c - u), or c when there is no unconditional half. The noise is not needed."""
        conditional_C = self(hidden_D)
        if uncond_D is None:
            return conditional_C
        unconditional_C = self(uncond_D)
        return unconditional_C + guidance * (conditional_C - unconditional_C)
