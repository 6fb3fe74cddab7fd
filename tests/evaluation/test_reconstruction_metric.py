"""eval --reconstruction: the library's own numbers, restartable, of images from anywhere; and eval's other inputs."""

from __future__ import annotations

import json
import os
import signal
import warnings

import lpips
import numpy as np
import pytest
import torch

from bifrost_cli.artifacts.files import write_json
from bifrost_cli.config.load import load_recipe
from bifrost_cli.config.schema import Evaluate
from bifrost_cli.data.image_sets import EvalImage, ImageSet, drawn
from bifrost_cli.data.png import png_bytes
from bifrost_cli.errors import ArtifactError, DataError, EnvironmentProblem, Stopped, UsageError
from bifrost_cli.evaluation.evaluate import evaluate
from bifrost_cli.evaluation.formulas import psnr, ssim
from bifrost_cli.evaluation.inputs import images_for, require_one_kind
from bifrost_cli.evaluation.metrics.image_metrics import Reconstruction
from bifrost_cli.evaluation.networks import load_lpips
from bifrost_cli.evaluation.registry import BUILTIN, Gate, explained, metric_class
from bifrost_cli.extraction.extract import extract_latents
from bifrost_cli.generation.reconstruct import reconstruct_set
from bifrost_cli.loading.loaders import ModelLoader
from bifrost_cli.runtime.ui import Ui

COUNT = 6


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("tiny", [f"evaluate.min_samples={COUNT}", "generate.steps=2"])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("again") / "runs"


@pytest.fixture(scope="module")
def report(recipe, workspace):
    return evaluate(recipe, metrics=["reconstruction", "shapes"], workspace=workspace, device="cpu")


def results(artifact) -> dict:
    return {one["metric"]: one for one in json.loads(artifact.file("report.json").read_text())["results"]}


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    """Random weights in torchvision's own file format."""
    from torchvision.models import alexnet

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("alexnet") / "weights.pth"
    torch.save(alexnet().state_dict(), path)
    return path


# ---- the numbers ----------------------------------------------------------------------------------------------------


def test_each_number_is_the_mean_over_pictures_of_the_plain_formula(recipe, workspace, report):
    from bifrost_cli.data.image_sets import from_samples

    true = drawn(COUNT, seed=1)
    made = from_samples(next(one for one in _artifacts(workspace, "samples")), recipe.images)
    pairs = [(one.load(), other.load()) for one, other in zip(made.entries, true.entries, strict=True)]
    found = results(report)
    for name, formula in (("psnr", psnr), ("ssim", ssim)):
        values = [formula(*pair) for pair in pairs]
        assert found[name]["value"] == pytest.approx(np.mean(values), abs=1e-12)
        assert found[name]["standard_error"] == pytest.approx(np.std(values, ddof=1) / COUNT**0.5, abs=1e-12)
        assert found[name]["n_gen"] == COUNT
    assert 0.9 < found["latents_cosine"]["value"] <= 1.0
    assert found["frechet_distance"]["label"].endswith("to the originals") and "floor" not in found["frechet_distance"]
    assert found["shapes_accuracy"]["count"] == COUNT, "a reconstruction keeps its original's prompt"


def _artifacts(workspace, kind):
    from bifrost_cli.artifacts import find

    return find(workspace, kind)


def test_the_page_shows_originals_beside_reconstructions_and_says_that_lpips_is_missing(report, monkeypatch):
    page = report.file("report.html").read_text()
    assert "original | reconstruction" in page
    assert "PSNR" in page and page.count("<img") == COUNT
    assert "LPIPS is left out" in page and "alexnet-owt-7be5be79.pth" in page


@pytest.mark.parametrize("equal", [1, 3])
def test_pictures_equal_to_the_last_bit_have_no_psnr(recipe, tmp_path, equal):
    """Infinity is neither a mean nor JSON, and no image is at 0 dB because it is perfect."""
    true = drawn(3)
    other = [EvalImage(e.name, e.digest, lambda e=e: 255 - e.load(), e.prompt) for e in true.entries]
    made = ImageSet("again", (*true.entries[:equal], *other[equal:]))
    encoder = ModelLoader(recipe.models).encoder(recipe.latents, recipe.images)
    metric, lines = Reconstruction(true, encoder, "not here"), [{}, {}, {}]
    found = {one["metric"]: one for one in metric.compute(made, lines, Ui())}
    write_json(tmp_path / "report.json", [found, lines])
    told = " ".join(metric.warnings(made, lines))
    assert found["ssim"]["n_gen"] == 3 and [line["numbers"]["psnr"] is None for line in lines].count(True) == equal
    if equal == 3:
        assert "psnr" not in found and "PSNR is left out" in told
    else:
        assert found["psnr"]["equal"] == 1 and found["psnr"]["n_gen"] == 2 and "PSNR" not in told
        expected = [psnr(*(one.load() for one in pair)) for pair in zip(other[1:], true.entries[1:], strict=True)]
        assert found["psnr"]["value"] == pytest.approx(np.mean(expected), rel=1e-12)


