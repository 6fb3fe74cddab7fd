"""FID, KID, IS, PRDC and sFID end to end: torch-fidelity's numbers through the same random Inception weights."""

from __future__ import annotations

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from bifrost_cli.artifacts import Artifact
from bifrost_cli.config.schema import Evaluate, Models, Recipe
from bifrost_cli.data.safetensors_io import save_tensors
from bifrost_cli.errors import ArtifactError, DataError, EnvironmentProblem, UsageError
from bifrost_cli.evaluation import feature_statistics, networks
from bifrost_cli.evaluation.evaluate import evaluate
from bifrost_cli.evaluation.feature_statistics import load_adm
from bifrost_cli.evaluation.networks import INCEPTION_FILE, feature_batches, load_features

COUNT = 12


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file in the published form with random numbers; the batch norms' statistics keep activations alive."""
    model = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    original, torch.load = torch.load, lambda *args, **options: None
    load, FeatureExtractorInceptionV3.load_state_dict = FeatureExtractorInceptionV3.load_state_dict, lambda *a: None
    try:
        torch.manual_seed(0)
        model.__init__("random", ["2048"], "none")
    finally:
        torch.load, FeatureExtractorInceptionV3.load_state_dict = original, load
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    """A batch is filled up with empty images; here that would be most of the work."""
    before, networks.BATCH = networks.BATCH, 4
    yield
    networks.BATCH = before


def images(folder, seed: int, size: int = 40):
    """Blobs of colour: noise would be the same to any network after a resize."""
    folder.mkdir()
    draw = np.random.default_rng(seed)
    for index in range(COUNT):
        rough = Image.fromarray(draw.integers(0, 256, (5, 5, 3)).astype(np.uint8))
        rough.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    place = tmp_path_factory.mktemp("sides")
    return images(place / "made", 0), images(place / "real", 1)


@pytest.fixture(scope="module")
def recipe(weights):
    settings = Evaluate(features="inception", inception_weights=str(weights), min_samples=COUNT)
    return Recipe(name="test", models=Models(diffusion="builtin:flux"), evaluate=settings)


@pytest.fixture(scope="module")
def report(recipe, sides, tmp_path_factory) -> Artifact:
    metrics = ["fid", "sfid", "kid", "is", "prdc"]
    workspace = tmp_path_factory.mktemp("runs")
    return evaluate(recipe, metrics=metrics, samples=sides[0], reference=sides[1], workspace=workspace)


