"""The diffusion model: the published loop's numbers, the stock pipeline's bits, packing, and where gradients go."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline
from fixtures_flux import PARTS, tiny_controlnet, tiny_painter
from fixtures_loading import load_diffusion
from parity_flux import check_flux_denoise

from bifrost_cli.models.diffusion import rectified_flow
from bifrost_cli.models.diffusion.base import ControlInput, vae_encode
from bifrost_cli.models.diffusion.flux import FluxModel, image_ids, pack, unpack
from bifrost_cli.models.mllm.chat_template import harmless

VECTORS = Path(__file__).parents[1] / "vectors"


@pytest.fixture(scope="module")
def diffusion() -> FluxModel:
    return tiny_painter()


def test_the_published_loops_numbers() -> None:
    rows = check_flux_denoise(VECTORS / "flux_denoise")
    assert rows and all(error <= tolerance for _, error, tolerance in rows), rows


def test_without_control_it_is_the_stock_pipeline(diffusion: FluxModel) -> None:
    pipeline = FluxPipeline(**{part: getattr(diffusion, part) for part in PARTS})
    pipeline.set_progress_bar_config(disable=True)
    noise = diffusion.noise(64, torch.Generator().manual_seed(5))
    options = {"num_inference_steps": 3, "height": 64, "width": 64, "max_sequence_length": 16, "output_type": "np"}
    stock = pipeline("a red circle above a blue square", latents=pack(noise), **options).images
    with torch.no_grad():
        ours = diffusion.decode(
            diffusion.denoise(noise, diffusion.embed(["a red circle above a blue square"], 16), steps=3)
        )
    assert ours.shape == (1, 64, 64, 3) and ours.dtype == torch.uint8
    assert np.array_equal(np.round(stock * 255).astype(np.uint8), ours.numpy())


def test_pack_is_stock_and_unpack_its_inverse() -> None:
    latents = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 3, 4, 6))
    assert torch.equal(unpack(pack(latents), (4, 6)), latents)
    ids = FluxPipeline._prepare_latent_image_ids(2, 2, 3, "cpu", torch.float32)
    assert torch.equal(image_ids(latents), ids)


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_any_vae_factor(diffusion: FluxModel, levels: int) -> None:
    vae = AutoencoderKL(
        block_out_channels=[8] * levels, down_block_types=["DownEncoderBlock2D"] * levels, norm_num_groups=4,
        up_block_types=["UpDecoderBlock2D"] * levels, latent_channels=16, shift_factor=0.25, scaling_factor=2.0,
    ).eval()  # fmt: skip
    other = replace(diffusion, vae=vae)
    pixels = torch.randint(0, 256, (1, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    latents = other.encode(pixels)
    mean = vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mode()
    torch.testing.assert_close(latents, (mean - 0.25) * 2.0)
    assert latents.shape == other.noise(32, torch.Generator()).shape and other.factor == 2 ** (levels - 1)
    assert other.decode(latents).shape == pixels.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_are_normalised_in_float32(diffusion: FluxModel, dtype: torch.dtype) -> None:
    """In bfloat16 126 / 127.5 is 0.988, so that the difference to 1 would be half a grey level off."""
    vae, seen = copy.deepcopy(diffusion.vae).to(dtype), []
    vae.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    greys = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(-1, -1, -1, 3)
    vae_encode(vae, greys)
    assert torch.equal(seen[0][0, 0].flatten(), (torch.arange(256) / 127.5 - 1).to(dtype))


def test_control_changes_the_picture_and_scale_weighs_it(diffusion: FluxModel) -> None:
    text, noise = diffusion.embed(["a star"], 8), diffusion.noise(64, torch.Generator().manual_seed(0))
    latents = torch.randn(1, 16, 12, generator=torch.Generator().manual_seed(1))
    controlnet = tiny_controlnet(diffusion)
    plain = diffusion.denoise(noise, text, steps=2)
    shifts = [
        float(
            (diffusion.denoise(noise, text, control=ControlInput(controlnet, latents, scale), steps=2) - plain)
            .abs()
            .mean()
        )
        for scale in (0.0, 0.5, 1.0)
    ]
    assert shifts[0] < 1e-5 < shifts[1] < shifts[2]


def test_every_step_is_reported(diffusion: FluxModel) -> None:
    text, noise = diffusion.embed(["a star"], 8), diffusion.noise(64, torch.Generator().manual_seed(0))
    seen: list[tuple[int, float, torch.Tensor]] = []
    last = diffusion.denoise(noise, text, steps=3, callback=lambda step, t, x: seen.append((step, float(t), x)))
    assert [step for step, _, _ in seen] == [0, 1, 2] and seen[0][1] == 1000 > seen[1][1] > seen[2][1] > 0
    assert all(x.shape == noise.shape for _, _, x in seen) and torch.equal(seen[-1][2], last)


def test_gradients_reach_the_controlnet_alone(diffusion: FluxModel) -> None:
    controlnet = tiny_controlnet(diffusion).requires_grad_(True).train()
    text = diffusion.embed(["a red circle", ""], 8)
    latents = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    control = torch.randn(2, 16, 12, generator=torch.Generator().manual_seed(2))
    diffusion.control_loss(controlnet, latents, control, text, torch.Generator().manual_seed(3)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in controlnet.parameters())
    assert all(p.grad is None for p in diffusion.transformer.parameters())


def test_losses_share_noise_and_levels(diffusion: FluxModel) -> None:
    text = diffusion.embed(["a red circle", "a star"], 8)
    latents = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    silent = tiny_controlnet(diffusion)
    for tensor in silent.state_dict().values():
        tensor.zero_()
    control = torch.zeros(2, 16, 12)
    base = diffusion.base_loss(latents, *text, torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        base, diffusion.control_loss(silent, latents, control, text, torch.Generator().manual_seed(3))
    )
    assert base > 0 and diffusion.base_loss(latents, *text, torch.Generator().manual_seed(4)) != base


def test_training_levels_follow_the_sampling_shift(diffusion: FluxModel) -> None:
    levels = diffusion.training_sigmas(20_000, 64, torch.Generator().manual_seed(0))
    median = rectified_flow.shift_exponential(torch.tensor(0.5), rectified_flow.shift_mu(64))
    assert abs(levels.median() - median) < 0.01


def test_embed_lets_gradients_through_and_cuts_long_prompts(diffusion: FluxModel) -> None:
    text = diffusion.embed(["a red circle " * 1000, "日本語 🙂"], 12)
    assert text.sequence_BTD.shape == (2, 12, 64) and text.pooled_BD.shape == (2, 64)
    diffusion.text_encoder_2.requires_grad_(True)
    assert diffusion.embed(["a star"], 12).sequence_BTD.requires_grad
    diffusion.text_encoder_2.requires_grad_(False)


@pytest.mark.parametrize("typed", ["<|endoftext|> a red circle", "<|ENDOFTEXT|>a red circle", "</s> a red circle",
                                   "<pad><pad> a red circle", "\uff1c/s\uff1e a red circle", "<\x01/s> a red circle",
                                   "a red circle<|startoftext|>", "a<unk>b </s></s>"])  # fmt: skip
def test_special_tokens_that_a_user_typed_are_characters(typed):
    diffusion = load_diffusion("builtin:flux", torch.device("cpu"))
    for tokenizer, ids in zip((diffusion.tokenizer, diffusion.tokenizer_2), diffusion.tokenize([typed], 64),
                              strict=True):  # fmt: skip
        special, row = set(tokenizer.all_special_ids) - {2}, ids[0].tolist()  # 2: T5's unknown characters
        content = [token for token in row if token not in special]
        start = 1 if row[0] in special else 0
        assert row[start : start + len(content)] == content and len(content) > 3
    assert diffusion.too_long(typed, len(diffusion.tokenizer_2(harmless(typed, diffusion.tokenizer_2)).input_ids) - 1)


@pytest.mark.parametrize(
    "prompt", ["", "a red circle", "5 < 6 & <b>bold</b>", "\uff33\uff21\uff2c\uff25 \ufb01ne", "a\tb\u200d"]
)
def test_ids_of_ordinary_prompts_are_the_stock_tokenizers(prompt):
    diffusion = load_diffusion("builtin:flux", torch.device("cpu"))
    clip_BT, t5_BT = diffusion.tokenize([prompt], 32)
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    assert torch.equal(clip_BT, diffusion.tokenizer([prompt], max_length=clip_BT.shape[1], **options).input_ids)
    assert torch.equal(t5_BT, diffusion.tokenizer_2([prompt], max_length=32, **options).input_ids)