def test_lpips_is_the_packages(alexnet):
    from torchvision.models import alexnet as stock

    mine = load_lpips(Evaluate(lpips_weights=str(alexnet)), "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    network = stock()
    network.load_state_dict(torch.load(alexnet, weights_only=True))
    for number in range(1, 6):
        for name, module in getattr(theirs.net, f"slice{number}").named_children():
            if list(module.parameters()):
                module.load_state_dict(network.features[int(name)].state_dict())
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(2))
    tensors = [torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None] / 127.5 - 1 for rgb in (first, second)]
    assert mine.distance(first, second) == pytest.approx(float(theirs(*tensors)), abs=1e-7)
    assert mine.distance(first, first) == 0.0
    with pytest.raises(ValueError, match="uint8"):
        mine.distance(first / 255, second / 255)


def test_lpips_is_measured_where_its_weights_are(recipe, workspace, report, alexnet):
    told = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"lpips_weights": str(alexnet)})})
    again = evaluate(told, metrics=["reconstruction"], workspace=workspace, device="cpu")
    assert 0 < results(again)["lpips"]["value"] and len(results(again)["lpips"]["extractor"]["weights"]) == 64
    assert len(_artifacts(workspace, "samples")) == 1, "the images were not reconstructed"


def test_weights_that_are_named_must_be_there_and_fit(tmp_path, alexnet):
    with pytest.raises(EnvironmentProblem, match="not there"):
        load_lpips(Evaluate(lpips_weights=str(tmp_path / "none.pth")), "cpu")
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ArtifactError, match="AlexNet"):
        load_lpips(Evaluate(lpips_weights=str(tmp_path / "other.pth")), "cpu")
    damaged = tmp_path / "alexnet-owt-7be5be79.pth"
    damaged.write_bytes(alexnet.read_bytes())
    with pytest.raises(ArtifactError, match="damaged"):
        load_lpips(Evaluate(lpips_weights=str(damaged)), "cpu")


# ---- restart, and where images come from --------------------------------------------------------------------------


class Stopping(Ui):
    """Asks for a stop after the second image that was generated."""

    def progress(self, total, what):
        rendered = []

        class Bar:
            def __enter__(self):
                return self

            def __exit__(self, *error): ...

            def advance(self, n=1):
                rendered.append(n)
                if what == "images" and len(rendered) == 2:
                    os.kill(os.getpid(), signal.SIGTERM)

        return Bar()


def test_a_stop_keeps_what_is_painted_and_the_end_is_the_same(recipe, tmp_path):
    images = drawn(4, seed=7)
    straight = reconstruct_set(recipe, images, workspace=tmp_path / "a", device="cpu")
    with pytest.raises(Stopped, match="2 of 4"):
        reconstruct_set(recipe, images, workspace=tmp_path / "b", device="cpu", ui=Stopping())
    folder = tmp_path / "b" / straight.id
    kept = (folder / "00001.png").stat().st_mtime_ns
    made = reconstruct_set(recipe, images, workspace=tmp_path / "b", device="cpu")
    assert made.files == straight.files and made.file("00001.png").stat().st_mtime_ns == kept
    assert not (folder / "work").exists()


