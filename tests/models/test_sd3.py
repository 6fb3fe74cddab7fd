"""SD3 as a diffusion model: the stock pipelines' numbers, with and without control and guidance; gradients."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline
from fixtures_sd3 import PARTS, sd3_pipeline, sd3_transformer, tiny_sd3, tiny_sd3_controlnet
from torch import nn

from bifrost_cli.models.diffusion import rectified_flow
from bifrost_cli.models.diffusion.base import ControlInput, UnsupportedControl, token_ids
from bifrost_cli.models.diffusion.controlnet import config_family, controlnet_config, controlnet_from_config
from bifrost_cli.models.diffusion.sd3 import Sd3Model

PROMPT = "a red circle above a blue square"


@pytest.fixture(scope="module")
def diffusion() -> Sd3Model:
    return tiny_sd3()


@pytest.fixture(scope="module")
def noise(diffusion: Sd3Model) -> torch.Tensor:
    return diffusion.noise(64, torch.Generator().manual_seed(5))


def patch_latents(rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, 16, 12, generator=torch.Generator().manual_seed(2))


class Given(nn.Module):
    """Stands where a stock ControlNet embeds its control image, and gives what our embedder gave."""

    def __init__(self, embedded_BND: torch.Tensor) -> None:
        super().__init__()
        self.embedded_BND = embedded_BND

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.embedded_BND.expand(len(image), -1, -1)


# ---- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_without_control_it_is_the_stock_pipeline(diffusion: Sd3Model, noise: torch.Tensor, guidance: float) -> None:
    stock = sd3_pipeline(diffusion)
    stock.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "height": 64, "width": 64, "max_sequence_length": 16}
    expected = stock(PROMPT, latents=noise, guidance_scale=guidance, output_type="latent", **options).images
    text = diffusion.embed([PROMPT], 16, guidance)
    seen: list[tuple[int, float, torch.Tensor]] = []
    ours = diffusion.denoise(
        noise, text, steps=3, guidance=guidance, callback=lambda step, t, x: seen.append((step, float(t), x))
    )
    assert [step for step, _, _ in seen] == [0, 1, 2] and 1000 >= seen[0][1] > seen[2][1] > 0
    assert torch.equal(seen[-1][2], ours)
    assert ours.shape == noise.shape and (ours - noise).abs().max() > 0.1
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    pixels = stock(PROMPT, latents=noise, guidance_scale=guidance, output_type="np", **options).images
    assert (diffusion.decode(ours).float() / 255 - torch.from_numpy(pixels)).abs().max() <= 0.5 / 255 + 1e-4


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_with_control_it_is_the_stock_pipeline(diffusion: Sd3Model, noise: torch.Tensor, guidance: float) -> None:
    controlnet, latents = tiny_sd3_controlnet(diffusion), patch_latents()
    twin = copy.deepcopy(controlnet)
    twin.pos_embed_input = Given(controlnet.pos_embed_input(latents))
    stock = StableDiffusion3ControlNetPipeline(controlnet=twin, **{part: getattr(diffusion, part) for part in PARTS})
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        PROMPT, latents=noise, control_image=torch.zeros(1, 3, 64, 64), controlnet_conditioning_scale=0.7, height=64,
        width=64, num_inference_steps=3, guidance_scale=guidance, max_sequence_length=16, output_type="latent",
    ).images  # fmt: skip
    text, options = diffusion.embed([PROMPT], 16, guidance), {"steps": 3, "guidance": guidance}
    ours = diffusion.denoise(noise, text, control=ControlInput(controlnet, latents, 0.7), **options)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (ours - diffusion.denoise(noise, text, **options)).abs().max() > 1e-2


def test_text_is_the_stock_pipelines(diffusion: Sd3Model) -> None:
    prompts = [PROMPT, "a green star " * 100]
    stock = sd3_pipeline(diffusion).encode_prompt(prompts, None, None, max_sequence_length=12)
    ours = diffusion.embed(prompts, 12, guidance=2.0)
    for given, expected in zip((ours.sequence_BTD, ours.empty.sequence_BTD, ours.pooled_BD, ours.empty.pooled_BD),
                               stock, strict=True):  # fmt: skip
        torch.testing.assert_close(given, expected, atol=1e-6, rtol=0)
    assert diffusion.embed(prompts, 12).empty is None
    assert diffusion.too_long(prompts[1], 12) and not diffusion.too_long(PROMPT, 12)


def test_guidance_without_the_empty_prompt_is_refused(diffusion: Sd3Model, noise: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="empty prompt"):
        diffusion.denoise(noise, diffusion.embed([PROMPT], 8), steps=1, guidance=3.5)


# ---- the ControlNet --------------------------------------------------------------------------------------------------


def test_a_new_controlnet_changes_nothing(diffusion: Sd3Model, noise: torch.Tensor) -> None:
    before = dict(diffusion.transformer.config)
    controlnet = diffusion.new_controlnet(2, 0, 12).eval()
    assert dict(diffusion.transformer.config) == before
    text, control = diffusion.embed([PROMPT], 8, 3.5), ControlInput(controlnet, patch_latents())
    assert torch.equal(
        diffusion.denoise(noise, text, steps=2), diffusion.denoise(noise, text, control=control, steps=2)
    )


def test_blocks_start_as_copies(diffusion: Sd3Model) -> None:
    controlnet = diffusion.new_controlnet(2, 0, 12)
    assert len(controlnet.transformer_blocks) == 2 and controlnet.transformer_blocks[0].use_dual_attention
    for name in ("transformer_blocks.0", "transformer_blocks.1", "pos_embed", "time_text_embed", "context_embedder"):
        ours, theirs = (model.get_submodule(name).state_dict() for model in (controlnet, diffusion.transformer))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_blocks_that_are_not_there_are_refused(diffusion: Sd3Model) -> None:
    with pytest.raises(UnsupportedControl, match="no single blocks") as caught:
        diffusion.new_controlnet(2, 1, 12)
    assert (caught.value.key, caught.value.value) == ("single_blocks", 0)
    with pytest.raises(UnsupportedControl, match="residuals of 2") as caught:  # the third has no block to go to
        diffusion.new_controlnet(3, 0, 12)
    assert (caught.value.key, caught.value.value) == ("double_blocks", 2)


def test_config_round_trip_through_json(diffusion: Sd3Model) -> None:
    controlnet = tiny_sd3_controlnet(diffusion)
    config = json.loads(json.dumps(controlnet_config(controlnet)))
    again = controlnet_from_config(config)
    assert isinstance(again, SD3ControlNetModel) and config_family(config) == "SD3"
    again.load_state_dict(controlnet.state_dict())
    assert torch.equal(again.pos_embed_input(patch_latents()), controlnet.pos_embed_input(patch_latents()))
    assert not again.training and controlnet_config(again) == controlnet_config(controlnet)


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_gradients_reach_the_controlnet_alone(diffusion: Sd3Model) -> None:
    controlnet = tiny_sd3_controlnet(diffusion).requires_grad_(True).train()
    text = diffusion.embed([PROMPT, ""], 8)
    clean = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    diffusion.control_loss(controlnet, clean, patch_latents(2), text, torch.Generator().manual_seed(3)).backward()
    silent = {name for name, p in controlnet.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    # Nothing reads the text stream after the last block, so the stock layers that only make it learn nothing.
    last = ("attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2")
    assert silent == {f"transformer_blocks.1.{layer}.{kind}" for layer in last for kind in ("weight", "bias")}
    parts = (
        diffusion.transformer,
        diffusion.vae,
        diffusion.text_encoder,
        diffusion.text_encoder_2,
        diffusion.text_encoder_3,
    )
    assert all(p.grad is None for part in parts for p in part.parameters())


def test_the_loss_is_flow_matching_at_the_shifted_levels(diffusion: Sd3Model) -> None:
    """Recomputed by hand from the same draws, through the bare transformer."""
    controlnet = diffusion.new_controlnet(1, 0, 12).eval()
    clean = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    text, draws = diffusion.embed([PROMPT, ""], 8), torch.Generator().manual_seed(3)
    loss = diffusion.control_loss(controlnet, clean, patch_latents(2), text, torch.Generator().manual_seed(3))
    noise = torch.randn(clean.shape, generator=draws)
    sigma = rectified_flow.shift_constant(rectified_flow.logit_normal(2, draws), 3.0)
    noisy = (1 - sigma.view(-1, 1, 1, 1)) * clean + sigma.view(-1, 1, 1, 1) * noise
    with torch.no_grad():
        velocity = diffusion.transformer(noisy, text.sequence_BTD, text.pooled_BD, 1000 * sigma).sample
    torch.testing.assert_close(loss.detach(), nn.functional.mse_loss(velocity, noise - clean))
    assert abs(diffusion.training_sigmas(20_000, 64, torch.Generator().manual_seed(0)).median() - 0.75) < 0.01


def test_older_sd3_without_dual_attention_is_the_same_code() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = {**sd3_transformer().config, "dual_attention_layers": (), "qk_norm": None}
        diffusion = Sd3Model(type(sd3_transformer()).from_config(config).eval(), *[None] * 8)
    controlnet = diffusion.new_controlnet(1, 0, 4)
    assert controlnet.config.qk_norm is None and not controlnet.transformer_blocks[0].use_dual_attention


def test_special_tokens_that_a_user_typed_are_characters(diffusion: Sd3Model) -> None:
    empty = diffusion.embed(["", f"<|endoftext|>{PROMPT}", f"</s>{PROMPT}"], 12).pooled_BD
    assert not torch.equal(empty[0], empty[1])
    for tokenizer in (diffusion.tokenizer, diffusion.tokenizer_2, diffusion.tokenizer_3):
        ids = token_ids(tokenizer, [f"{tokenizer.eos_token} {PROMPT}"], 64)[0].tolist()
        assert ids.index(tokenizer.eos_token_id) > len(tokenizer(PROMPT).input_ids) - 2
