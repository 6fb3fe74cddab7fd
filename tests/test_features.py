"""Feature networks: the library's own numbers, an identity that tells two networks apart, and no unnamed weights."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
from fixtures_clip import PREPROCESS, SIZE, WIDTH, save_tiny_clip

from bifrost_cli.errors import ArtifactError, BifrostError
from bifrost_cli.models.features import BATCH, ClipFeatures, feature_batches
from bifrost_cli.stages.loading_clip import load_features


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def network(folder):
    return load_features(f"open_clip:local-dir:{folder}", "cpu")


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3)).astype(np.uint8)


def test_equals_open_clip(folder, network):
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    pixels = torch.from_numpy(pictures(3)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(PREPROCESS[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = model.encode_image((pixels - mean) / std)
    found = network.features(pictures(3))
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
    many = np.concatenate(list(feature_batches(network, pictures(BATCH + 5))))
    few = np.concatenate(list(feature_batches(network, pictures(BATCH + 5)[:7])))
    assert many.shape == (BATCH + 5, WIDTH)
    np.testing.assert_array_equal(many[:7], few)


@pytest.mark.parametrize("bad", [np.zeros((1, 16, 16, 3), np.uint8), np.zeros((1, SIZE, SIZE, 3), np.float32)])
def test_other_pictures_are_refused(network, bad):
    with pytest.raises(ValueError, match="uint8"):
        network.features(bad)


def test_a_model_in_half_precision_is_measured_in_float32(folder):
    model = open_clip.create_model(f"local-dir:{folder}").half()
    assert ClipFeatures(model, "half").features(pictures(1)).dtype == np.float32


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
    ("ref", "code"), [("inception", 2), ("open_clip:no-such/model", 3), ("open_clip:local-dir:/no/where", 3)]
)
def test_networks_that_are_not_there(ref, code):
    with pytest.raises(BifrostError) as caught:
        load_features(ref, "cpu")
    assert caught.value.exit_code == code and caught.value.fix
