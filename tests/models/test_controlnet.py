"""The latent ControlNet: the published numbers, a start that changes nothing, a config that rebuilds it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from fixtures_flux import tiny_controlnet, tiny_painter
from parity_flux import check_controlnet

from bifrost_cli.interop.published_names import from_published
from bifrost_cli.models.diffusion.base import ControlInput, UnsupportedControl
from bifrost_cli.models.diffusion.controlnet import (
    PatchLatentEmbedder,
    controlnet_config,
    controlnet_from_config,
    latent_controlnet,
)

VECTORS = Path(__file__).parents[1] / "vectors"


def test_the_published_modules_numbers() -> None:
    rows = check_controlnet(VECTORS / "controlnet")
    assert rows and all(error <= tolerance for _, error, tolerance in rows), rows


def test_a_new_controlnet_changes_nothing() -> None:
    diffusion = tiny_painter()
    controlnet = latent_controlnet(diffusion.transformer, 2, 4, channels=12)
    text, noise = diffusion.embed(["a red circle"], 8), diffusion.noise(64, torch.Generator().manual_seed(0))
    control = ControlInput(controlnet.eval(), torch.randn(1, 16, 12, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(
        diffusion.denoise(noise, text, steps=2), diffusion.denoise(noise, text, control=control, steps=2)
    )
    assert len(controlnet.transformer_blocks) == 2 and len(controlnet.single_transformer_blocks) == 4


def test_blocks_start_as_copies_of_flux() -> None:
    diffusion = tiny_painter()
    controlnet = latent_controlnet(diffusion.transformer, 1, 1, channels=12)
    for name in ("transformer_blocks.0", "single_transformer_blocks.0", "time_text_embed"):
        ours, theirs = (model.get_submodule(name).state_dict() for model in (controlnet, diffusion.transformer))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(("double", "single", "key"), [(3, 0, "double_blocks"), (2, 3, "single_blocks")])
def test_blocks_that_flux_would_not_hear_are_refused(double: int, single: int, key: str) -> None:
    """Of 4 single blocks stock gives 2 runs of 2 to 3 residuals, and leaves the third out."""
    with pytest.raises(UnsupportedControl, match="the residuals of 2") as caught:
        latent_controlnet(tiny_painter().transformer, double, single, channels=12)
    assert (caught.value.key, caught.value.value) == (key, 2)


def test_config_round_trip_through_json() -> None:
    controlnet = tiny_controlnet(tiny_painter())
    again = controlnet_from_config(json.loads(json.dumps(controlnet_config(controlnet))))
    again.load_state_dict(controlnet.state_dict())
    latents = torch.randn(2, 16, 12, generator=torch.Generator().manual_seed(2))
    assert torch.equal(again.controlnet_x_embedder(latents), controlnet.controlnet_x_embedder(latents))
    assert not again.training and controlnet_config(again) == controlnet_config(controlnet)


def test_a_grid_that_is_no_square_is_refused() -> None:
    with pytest.raises(ValueError, match="15 patches"):
        PatchLatentEmbedder(4, 8)(torch.zeros(1, 15, 4))


def test_published_names_keep_everything_else() -> None:
    names = {"up_sampling_block.bn1.weight": "controlnet_x_embedder.bn1.weight", "x_embedder.bias": "x_embedder.bias",
             "controlnet_x_embedder.weight": "controlnet_x_embedder.proj.weight"}  # fmt: skip
    assert set(from_published({name: torch.zeros(1) for name in names})) == set(names.values())


# ---- sizes -----------------------------------------------------------------------------------------------------------

# transformer/config.json of FLUX.1-dev; FLUX.1-schnell's differs by the guidance embedding alone.
PUBLISHED = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
}  # fmt: skip


@pytest.mark.parametrize(
    ("guided", "blocks", "millions"),
    [(True, (4, 1), 1771.19), (False, (4, 1), 1760.96), (True, (1, 4), 1176.47)],
    ids=["dev", "schnell", "dev, as the published script builds it"],
)
def test_parameters_at_the_papers_scale(guided: bool, blocks: tuple[int, int], millions: float) -> None:
    """For the 3584 channels of Qwen2.5-VL-7B, counted without making a number of it."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**PUBLISHED, guidance_embeds=guided)
        controlnet = latent_controlnet(transformer, *blocks, channels=3584)
    assert controlnet.device.type == "meta"
    assert sum(p.numel() for p in controlnet.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
