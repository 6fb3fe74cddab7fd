"""bifrost doctor: what is found, what fails, and that a token is never printed."""

from __future__ import annotations

import json
import sys

import pytest
from fixtures_flux import save_mllm, save_painter, tiny_painter
from fixtures_mllm import random_mllm
from stub_hub import hub

from bifrost_cli.cli.app import run
from bifrost_cli.config.load import load_recipe
from bifrost_cli.models.diffusion.flux import FluxModel
from bifrost_cli.models.diffusion.sd3 import Sd3Model
from bifrost_cli.planning import doctor as stage
from bifrost_cli.planning.doctor import Finding, doctor


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No cache, no token, no network of this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "")


def found(recipe: str, *sets: str) -> dict[str, Finding]:
    return {one.what: one for one in doctor(load_recipe(recipe, sets))}


def test_the_built_in_system_needs_nothing_more(capsys):
    assert run(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines) and len(lines) > 15
    assert run(["doctor", "--json"]) == 0
    assert {one["status"] for one in json.loads(capsys.readouterr().out)["findings"]} == {"ok"}


def test_a_library_outside_its_bounds_fails_with_the_command_that_mends_it(monkeypatch, capsys):
    versions = stage.metadata.version
    monkeypatch.setattr(stage.metadata, "version", lambda name: "3.9" if name == "transformers" else versions(name))
    assert run(["doctor"]) == 8
    out, err = capsys.readouterr()
    assert "fail  transformers: 3.9 is installed, wanted <6,>=5" in out
    assert "fix: pip install 'transformers<6,>=5'" in out and "BF-FIND-001" in err


def test_an_extra_counts_when_the_recipe_asks_for_it(monkeypatch):
    versions = stage.metadata.version

    def without(name):
        if name in ("peft", "bitsandbytes"):
            raise stage.metadata.PackageNotFoundError(name)
        return versions(name)

    monkeypatch.setattr(stage.metadata, "version", without)
    assert not {"peft", "bitsandbytes"} & set(found("tiny"))
    assert found("tiny", "branch.tune=lora", "branch.lora_rank=4")["peft"].status == "fail"
    assert found("tiny", "controlnet.train.optimizer=adamw8bit")["bitsandbytes"].message == "is not installed"


def test_a_torchvision_of_another_torch_is_named(monkeypatch):
    class Broken:
        def find_spec(self, name, *rest):
            if name == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    (one,) = [one for one in doctor(load_recipe("tiny")) if "nms" in one.message]
    assert one.status == "fail" and "--force-reinstall torch torchvision" in one.fix


def test_too_little_disk_fails(monkeypatch):
    monkeypatch.setattr(stage, "ROOM", 1 << 80)
    assert found("tiny")["workspace disk"].status == found("tiny")["hub cache disk"].status == "fail"


def test_a_token_is_said_to_be_there_and_never_shown(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run(["doctor", "--json"])
    printed = "".join(capsys.readouterr())
    assert "present, not shown" in printed and "hf_secret" not in printed


def test_models_that_are_nowhere_fail_offline_and_without_a_network(monkeypatch):
    assert found("bifrost1-7b")["Qwen/Qwen2.5-VL-7B-Instruct"].message.endswith("the hub cannot be reached")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    one = found("bifrost1-7b")["black-forest-labs/FLUX.1-dev"]
    assert (one.status, one.fix) == ("fail", "go online once: hf download black-forest-labs/FLUX.1-dev")


@pytest.mark.parametrize(("name", "token", "status", "words"), [
    ("stub/fine", "", "warn", "it may be fetched"),
    ("stub/gated", "", "fail", "there is no token"),
    ("stub/gated", "hf_secret", "fail", "has not accepted its licence"),
    ("stub/none", "", "fail", "there is no model"),
    ("stub/busy", "", "fail", "it answers 503"),
])  # fmt: skip
def test_the_hub_is_asked_about_what_is_not_here(monkeypatch, name, token, status, words):
    with hub() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        monkeypatch.setenv("HF_TOKEN", token)
        one = found("tiny", f"models.mllm={name}")[name]
        assert server.requests and not any("resolve" in path for path in server.requests)
    assert one.status == status and words in one.message and one.fix


def test_folders_are_whole_or_say_what_they_lack(tmp_path):
    mllm, diffusion = save_mllm(random_mllm(), tmp_path / "m"), save_painter(tiny_painter(), tmp_path / "p")
    names = [f"models.mllm={mllm}", f"models.diffusion={diffusion}"]
    assert found("tiny", *names)[str(mllm)].status == found("tiny", *names)[str(diffusion)].status == "ok"
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (mllm / "model.safetensors.index.json").write_text(json.dumps(index))
    (diffusion / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert found("tiny", *names)[str(mllm)].message == "lacks 1 files of weights, first model-00002.safetensors"
    assert found("tiny", *names)[str(diffusion)].message == "lacks the weights of vae"
    assert found("tiny", "models.mllm=/no/such/folder")["/no/such/folder"].status == "fail"


def test_the_parts_with_weights_are_those_that_are_loaded():
    by_class = {kind.parts["transformer"].partition(":")[2]: kind.frozen_parts for kind in (FluxModel, Sd3Model)}
    assert {name: set(parts) for name, parts in stage.WITH_WEIGHTS.items()} == {
        name: set(parts) for name, parts in by_class.items()
    }
