"""The decoder as a Modular Diffusers block: alone and between other blocks it gives what the pipeline gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks, OutputParam, SequentialPipelineBlocks
from fixtures_flux import save_system

from bifrost_cli import BifrostPipeline
from bifrost_cli.errors import UsageError
from bifrost_cli.generation.modular_block import BifrostDecoderBlock


class Turn(ModularPipelineBlocks):
    """Somebody else's block: the images, each turned over."""

    model_name = "turn"
    inputs = [InputParam("images", required=True)]
    intermediate_outputs = [OutputParam("turned")]

    def __call__(self, components, state):
        block = self.get_block_state(state)
        block.turned = [np.asarray(image)[::-1] for image in block.images]
        self.set_block_state(state, block)
        return components, state


def test_alone_and_between_other_blocks_it_is_the_pipelines_decode(tmp_path):
    system = save_system(tmp_path)
    pipe = BifrostPipeline(system.recipe, controlnet=system.controlnet, device="cpu")
    latents_BPC = torch.randn((2, 16, 128), generator=torch.Generator().manual_seed(0))
    block = BifrostDecoderBlock(pipe)
    images = block.init_pipeline()(patch_latents=latents_BPC, prompt="a star", seed=3, output="images")
    wanted = [np.asarray(pipe.decode(latents_BPC[i], "a star", seed=3 + i)) for i in (0, 1)]
    assert all(np.array_equal(one, other) for one, other in zip(images, wanted, strict=True))
    both = SequentialPipelineBlocks.from_blocks_dict({"decode": block, "turn": Turn()}).init_pipeline()
    (turned,) = both(patch_latents=latents_BPC[0], prompt="a star", seed=3, output="turned")
    assert np.array_equal(turned[::-1], wanted[0])
    (other,) = block.init_pipeline()(patch_latents=latents_BPC[0], prompt="a star", seed=3, num_inference_steps=1,
                                     output="images")  # fmt: skip
    assert not np.array_equal(other, wanted[0])
    with pytest.raises(UsageError, match="patch_latents"):
        block.init_pipeline()(patch_latents=latents_BPC[0, 0])
