"""The five stages one after the other, each in its own process, on the built-in system; then the exact files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bifrost_cli.artifacts import Artifact, find
from bifrost_cli.data.png import png_pixels
from bifrost_cli.shapes.checker import check

PROMPT = "a green star left of a yellow circle"
SHORT = ["--set", "branch.train.steps=60", "--set", "branch.train.checkpoint_every=20"]
SHORT += ["--set", "branch.train.validate_every=30", "--set", "branch.train.sample_every=60"]


def bifrost(folder: Path, *words: str) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, "-m", "bifrost_cli", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The five commands on the default recipe; only the trainings are shortened, and the store is smaller."""
    folder = tmp_path_factory.mktemp("chain")
    bifrost(folder, "extract-latents", "shapes:320")
    bifrost(folder, "train", "branch", *SHORT)
    bifrost(folder, "train", "controlnet", *[word.replace("branch.", "controlnet.") for word in SHORT])
    bifrost(folder, "generate", PROMPT, "-o", "out.png")
    bifrost(folder, "eval", "--fid", "--min-samples", "32")
    return folder


def test_every_stage_leaves_a_whole_artifact(chain):
    kinds = [artifact.kind for artifact in find(chain / "runs")]
    assert sorted(kinds) == ["branch", "controlnet", "latents", "report", "samples"]
    for artifact in find(chain / "runs"):
        artifact.check()
        assert artifact.strays() == []
        assert not list(artifact.path.rglob(".bifrost-tmp-*"))


def test_the_exact_files_of_each_kind(chain):
    files = {artifact.kind: set(artifact.files) for artifact in find(chain / "runs")}
    training = {"model.safetensors", "config.json", "losses.csv", "validation.csv"}
    for kind in ("branch", "controlnet"):
        assert training <= files[kind]
        assert {name for name in files[kind] - training} == {"samples/step-0000060.png"}
    assert {"report.json", "report.html"} <= files["report"]
    assert "prompts.jsonl" in files["samples"]
    assert {name.split("/")[0] for name in files["latents"]} == {"store.zarr", "index"}


def test_lineage_goes_back_to_the_latents(chain):
    by_kind = {artifact.kind: artifact for artifact in find(chain / "runs")}
    latents = by_kind["latents"].id
    for kind in ("branch", "controlnet"):
        assert [parent["id"] for parent in by_kind[kind].parents] == [latents]
    assert {parent["kind"] for parent in by_kind["samples"].parents} == {"branch", "controlnet"}


def test_the_report_says_that_it_is_not_inception_fid(chain):
    (report,) = (artifact for artifact in find(chain / "runs") if artifact.kind == "report")
    page = report.file("report.html").read_text()
    assert "not" in page and "Inception" in page and "http://" not in page and "https://" not in page
    assert json.loads(report.file("report.json").read_text())["schema"].startswith("bifrost.eval/")


def test_each_command_given_again_makes_nothing_new(chain):
    before = {artifact.id: artifact.manifest for artifact in find(chain / "runs")}
    again = bifrost(chain, "extract-latents", "shapes:320", "-q")
    assert Artifact.open(chain / again.stdout.strip()).kind == "latents"
    bifrost(chain, "train", "branch", *SHORT)
    assert {artifact.id: artifact.manifest for artifact in find(chain / "runs")} == before


def test_the_short_training_already_paints_something(chain):
    pixels = png_pixels((chain / "out.png").read_bytes())
    assert pixels.shape == (64, 64, 3) and pixels.std() > 2
    assert isinstance(check(PROMPT, pixels).why, str)
