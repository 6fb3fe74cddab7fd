"""The decoder as a block of Modular Diffusers: patch latents to images, among other people's blocks."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks, OutputParam, PipelineState

from bifrost_cli.errors import UsageError
from bifrost_cli.generation.pipeline import BifrostPipeline

_SETTINGS = {
    "num_inference_steps": "diffusion steps; by default the recipe's",
    "guidance_scale": "the diffusion model's guidance; by default the recipe's",
    "control_scale": "weight of the ControlNet; by default the recipe's",
}


class BifrostDecoderBlock(ModularPipelineBlocks):
    """`BifrostPipeline.decode` as a block: it takes `patch_latents` from the state and leaves `images`.

    The models are the pipeline's, loaded when they are first needed; a copy of the block shares them.

    Args:
        pipe: a pipeline with a ControlNet; its branch is not used.
    """

    model_name = "bifrost"

    def __init__(self, pipe: BifrostPipeline) -> None:
        super().__init__()
        self.pipe = pipe

    def __deepcopy__(self, memo: dict[int, Any]) -> BifrostDecoderBlock:
        return type(self)(self.pipe)

    @property
    def description(self) -> str:
        """What diffusers shows of the block."""
        return "Renders patch-level CLIP latents through a frozen diffusion model and Bifrost's latent ControlNet."

    @property
    def inputs(self) -> list[InputParam]:
        """What the block reads from the state."""
        latents = "patch latents (P, C) of one image, or (B, P, C), as BifrostPipeline.encode gives them"
        return [
            InputParam("patch_latents", type_hint=torch.Tensor, required=True, description=latents),
            InputParam("prompt", type_hint=str, default="", description="what the diffusion model reads beside them"),
            InputParam("seed", type_hint=int, default=0, description="of the first image; they count up"),
            *(InputParam(name, description=text) for name, text in _SETTINGS.items()),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """What the block leaves in the state."""
        return [OutputParam("images", type_hint=list, description="PIL images, one for each row of patch_latents")]

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Render the images. UsageError: `patch_latents` is no tensor of two or three dimensions."""
        stock: Any = self  # get_block_state and set_block_state come from a mixin that the stubs do not know
        block = stock.get_block_state(state)
        latents = block.patch_latents
        if not isinstance(latents, torch.Tensor) or latents.ndim not in (2, 3):
            raise UsageError("patch_latents is a tensor (P, C) or (B, P, C)",
                             at=f"got {getattr(latents, 'shape', type(latents))}")  # fmt: skip
        settings: dict[str, Any] = {name: getattr(block, name, None) for name in _SETTINGS}
        latents_BPC = latents[None] if latents.ndim == 2 else latents
        block.images = [
            self.pipe.decode(latents_PC, block.prompt, seed=block.seed + index, **settings)
            for index, latents_PC in enumerate(latents_BPC)
        ]
        stock.set_block_state(state, block)
        return components, state
