"""Encoders: the library's own numbers before pooling, and identities that tell any two encoders apart."""

from __future__ import annotations

import json

import numpy as np
import open_clip
import pytest
import torch
from fixtures_clip import PREPROCESS, SIZE, save_tiny_clip
from fixtures_flux import save_mllm, save_painter, tiny_painter
from fixtures_loading import load_vae
from fixtures_mllm import random_mllm

from bifrost_cli.config.schema import Images, Latents, Models, Recipe
from bifrost_cli.errors import RecipeError
from bifrost_cli.loading.loaders import ModelLoader
from bifrost_cli.models.encoders import MllmEncoder, OpenClipEncoder, UnsupportedSize, VaeEncoder, VaePatchEncoder

CPU = torch.device("cpu")


def load_encoder(recipe: Recipe):
    return ModelLoader(recipe.models).encoder(recipe.latents, recipe.images)


def images(count: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def mllm():
    return random_mllm()


def clip_recipe(folder, size: int = SIZE) -> Recipe:
    return Recipe(images=Images(input_size=size), latents=Latents(encoder=f"open_clip:local-dir:{folder}"))


# ---- the MLLM's own ----------------------------------------------------------------------------------------------


def test_the_mllm_encoder_gives_the_visual_tokens_after_the_merge(mllm):
    encoder = MllmEncoder(mllm, 64)
    inputs = mllm.image_processor(images=list(images(3, 64)), do_resize=False, return_tensors="pt")
    with torch.no_grad():
        visual = mllm.model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    expected = visual.pooler_output.reshape(3, -1, encoder.channels)
    for pixels in (images(3, 64), torch.from_numpy(images(3, 64))):
        torch.testing.assert_close(encoder.encode(pixels), expected)
    assert encoder.grid == (4, 4) and encoder.encode(images(1, 64)).dtype == torch.float32


def test_the_grid_follows_the_picture_size(mllm):
    encoder = MllmEncoder(mllm, 96)
    assert encoder.grid == (6, 6) and encoder.encode(images(2, 96)).shape == (2, 36, mllm.width)
    with pytest.raises(UnsupportedSize, match="whole number of the MLLM's patches of 16") as caught:
        MllmEncoder(mllm, 100)
    assert caught.value.nearest == 96


def test_identities_are_json_and_name_what_differs(mllm):
    identity = MllmEncoder(mllm, 64).identity
    assert identity == json.loads(json.dumps(identity)) == MllmEncoder(mllm, 64).identity

    def changed(other) -> set[str]:
        return {key for key in identity if identity[key] != other.identity[key]}

    assert changed(MllmEncoder(mllm, 96)) == {"image_size", "grid"}
    assert changed(MllmEncoder(random_mllm(seed=1), 64)) == {"weights"}
    other = random_mllm()
    other.image_processor.image_mean = [0.5, 0.5, 0.5]
    assert changed(MllmEncoder(other, 64)) == {"mean"}
    other = random_mllm()
    other.model.model.visual.config.hidden_act = "gelu"
    assert changed(MllmEncoder(other, 64)) == {"activation"}
    other = random_mllm()
    other.model.to(torch.bfloat16)
    assert changed(MllmEncoder(other, 64)) == {"weights", "dtype"}


def test_only_the_visual_weights_belong_to_the_identity(mllm):
    other = random_mllm()
    with torch.no_grad():
        other.model.lm_head.weight.add_(1)
    assert MllmEncoder(other, 64).identity == MllmEncoder(mllm, 64).identity


def test_the_recipe_names_the_encoder(mllm, tmp_path):
    models = Models(mllm=str(save_mllm(mllm, tmp_path / "mllm")), dtype="float32")
    encoder = load_encoder(Recipe(models=models, images=Images(input_size=64)))
    assert encoder.identity == MllmEncoder(mllm, 64).identity
    torch.testing.assert_close(encoder.encode(images(2, 64)), MllmEncoder(mllm, 64).encode(images(2, 64)))


# ---- open_clip ----------------------------------------------------------------------------------------------------


def test_patch_tokens_are_open_clips_own_before_pooling(clip_folder):
    encoder = load_encoder(clip_recipe(clip_folder))
    model = open_clip.create_model(f"local-dir:{clip_folder}").eval()
    model.visual.output_tokens = True
    mean, std = (torch.tensor(PREPROCESS[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        pooled, tokens = model.visual((torch.from_numpy(images(3, SIZE)).permute(0, 3, 1, 2) / 255 - mean) / std)
    found = encoder.encode(images(3, SIZE))
    torch.testing.assert_close(found, tokens, atol=1e-5, rtol=1e-5)
    assert encoder.grid == (4, 4) and encoder.channels == 32 and found.shape == (3, 16, 32) and pooled.ndim == 2


def test_patches_come_row_by_row(clip_folder):
    """A spot in the second row, third column changes that patch most in a tower whose blocks are switched off."""
    model = open_clip.create_model(f"local-dir:{clip_folder}").eval()
    model.visual.transformer.resblocks = model.visual.transformer.resblocks[:1]
    for parameter in model.visual.transformer.parameters():
        parameter.data.zero_()
    encoder = OpenClipEncoder(model, "spot", SIZE)
    plain = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    spot = plain.copy()
    spot[0, 8:16, 16:24] = 255
    change = (encoder.encode(spot) - encoder.encode(plain)).abs().sum(-1)[0]
    assert change.argmax() == 1 * 4 + 2 and (change > 1e-4).sum() == 1


@pytest.mark.parametrize("vision", [{"final_ln_after_pool": True}, {"attentional_pool": True, "attn_pooler_heads": 2}])
def test_towers_that_pool_first_give_tokens_without_a_norm(tmp_path, vision):
    from fixtures_clip import MODEL

    folder = save_tiny_clip(tmp_path / "tiny", vision_cfg={**MODEL["vision_cfg"], **vision})
    encoder = load_encoder(clip_recipe(folder))
    assert encoder.identity["layer"].endswith("without a norm, before pooling")
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    with torch.no_grad():
        mean, std = (torch.tensor(PREPROCESS[key]).view(3, 1, 1) for key in ("mean", "std"))
        pixels = (torch.from_numpy(images(2, SIZE)).permute(0, 3, 1, 2) / 255 - mean) / std
        expected = model.visual.transformer(model.visual._embeds(pixels))[:, 1:]
    torch.testing.assert_close(encoder.encode(images(2, SIZE)), expected, atol=1e-5, rtol=1e-5)


def test_the_activation_is_part_of_the_identity(clip_folder, tmp_path):
    plain = load_encoder(clip_recipe(clip_folder))
    quick = load_encoder(clip_recipe(save_tiny_clip(tmp_path / "tiny", quick_gelu=True)))
    assert {key for key in plain.identity if plain.identity[key] != quick.identity[key]} == {"activation"}
    assert (plain.identity["activation"], quick.identity["activation"]) == ("GELU", "QuickGELU")
    assert not torch.equal(plain.encode(images(1, SIZE)), quick.encode(images(1, SIZE)))
    assert plain.identity == json.loads(json.dumps(plain.identity)) and str(clip_folder.parent) not in str(
        plain.identity
    )


def test_a_setting_that_would_be_ignored_is_refused(clip_folder):
    with pytest.raises(RecipeError, match="input_size is 448, but .* reads 32") as caught:
        load_encoder(clip_recipe(clip_folder, 448))
    assert caught.value.fix == "--set images.input_size=32"
    with pytest.raises(ValueError, match="32"):
        load_encoder(clip_recipe(clip_folder)).encode(images(1, 16))


# ---- the diffusion model's VAE ----


def test_the_vae_alone_gives_the_painters_latents(tmp_path):
    diffusion = tiny_painter()
    vae = load_vae(str(save_painter(diffusion, tmp_path / "flux")), CPU)
    encoder = VaeEncoder(vae, 64)
    pixels = images(2, 64)
    expected = diffusion.encode(torch.from_numpy(pixels))
    torch.testing.assert_close(encoder.encode(pixels), expected.float())
    assert encoder.shape == tuple(expected.shape[1:]) and encoder.identity == json.loads(json.dumps(encoder.identity))
    with pytest.raises(UnsupportedSize, match="63, not a multiple") as caught:
        VaeEncoder(vae, 63)
    assert caught.value.nearest == 56


def test_vae_patches_are_the_vaes_latents_cut_in_tiles():
    vae = tiny_painter().vae
    encoder, whole = VaePatchEncoder(vae, 64), VaeEncoder(vae, 64)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    latents_BPC, vae_Bchw = encoder.encode(pixels), whole.encode(pixels)
    side, channels = encoder.grid[0], whole.shape[0]
    assert latents_BPC.shape == (2, side * side, 16 * channels) and encoder.channels == 16 * channels
    patch = side + 1  # the second row's second patch
    torch.testing.assert_close(latents_BPC[1, patch], vae_Bchw[1, :, 4:8, 4:8].flatten())
    assert encoder.identity["name"] == "vae" and encoder.identity["weights"] == whole.identity["weights"]