def test_the_numbers_are_torch_fidelitys(report, sides, weights):
    theirs = torch_fidelity.calculate_metrics(
        input1=str(sides[0]), input2=str(sides[1]), feature_extractor_weights_path=str(weights), cuda=False, fid=True,
        isc=True, kid=True, kid_subset_size=COUNT, kid_subsets=1, prc=True, feature_extractor="inception-v3-compat",
        feature_layer_prc="2048", prc_neighborhood=3, cache=False, verbose=False,
    )  # fmt: skip
    info = report.info
    assert info["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert info["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert info["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    results = read(report)
    adm = next(result["adm"] for result in results if result["metric"] == "prdc")
    assert (adm["precision"], adm["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]))
    assert {result["label"] for result in results} == {"FID", "sFID", "KID", "Inception score", "Precision"}
    assert all(result["extractor"]["name"] == "inception" for result in results)


def read(artifact: Artifact) -> list[dict]:
    import json

    return json.loads(artifact.file("report.json").read_text())["results"]


def test_spatial_features_are_row_by_row_and_the_first_seven_channels(recipe, weights):
    network = load_features("inception", recipe.evaluate, "cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3)).astype(np.uint8)
    seen = []
    branch = network._model.Mixed_6d.branch1x1
    hook = branch.register_forward_hook(lambda module, inputs, out: seen.append(out))
    spatial = network.outputs(pixels, ["spatial"])["spatial"]
    hook.remove()
    assert spatial.shape == (1, 17 * 17 * 7)
    grid = spatial.reshape(17, 17, 7)
    np.testing.assert_array_equal(grid[3, 5], seen[0][0, :7, 3, 5].numpy())
    assert not np.array_equal(spatial[0], seen[0][0, :7].flatten().numpy()), "channels first would be another number"


def test_resize_is_part_of_the_number(recipe, sides, tmp_path):
    """The same images, shown at another size by another rule, are other images to FID."""
    network = load_features("inception", recipe.evaluate, "cpu")
    small = np.asarray(Image.open(sides[0] / "0.png"))
    large = np.asarray(Image.fromarray(small).resize((299, 299), Image.Resampling.BICUBIC))
    one, other = (network.outputs(rgb[None], ["pool"])["pool"][0] for rgb in (small, large))
    assert np.abs(one - other).max() > 1e-3 * np.abs(one).max()


def test_pictures_of_several_sizes_stand_in_one_set(recipe, sides):
    network = load_features("inception", recipe.evaluate, "cpu")
    small = np.asarray(Image.open(sides[0] / "0.png"))
    mixed = [small, small[:32], small]
    found = np.concatenate([batch["pool"] for batch in feature_batches(network, mixed, ["pool"])])
    np.testing.assert_allclose(found[0], found[2], atol=1e-6)
    assert found.shape == (3, 2048)


# ---- refusals ----


def test_without_weights_it_says_which_file_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with pytest.raises(EnvironmentProblem, match="standard Inception weights") as caught:
        load_features("inception", Evaluate(), "cpu")
    assert caught.value.code == "BF-ENV-030" and INCEPTION_FILE in caught.value.at
    assert str(tmp_path / "cache" / "hub" / "checkpoints" / INCEPTION_FILE) in caught.value.fix


def test_the_cache_of_torch_fidelity_is_looked_at_and_its_hash_checked(tmp_path, monkeypatch, weights):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    kept = tmp_path / "hub" / "checkpoints" / INCEPTION_FILE
    kept.parent.mkdir(parents=True)
    kept.write_bytes(weights.read_bytes())
    with pytest.raises(ArtifactError, match="6726825d"):
        load_features("inception", Evaluate(), "cpu")


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path):
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    for name, data in {"plain.pth": pickle.dumps(Evil()), "zip.pth": _archive(pickle.dumps(Evil()))}.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ArtifactError) as caught:
            load_features("inception", Evaluate(features="inception", inception_weights=str(path)), "cpu")
        assert caught.value.code == "BF-ART-008" and not canary.exists()


def _archive(data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    return stream.getvalue()


def test_other_weights_are_refused_by_name(tmp_path):
    save_tensors(tmp_path / "other.safetensors", {"fc.weight": torch.zeros(3, 3)})
    settings = Evaluate(features="inception", inception_weights=str(tmp_path / "other.safetensors"))
    with pytest.raises(ArtifactError, match="Inception network") as caught:
        load_features("inception", settings, "cpu")
    assert "Conv2d_1a_3x3" in caught.value.at


def test_measures_of_inception_need_inception(sides, tmp_path):
    recipe = Recipe(models=Models(diffusion="builtin:flux"), evaluate=Evaluate(features="builtin:open_clip"))
    with pytest.raises(UsageError, match="--sfid needs the Inception network"):
        evaluate(recipe, metrics=["sfid"], samples=sides[0], reference=sides[1], min_samples=4, workspace=tmp_path)


# ---- published statistics ----


def test_an_npz_of_adms_evaluator_is_a_reference(recipe, report, sides, tmp_path):
    """Moments alone: FID equals that of the images; KID, which needs the features, is refused."""
    network = load_features("inception", recipe.evaluate, "cpu")
    real = [np.asarray(Image.open(path)) for path in sorted(sides[1].iterdir())]
    pool = np.concatenate([batch["pool"] for batch in feature_batches(network, real, ["pool"])]).astype(np.float64)
    np.savez(tmp_path / "ref.npz", mu=pool.mean(0), sigma=np.cov(pool, rowvar=False))
    options = {"samples": sides[0], "reference": tmp_path / "ref.npz", "workspace": tmp_path / "runs"}
    found = evaluate(recipe, metrics=["fid"], **options)
    assert found.info["fid"] == pytest.approx(report.info["fid"], rel=1e-5)
    assert read(found)[0]["n_ref"] is None
    with pytest.raises(DataError, match="only mean and covariance"):
        evaluate(recipe, metrics=["kid"], **options)
    with pytest.raises(ArtifactError, match="spatial"):
        evaluate(recipe, metrics=["sfid"], **options)
    np.savez(tmp_path / "evil.npz", mu=np.array([print], dtype=object), sigma=np.eye(2))
    with pytest.raises(ArtifactError) as caught:
        evaluate(recipe, metrics=["fid"], **{**options, "reference": tmp_path / "evil.npz"})
    assert caught.value.code == "BF-ART-008"


def test_an_npz_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path, monkeypatch):
    """A few MB of zeros: refused by the archive's own table, before a byte is unpacked."""
    np.savez_compressed(tmp_path / "bomb.npz", mu=np.zeros(1 << 18), sigma=np.eye(2))
    monkeypatch.setattr(feature_statistics, "ADM_BYTES", 1 << 20)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(ArtifactError, match="not an npz of statistics") as told:
        load_adm(tmp_path / "bomb.npz", "pool")
    assert "mu.npy unpacks to more than 1,048,576 bytes" in str(told.value.at)
