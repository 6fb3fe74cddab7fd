"""Distances as a measure: a number is of the images and the network, and what is kept is kept for them alone."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial

import numpy as np
import PIL
import pytest
import torch
from fixtures_clip import save_tiny_clip
from PIL import Image

from bifrost_cli.config.schema import Evaluate, Images
from bifrost_cli.data.image_sets import EvalImage, ImageSet, drawn, from_folder
from bifrost_cli.data.images import square
from bifrost_cli.errors import DataError
from bifrost_cli.evaluation.feature_statistics import statistics_of
from bifrost_cli.evaluation.inputs import Reference, reference_for
from bifrost_cli.evaluation.metrics.feature_metrics import FeatureSets
from bifrost_cli.evaluation.networks import ClipFeatures, load_features
from bifrost_cli.evaluation.registry import metric_class
from bifrost_cli.runtime.ui import Ui

GOLDEN = [0.1336450328741121, -0.0017583402178633634]  # as scipy.linalg.sqrtm and the kernel's sums, written out, say


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")
    return load_features(f"open_clip:local-dir:{folder}", Evaluate(), "cpu")


def distance(network, images, place):
    real = drawn(20, seed=1)
    reference = Reference(real.what, real.content, 20, images=real)
    return computed(["fid", "kid", "prdc"], network, reference, place, images)


def computed(names, network, reference, place, images):
    features = FeatureSets(network, reference, place)
    metrics = [metric_class(name)(features) for name in names]
    return [row for metric in metrics for row in metric.compute(images, [], Ui())]


def test_each_seed_has_its_distance_where_all_made_as_many(network, tmp_path):
    images = drawn(16)
    seeded = [EvalImage(e.name, e.digest, e.load, e.prompt, None, i % 2) for i, e in enumerate(images.entries)]
    found = distance(network, ImageSet("two seeds", tuple(seeded)), tmp_path / "a")[0]
    halves = [ImageSet("one seed", tuple(e for e in seeded if e.seed == seed)) for seed in (0, 1)]
    alone = [distance(network, half, tmp_path / str(seed))[0]["raw"] for seed, half in enumerate(halves)]
    assert found["seeds"] == [0, 1] and found["per_seed"] == pytest.approx(alone, rel=1e-9)
    assert found["sd"] == pytest.approx(np.std(alone, ddof=1), rel=1e-9)
    uneven = ImageSet("uneven", tuple(seeded[:-1]))
    assert "per_seed" not in distance(network, uneven, tmp_path / "b")[0]


@pytest.mark.parametrize("change", ["batch", "order", "threads"])
def test_a_distance_does_not_depend_on_how_it_is_computed(network, tmp_path, monkeypatch, change):
    images = drawn(21)
    before = distance(network, images, tmp_path / "a")
    if change == "batch":
        monkeypatch.setattr("bifrost_cli.evaluation.networks.BATCH", 5)
    if change == "order":
        images = ImageSet(images.what, images.entries[::-1])
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1 if change == "threads" else threads)
    try:
        after = distance(network, images, tmp_path / "b")
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(before, after, strict=True):
        assert other["value"] == pytest.approx(one["value"], rel=1e-6), one["metric"]


# ---- what is kept ---------------------------------------------------------------------------------------------------


class Counting(ClipFeatures):
    """The network, which counts the batches that it computes."""

    def __init__(self, network: ClipFeatures) -> None:
        self.__dict__ |= network.__dict__
        self.batches = 0

    def outputs(self, pixels_BHWc, layers):
        self.batches += 1
        return super().outputs(pixels_BHWc, layers)


class Listening(Ui):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


def entry(rgb: np.ndarray, name: str) -> EvalImage:
    return EvalImage(name, hashlib.sha256(rgb.tobytes()).hexdigest(), partial(np.copy, rgb))


def noise(count: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))


def kept_by(network, place, images) -> int:
    """Batches computed for a set, with statistics kept in `place`."""
    counting = Counting(network)
    statistics_of(ImageSet("noise", tuple(images)), counting, ["pool"], place, Ui(), "features")
    return counting.batches


def test_the_same_pictures_are_computed_once_whatever_their_names_and_order(network, tmp_path):
    images = [entry(rgb, f"{index}.png") for index, rgb in enumerate(noise(5))]
    renamed = [replace(one, name=f"other-{one.name}") for one in images[::-1]]
    assert [kept_by(network, tmp_path, one) for one in (images, images, renamed)] == [1, 0, 0]


@pytest.mark.parametrize("change", ["pixel", "picture", "weights", "rule", "pillow"])
def test_anything_that_decides_the_numbers_is_computed_again(network, tmp_path, monkeypatch, change):
    rgbs, other = noise(5), network
    kept_by(network, tmp_path, [entry(rgb, "") for rgb in rgbs])
    if change == "pixel":
        rgbs[3][17, 5, 1] ^= 1
    if change == "picture":
        rgbs.append(noise(1, 1)[0])
    if change == "weights":
        folder = save_tiny_clip(tmp_path / "clip", seed=1)
        other = load_features(f"open_clip:local-dir:{folder}", Evaluate(), "cpu")
        other.identity["name"] = network.identity["name"]  # the same name, so that only the weights' hash differs
    if change == "rule":
        other = Counting(network)
        other.identity = {**network.identity, "resize": "another"}
    if change == "pillow":
        monkeypatch.setattr(PIL, "__version__", "0.0")
    assert kept_by(other, tmp_path, [entry(rgb, "") for rgb in rgbs]) == 1


@pytest.mark.parametrize("damage", ["cut", "flip", "another's"])
def test_a_damaged_file_is_said_and_computed_again(network, tmp_path, damage):
    images = ImageSet("noise", tuple(entry(rgb, "") for rgb in noise(5)))
    first = statistics_of(images, network, ["pool"], tmp_path, Ui(), "features")["pool"]
    path = next((tmp_path / "statistics").iterdir())
    good = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(good[: len(good) // 2])
    if damage == "flip":
        path.write_bytes(good[:-3] + bytes([good[-3] ^ 16]) + good[-2:])
    if damage == "another's":
        kept_by(network, tmp_path / "b", [entry(rgb, "") for rgb in noise(5, 1)])
        path.write_bytes(next((tmp_path / "b" / "statistics").iterdir()).read_bytes())
    ui = Listening()
    again = statistics_of(images, network, ["pool"], tmp_path, ui, "features")["pool"]
    assert np.array_equal(again.covariance_DD, first.covariance_DD) and path.read_bytes() == bytes(good)
    assert any("computed again" in line for line in ui.said)


# ---- images -------------------------------------------------------------------------------------------------------


def saved(folder, form: str, **options):
    folder.mkdir()
    for index, rgb in enumerate(noise(4)):
        Image.fromarray(rgb).save(folder / f"{index}.{form}", **options)
    return from_folder(folder, Images())


def test_what_is_lossless_is_the_same_and_jpeg_is_not(network, tmp_path):
    sets = [saved(tmp_path / "png", "png"), saved(tmp_path / "bmp", "bmp"), saved(tmp_path / "jpg", "jpg", quality=95)]
    png, bmp, jpeg = (statistics_of(one, network, ["pool"], tmp_path, Ui(), "features")["pool"] for one in sets)
    order = partial(np.sort, axis=0)  # a set's features stand in the order of its files' digests
    assert np.array_equal(order(png.features_ND), order(bmp.features_ND))
    np.testing.assert_allclose(png.covariance_DD, bmp.covariance_DD, rtol=1e-9, atol=1e-12)
    assert np.abs(png.mean_D - jpeg.mean_D).max() > 1e-4


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_reference_of_hardly_any_pictures_is_refused(tmp_path, count):
    (tmp_path / "few").mkdir()
    for index, rgb in enumerate(noise(count)):
        Image.fromarray(rgb).save(tmp_path / "few" / f"{index}.png")
    with pytest.raises(DataError) as caught:
        reference_for(tmp_path / "few", 4, Images(), tmp_path)
    assert caught.value.exit_code == 4


def test_pillows_bicubic_is_the_one_that_numbers_were_made_with():
    """Another hash means that Pillow resizes otherwise: every distance that was published with it moves."""
    rgb = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    assert hashlib.sha256(square(rgb, 48).tobytes()).hexdigest()[:32] == "70f49c138f53a5d774ec0a76fa643de2"


# ---- the whole way --------------------------------------------------------------------------------------------------


class Exact:
    """Sums of four rows' bands of pixels: whole numbers, so that no processor or library rounds them otherwise."""

    layers, device = ("pool",), "cpu"
    identity = {"name": "exact", "weights": "none", "resize": "none", "width": 12, "image_size": 32}

    def prepare(self, rgb_HWc):
        return rgb_HWc

    def outputs(self, pixels_BHWc, layers):
        sums = pixels_BHWc.reshape(len(pixels_BHWc), 4, -1, 3).sum(axis=2, dtype=np.int64)
        return {"pool": (sums.reshape(len(sums), 12) % 512).astype(np.float32) / 512}


@pytest.mark.parametrize("threads", [1, 2])
def test_golden_distances(tmp_path, threads):
    """From pixels to numbers, to 1e-9: 64 images against 64, by features that are exact."""
    made, real = (ImageSet("noise", tuple(entry(rgb, "") for rgb in noise(64, seed))) for seed in (0, 1))
    reference, before = Reference("noise", real.content, 64, images=real), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = computed(["fid", "kid"], Exact(), reference, tmp_path, made)
    finally:
        torch.set_num_threads(before)
    assert [one["value"] for one in found] == pytest.approx(GOLDEN, rel=1e-9)
