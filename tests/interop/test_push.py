"""push: an artifact on the hub is the one that was here, says nothing private, and stands where artifacts stand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fixtures_stage_training import recipe
from fixtures_store import make_store
from stub_hub import COMMIT, hub

from bifrost_cli.artifacts import Artifact
from bifrost_cli.artifacts.files import write_json
from bifrost_cli.cli.app import run
from bifrost_cli.errors import ArtifactError, UsageError
from bifrost_cli.interop.export import export
from bifrost_cli.interop.push import push, shared_manifest
from bifrost_cli.loading.resolve import builtin

ROOT = Path(__file__).parents[2]
# Each case: a token, then a command; answered with exit code and JSON.
ASK = """
import contextlib, io, json, os, sys
from bifrost_cli.cli.app import run
found = []
for token, command in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    if token: os.environ["HF_TOKEN"] = token
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(io.StringIO()):
        code = run([*command, "--json"])
    found.append([code, json.loads(told.getvalue())])
from bifrost_cli.generation.choose_models import choose_models, pretrained
models = choose_models("builtin", "hub:me/net", "runs")
print(json.dumps([*found, [models.controlnet.id, pretrained("me/net", None, None, "runs", (), None)[1].controlnet.id]]))
"""
PUSH = ["push", "builtin:controlnet", "me/net"]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each command answered, and what the hub then holds."""
    cases = {
        "no token": ("", PUSH), "no right": ("hf_read", PUSH), "first": ("hf_write", PUSH), "again": ("hf_write", PUSH),
        "now public": ("hf_write", [*PUSH, "--public"]), "other files": ("hf_write", ["push", "exported", "me/net"]),
        "shown": ("", ["artifacts", "show", "hub:me/net"]),
        "its commit": ("", ["artifacts", "show", f"hub:me/net@{COMMIT}"]),
        "none": ("", ["artifacts", "show", "hub:me/none"]), "no name": ("", ["artifacts", "show", "hub:net"]),
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("push")
    (folder / "exported").mkdir()
    (folder / "exported" / "README.md").write_text("mine")
    with hub() as server:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_HOME": str(folder / "hub"), "HF_ENDPOINT": server.address, "PYTHONPATH": str(ROOT)}
        asked = json.dumps(list(cases.values()))
        done = subprocess.run([sys.executable, "-c", ASK, asked], env=environment, cwd=folder, capture_output=True,
                              text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        *found, used = json.loads(done.stdout)
        return dict(zip(cases, found, strict=True)) | {"used": used, "held": server.pushed["net"]}


def test_what_lies_on_the_hub_is_the_artifact_and_its_card(told):
    original = builtin("controlnet")
    code, first = told["first"]
    assert code == 0 and first["ref"] == f"hub:me/net@{COMMIT}" and first["private"] and told["again"][0] == 0
    files = told["held"]["files"]
    assert set(files) == {*original.files, "manifest.json", "README.md", ".gitattributes"} and told["held"]["private"]
    assert all(files[name] == original.file(name).read_bytes() for name in original.files)
    head = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert head["pipeline_tag"] == "text-to-image" and {"bifrost", "controlnet"} <= set(head["tags"])
    assert head["model-index"][0]["results"] and "hub:me/net" in files["README.md"].decode()


def test_it_stands_where_an_artifact_can(told):
    wanted = builtin("controlnet").id
    assert told["shown"][1]["id"] == told["its commit"][1]["id"] == wanted and told["used"] == [wanted, wanted]
    assert COMMIT in told["shown"][1]["path"]


@pytest.mark.parametrize(
    ("case", "code", "exit_code", "message"),
    [
        ("no token", "BF-ENV-021", 3, "no token"),
        ("no right", "BF-ENV-022", 3, "may not write to me/net"),
        ("now public", "BF-USE-001", 2, "exists and is private"),
        ("other files", "BF-USE-001", 2, "holds other files"),
        ("none", "BF-ENV-020", 3, "there is no model me/none"),
        ("no name", "BF-USE-001", 2, "no artifact of a hub"),
    ],
)
def test_each_trouble_is_told(told, case, code, exit_code, message):
    found = told[case]
    assert (found[0], found[1]["code"]) == (exit_code, code) and message in found[1]["message"]
    assert found[1]["fix"] and "hf_" not in json.dumps(found)


def test_a_secret_a_path_and_other_kinds_are_refused_before_the_hub_is_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    folder = export("builtin:branch", output=tmp_path / "out")
    assert push(folder, "me/b", dry_run=True)["kind"] == "export"
    (folder / "notes.txt").write_text(f"token hf_{'a' * 30}, from /srv/annmarker/photos/x")
    with pytest.raises(ArtifactError, match="2 things are private") as caught:
        push(folder, "me/b")
    assert "notes.txt: path /srv/annmarker" in caught.value.at and "hf_aaa" not in str(caught.value)
    for ref, repo in ((make_store(tmp_path / "lat").path, "me/b"), ("builtin:branch", "b")):
        with pytest.raises(UsageError):
            push(ref, repo)
    assert run(["push", "builtin:branch", "me/b", "--dry-run"]) == 0


def test_a_shared_manifest_has_the_same_id_and_no_place(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bifrost", "extract-latents", "/srv/annmarker/photos", "-o", "lat"])
    made = recipe().model_dump(mode="json")
    made["models"]["mllm"] = "/srv/annmarker/mllm"
    store = Artifact.open(make_store(tmp_path / "lat", info={"recipe": made}).path)
    write_json(store.path / "manifest.json", shared_manifest(store))
    shared = Artifact.open(store.path)
    assert shared.id == store.id and shared.files == store.files and not shared.verify()
    assert "annmarker" not in json.dumps(shared.manifest) and shared.info["recipe"]["models"]["mllm"] == "mllm"
    assert "annmarker" in json.dumps(store.manifest)
