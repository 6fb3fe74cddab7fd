"""Other ways for FLUX to hear latents than a ControlNet: what they change at first, what they are told, what trains."""

from __future__ import annotations

import json

import pytest
import torch
from fixtures_flux import tiny_controlnet, tiny_painter
from fixtures_sd3 import tiny_sd3

from bifrost_cli.ablations.conditioners import ConcatConditioner, TokenConditioner
from bifrost_cli.models.diffusion.base import ControlInput, UnsupportedControl
from bifrost_cli.models.diffusion.controlnet import (
    controlnet_config,
    controlnet_from_config,
    image_tokens,
    latent_controlnet,
)

KINDS = ("cross_attention", "concat")


@pytest.fixture(scope="module")
def diffusion():
    return tiny_painter()


def latents(seed: int = 1, patches: int = 16) -> torch.Tensor:
    return torch.randn(1, patches, 12, generator=torch.Generator().manual_seed(seed))


def rendered(diffusion, control=None, more_text=0):
    text, noise = diffusion.embed(["a red circle"], 8), diffusion.noise(64, torch.Generator().manual_seed(0))
    empty = text.sequence_BTD.new_zeros(1, more_text, text.sequence_BTD.shape[2])
    text = text._replace(sequence_BTD=torch.cat([text.sequence_BTD, empty], dim=1))
    return diffusion.denoise(noise, text, control=control, steps=2)


def stirred(control: torch.nn.Module) -> torch.nn.Module:
    """The layer that starts at zero, made random."""
    zero = control.proj if isinstance(control, TokenConditioner) else control.embedder.proj
    torch.nn.init.normal_(zero.weight, std=0.5, generator=torch.Generator().manual_seed(5))
    return control.eval()


def test_latents_at_the_input_change_nothing_at_first(diffusion):
    control = diffusion.new_control("concat", 12, 16, 2).eval()
    assert torch.equal(rendered(diffusion), rendered(diffusion, ControlInput(control, latents())))


def test_latents_beside_the_text_are_as_many_empty_tokens_at_first(diffusion):
    """A softmax has no token that counts for nothing, so this control starts with 16 empty words."""
    control = diffusion.new_control("cross_attention", 12, 16, 2).eval()
    first, second = (rendered(diffusion, ControlInput(control, latents(seed))) for seed in (1, 2))
    assert torch.equal(first, second) and torch.equal(first, rendered(diffusion, more_text=16))
    assert not torch.equal(first, rendered(diffusion))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_told_changes_the_picture_and_the_scale_counts(diffusion, kind):
    control = stirred(diffusion.new_control(kind, 12, 16, 2))
    made = [
        rendered(diffusion, ControlInput(control, latents(seed), scale))
        for seed, scale in ((1, 1.0), (2, 1.0), (1, 0.5))
    ]
    assert not torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert not diffusion.transformer.x_embedder._forward_hooks  # nothing stays behind
    silent = rendered(diffusion, ControlInput(control, latents(), 0.0))
    assert torch.equal(silent, rendered(diffusion, more_text=16 if kind == "cross_attention" else 0))


def test_latents_at_the_input_are_one_linear_layer_of_both(diffusion):
    """W x + U c is the wider layer (W U) on both: input concatenation without another diffusion model."""
    control, told = stirred(ConcatConditioner(12, diffusion.transformer.inner_dim)), latents()
    noisy_BNc, fine_BNC = torch.randn(1, 64, 64), control.embedder.upsample(told)
    own, ours = diffusion.transformer.x_embedder, control.embedder.proj
    wide = torch.cat([own.weight, ours.weight], dim=1) @ torch.cat([noisy_BNc, fine_BNC], dim=2).mT
    assert torch.allclose(own(noisy_BNc) + control(told), wide.mT + own.bias + ours.bias, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_control_alone(diffusion, kind):
    control = stirred(diffusion.new_control(kind, 12, 16, 2)).train()
    vae, text = torch.randn(2, 16, 16, 16), diffusion.embed(["a red circle", ""], 8)
    loss = diffusion.control_loss(control, vae, torch.randn(2, 16, 12), text, torch.Generator().manual_seed(0))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in control.parameters())
    assert all(p.grad is None for module in diffusion.frozen_modules() for p in module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_config_round_trip_through_json(diffusion, kind):
    control = stirred(diffusion.new_control(kind, 12, 16, 2))
    again = controlnet_from_config(json.loads(json.dumps(controlnet_config(control))))
    again.load_state_dict(control.state_dict())
    assert torch.equal(again(latents()), control(latents())) and not again.training


def test_a_painter_of_another_family_is_refused():
    with pytest.raises(UnsupportedControl, match="made for FLUX") as caught:
        tiny_sd3().new_control("concat", 12, 16, 2)
    assert (caught.value.key, caught.value.value) == ("control", "controlnet")


# ---- how many image tokens a patch has -------------------------------------------------------------------------------


@pytest.mark.parametrize(("patches", "ratio"), [(64, 1), (16, 2), (4, 4), (1, 8)])
def test_any_whole_number_of_image_tokens_a_patch(diffusion, patches, ratio):
    controlnet = latent_controlnet(diffusion.transformer, 1, 1, 12, ratio).eval()
    assert image_tokens(controlnet, patches) == 64
    assert torch.equal(rendered(diffusion), rendered(diffusion, ControlInput(controlnet, latents(patches=patches))))
    again = controlnet_from_config(json.loads(json.dumps(controlnet_config(controlnet))))
    again.load_state_dict(controlnet.state_dict())
    assert image_tokens(again, patches) == 64


def test_the_papers_ratio_is_not_written_down(diffusion):
    assert "control_ratio" not in controlnet_config(tiny_controlnet(diffusion))
    assert image_tokens(TokenConditioner(12, 16, 64), 16) is None