def test_a_latents_store_is_its_pictures(recipe, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, entry in enumerate(drawn(5).entries):
        (folder / f"{index}.png").write_bytes(png_bytes(entry.load()))
        (folder / f"{index}.txt").write_text(entry.prompt)
    small = load_recipe("tiny", ["latents.vae=false"])
    store = extract_latents(small, source=folder, workspace=tmp_path / "runs", device="cpu")
    found = images_for(store.path, COUNT, recipe.images, tmp_path / "runs")
    assert [entry.prompt for entry in found.entries] == [entry.prompt for entry in drawn(5).entries]
    assert np.array_equal(found.entries[0].load(), drawn(5).entries[0].load())
    (folder / "0.txt").write_text("something else")
    with pytest.raises(DataError, match="other images"):
        images_for(store.path, COUNT, recipe.images, tmp_path / "runs")


@pytest.mark.parametrize("given", [{"samples": "x"}, {"prompts": "x.txt"}, {"reference": "x.npz"}])
def test_a_reconstruction_has_pictures_of_its_own(recipe, tmp_path, given):
    with pytest.raises(UsageError):
        evaluate(recipe, metrics=["reconstruction"], workspace=tmp_path, **given)


def test_prompts_are_painted_first_and_measured(recipe, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    plan = evaluate(recipe, metrics=["shapes"], prompts=prompts, n=2, workspace=tmp_path / "runs", dry_run=True)
    assert plan["pictures"] == 4 and not (tmp_path / "runs").exists()
    report = evaluate(recipe, metrics=["shapes"], prompts=prompts, n=2, workspace=tmp_path / "runs", device="cpu")
    assert results(report)["shapes_accuracy"]["count"] == 4
    again = evaluate(recipe, metrics=["shapes"], prompts=prompts, n=2, workspace=tmp_path / "runs", device="cpu")
    assert again.id == report.id
    with pytest.raises(UsageError, match="one of them"):
        evaluate(recipe, metrics=["shapes"], prompts=prompts, samples="x", workspace=tmp_path / "runs")


def test_planned_and_unplanned_pictures_are_not_mixed():
    bare = drawn(4)
    half = [EvalImage(e.name, e.digest, e.load, e.prompt, "white aa none" if i % 2 else None) for i, e in
            enumerate(bare.entries)]  # fmt: skip
    require_one_kind([entry.plan for entry in bare.entries], bare.what)
    with pytest.raises(DataError, match="2 of 4"):
        require_one_kind([entry.plan for entry in half], "mixed")


# ---- bars, protocols ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "holds"),
    [("fid<12.6", True), ("fid<12.5", False), ("fid<=12.588", True), ("shapes>=0.8", True), ("shapes>0.81", False),
     ("frechet_distance>11.5", False), ("frechet_distance>11.4", True), ("is>3", True)],
)  # fmt: skip
def test_a_gate_holds_only_when_the_worse_end_does(text, holds):
    """The worse end of the 95 % interval, for every metric: 12 -+ 1.96 x 0.3 is 11.412 to 12.588."""
    found = [{"metric": "frechet_distance", "value": 12.0, "standard_error": 0.3},
             {"metric": "inception_score", "value": 3.5},
             {"metric": "shapes_accuracy", "value": 0.9, "interval95": [0.8, 0.95]}]  # fmt: skip
    assert Gate.of(text).check(found)["holds"] == holds


@pytest.mark.parametrize("text", ["fid", "fid=3", "fid<", "<3", "fid<1.2.3", "fid<nan"])
def test_what_is_no_gate_is_refused(text):
    with pytest.raises(UsageError, match="invalid gate"):
        Gate.of(text)


@pytest.mark.parametrize(
    ("gate", "metrics", "fix"),
    [("kid<1", ["fid"], "add --kid"), ("fdi<1", ["fid"], "gates here: fid, frechet_distance"),
     ("psnr>1", ["fid", "clipscore"], "gates here: clip")],
)  # fmt: skip
def test_a_gate_on_what_will_not_be_measured_is_refused_before(gate, metrics, fix):
    with pytest.raises(UsageError, match="is not measured") as told:
        Gate.of(gate).require_measured([metric_class(name) for name in metrics])
    assert str(told.value.fix).startswith(fix)
    Gate.of("psnr>1").require_measured([metric_class("reconstruction")])
    Gate.of("frechet_distance<1").require_measured([metric_class("fid")])


def test_a_gate_on_what_was_not_measured_is_refused():
    with pytest.raises(UsageError, match="not measured"):
        Gate.of("kid<1").check([{"metric": "frechet_distance", "value": 1.0}])


def test_every_metric_has_its_protocol_in_words():
    lines = explained(list(BUILTIN), ["dinov2:x"])
    assert [line.partition(":")[0] for line in lines] == [*BUILTIN, "fd dinov2"] and all(len(x) > 30 for x in lines)


def test_what_is_measured_and_when_it_holds_is_an_exit_code(recipe, workspace, report, capsys):
    from bifrost_cli.cli.app import run

    words = ["eval", "--reconstruction", "--shapes", "--set", f"evaluate.min_samples={COUNT}", "--set",
             "generate.steps=2", "-w", str(workspace), "--device", "cpu"]  # fmt: skip
    assert run([*words, "--gate", "psnr>1"]) == 0
    assert run([*words, "--gate", "psnr>1", "--gate", "ssim>=1.1"]) == 8
    told = capsys.readouterr().err
    assert "gate psnr>1" in told and "ssim>=1.1" in told and "Traceback" not in told
    assert run(["eval", "--explain", "--reconstruction"]) == 0
    assert "uint8" in capsys.readouterr().out
