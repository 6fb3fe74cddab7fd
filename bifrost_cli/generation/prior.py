"""The prior: a prompt to patch latents, by the frozen MLLM and the branch.

One image at a time: sums of floats differ in the last bit between batch sizes, and the same seed must give the same
bytes alone or among others. Legend: B images (1), P patches, C channels of the patch latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from bifrost_cli.artifacts import Artifact
from bifrost_cli.config.schema import Generate, Recipe
from bifrost_cli.generation.requests import generator_of
from bifrost_cli.generation.stages import StageCallback, timed
from bifrost_cli.loading.compatibility import require_base
from bifrost_cli.loading.fingerprints import mllm_fingerprint
from bifrost_cli.loading.loaders import ModelLoader
from bifrost_cli.loading.offload import OffloadPolicy
from bifrost_cli.models.branch.masking import random_orders, raster_orders, sample_masked
from bifrost_cli.models.branch.visual_branch import VisualBranch
from bifrost_cli.models.mllm.chat_template import join_plan
from bifrost_cli.models.mllm.frozen_mllm import Mllm, PromptCache


@dataclass(frozen=True)
class PredictedLatents:
    """What the prior made of a prompt.

    Attributes:
        prompt: as it was given.
        plan: the dense description that the MLLM wrote first, if `generate.plan` asks for one.
        cut: True when prompt or plan were longer than the MLLM reads, or the plan than it writes.
        latents_PC: patch latents, float32 on the CPU.
    """

    prompt: str
    plan: str | None
    cut: bool
    latents_PC: torch.Tensor


class BifrostPrior:
    """MLLM and branch: the half of the pipeline that turns words into patch latents.

    Args:
        mllm: the frozen multimodal LLM.
        branch: the visual branch that was trained on it.
        settings: the recipe's `generate` section; a call can give another.
        max_text_tokens: `branch.max_text_tokens`; longer prompts are cut.
        policy: where the two are between and during calls.
    """

    def __init__(
        self, mllm: Mllm, branch: VisualBranch, settings: Generate, max_text_tokens: int, policy: OffloadPolicy
    ) -> None:
        self.mllm, self.branch, self.settings = mllm, branch, settings
        self.max_text_tokens, self.policy = max_text_tokens, policy
        self.seconds: dict[str, float] = {}
        self._encoded = lru_cache(maxsize=1)(self._encode)  # several images of a prompt follow each other
        self._unconditional = lru_cache(maxsize=1)(self._encode_empty)

    @classmethod
    def load(cls, recipe: Recipe, artifact: Artifact, loader: ModelLoader) -> BifrostPrior:
        """Load both. ArtifactError BF-ART-004: the branch was trained on another MLLM than the recipe names."""
        mllm = loader.mllm()
        require_base(artifact, "mllm", recipe.models.mllm, mllm_fingerprint(recipe.models, mllm))
        branch = loader.branch(artifact, mllm)
        loader.policy.settle(mllm.model, branch, frozen=[mllm.decoder])
        return cls(mllm, branch, recipe.generate, recipe.branch.max_text_tokens, loader.policy)

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The parts with weights."""
        return [self.mllm.model, self.branch]

    def forget_prompts(self) -> None:
        """Drop what is kept of the last prompt: it lies on the device of its time."""
        self._encoded.cache_clear()
        self._unconditional.cache_clear()

    @torch.no_grad()
    def predict(
        self, prompt: str, seed: int = 0, *, settings: Generate | None = None, callback: StageCallback | None = None
    ) -> PredictedLatents:
        """Patch latents of a prompt; decode order and the noise of a sampling head follow from (prompt, seed) alone.

        Args:
            prompt: what to generate.
            seed: another one gives another image of the same prompt.
            settings: instead of the recipe's.
            callback: called after each decode step.
        """
        settings, branch, noise_BPC = settings or self.settings, self.branch, None
        guided = settings.branch_guidance != 1.0
        plan, cut, cache = self._encoded(
            prompt, guided, (settings.plan_instruction, settings.plan_tokens) if settings.plan else None
        )
        if branch.head_kind != "linear":
            noise_BPC = torch.randn((1, branch.patches, branch.channels), generator=generator_of(seed, prompt, "head"))
        if settings.decode_order == "raster":
            orders_BP = raster_orders(1, branch.patches)
        else:
            orders_BP = random_orders(1, branch.patches, generator_of(seed, prompt, "order"))

        def on_step(step: int, latents_BPC: torch.Tensor, masked_BP: torch.Tensor) -> None:
            if callback is not None:
                callback("decode", step, int(masked_BP.sum()), latents_BPC)

        with timed(self.seconds, "decode"), self.policy.on(branch):
            latents_BPC = sample_masked(
                branch,
                cache,
                self._unconditional() if guided else None,
                steps=settings.decode_steps,
                orders_BP=orders_BP,
                guidance=settings.branch_guidance,
                noise_BPC=noise_BPC,
                temperature=settings.temperature,
                callback=on_step,
            ).cpu()
        return PredictedLatents(prompt, plan, cut, latents_BPC[0])

    def _encode(
        self, prompt: str, guided: bool, planning: tuple[str, int] | None
    ) -> tuple[str | None, bool, PromptCache]:
        """The plan, whether the text was cut, and the text's keys and values."""
        plan, plan_cut = None, False
        with self.policy.on(self.mllm.model):
            if planning is not None:
                with timed(self.seconds, "plan"):
                    plan, plan_cut = self.mllm.write([prompt], *planning)[0]
            if guided:
                self._unconditional()  # while the MLLM is on the device
            with timed(self.seconds, "prompt"):
                tokens = self.mllm.tokenize_prompts([join_plan(prompt, plan)], self.max_text_tokens)
                return plan, plan_cut or tokens.truncated[0], self.mllm.encode_prompts(tokens)

    def _encode_empty(self) -> PromptCache:
        return self.mllm.encode_prompts(self.mllm.tokenize_prompts([""], self.max_text_tokens))
