"""Feature networks: the library's own numbers, an identity that tells two networks apart, and no unnamed weights."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
from fixtures_clip import PREPROCESS, SIZE, WIDTH, save_tiny_clip

from bifrost_cli.config.schema import Evaluate
from bifrost_cli.errors import ArtifactError, BifrostError
from bifrost_cli.evaluation.networks import BATCH, ClipFeatures, feature_batches
from bifrost_cli.evaluation.networks import load_features as load_named


def load_features(ref: str, device: str):
    return load_named(ref, Evaluate(), device)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def network(folder):
    return load_features(f"open_clip:local-dir:{folder}", "cpu")


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3)).astype(np.uint8)


def test_equals_open_clip(folder, network):
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    pixels = torch.from_numpy(images(3)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(PREPROCESS[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = model.encode_image((pixels - mean) / std)
    found = network.features(images(3))
    assert found.dtype == np.float32 and found.shape == (3, WIDTH)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def test_identity_names_the_weights(folder, network, tmp_path):
    same = load_features(f"open_clip:local-dir:{folder}", "cpu").identity
    other = load_features(f"open_clip:local-dir:{save_tiny_clip(tmp_path / 'tiny', seed=1)}", "cpu").identity
    assert network.identity == same and len(same["weights"]) == 64
    assert same["width"] == WIDTH and same["image_size"] == SIZE and same["mean"] == PREPROCESS["mean"]
    assert {key for key in same if same[key] != other[key]} == {"weights"}


def test_activation_belongs_to_the_identity(network, tmp_path):
    quick = load_features(f"open_clip:local-dir:{save_tiny_clip(tmp_path / 'tiny', quick_gelu=True)}", "cpu")
    assert quick.identity["weights"] == network.identity["weights"] and quick.identity != network.identity


def test_identity_holds_no_path(folder, network):
    assert str(folder.parent) not in str(network.identity)


def test_a_picture_has_its_features_alone_or_among_others(network):
    many, few = (
        np.concatenate([batch["pool"] for batch in feature_batches(network, some, ["pool"])])
        for some in (images(BATCH + 5), images(BATCH + 5)[:7])
    )
    assert many.shape == (BATCH + 5, WIDTH)
    np.testing.assert_array_equal(many[:7], few)


@pytest.mark.parametrize("bad", [np.zeros((1, 16, 16, 3), np.uint8), np.zeros((1, SIZE, SIZE, 3), np.float32)])
def test_other_pictures_are_refused(network, bad):
    with pytest.raises(ValueError, match="uint8"):
        network.features(bad)


def test_a_model_in_half_precision_is_measured_in_float32(folder):
    model = open_clip.create_model(f"local-dir:{folder}").half()
    assert ClipFeatures(model, "half").features(images(1)).dtype == np.float32


def test_folders_without_safe_weights_are_refused(tmp_path):
    folder = save_tiny_clip(tmp_path / "tiny")
    weights = folder / "open_clip_model.safetensors"
    weights.rename(folder / "open_clip_pytorch_model.bin")
    with pytest.raises(BifrostError, match="safetensors") as caught:
        load_features(f"open_clip:local-dir:{folder}", "cpu")
    assert caught.value.exit_code == 5


def test_damaged_or_foreign_weights_are_refused(tmp_path):
    folder = save_tiny_clip(tmp_path / "damaged")
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    other = save_tiny_clip(tmp_path / "other")
    save_tiny_clip(tmp_path / "narrow", embed_dim=6)
    (other / "open_clip_model.safetensors").write_bytes((tmp_path / "narrow/open_clip_model.safetensors").read_bytes())
    for place in (folder, other):
        with pytest.raises(ArtifactError):
            load_features(f"open_clip:local-dir:{place}", "cpu")


@pytest.mark.parametrize(
    ("ref", "code"), [("inception", 3), ("open_clip:no-such/model", 3), ("open_clip:local-dir:/no/where", 3)]
)
def test_networks_that_are_not_there(ref, code):
    with pytest.raises(BifrostError) as caught:
        load_features(ref, "cpu")
    assert caught.value.exit_code == code and caught.value.fix


def test_dinov2_reads_as_dgm_eval_does(tmp_path):
    """Pillow's bicubic to 224, ImageNet's statistics, the class token; the folder is in transformers' own layout."""
    from PIL import Image
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                                     patch_size=14)).eval()  # fmt: skip
    model.save_pretrained(tmp_path / "dino")
    network = load_features(f"dinov2:{tmp_path / 'dino'}", "cpu")
    rgb = np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8)
    resized = np.array(Image.fromarray(rgb).resize((224, 224), Image.Resampling.BICUBIC))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        pixels = ((torch.from_numpy(resized) / 255 - mean) / std).permute(2, 0, 1)
        expected = model(pixel_values=pixels[None]).last_hidden_state[:, 0]
    found = network.outputs(network.prepare(rgb)[None], ["pool"])["pool"]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    assert network.identity["name"] == "dinov2:dino" and network.identity["width"] == 16
