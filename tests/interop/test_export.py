"""export: what is written is read by others, and read back to the bit; nothing is overwritten or left half."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import FluxControlNetModel
from fixtures_flux import System, save_part, save_system
from fixtures_loading import load_branch, load_mllm
from safetensors.torch import load_file

from bifrost_cli.artifacts import Artifact, Draft
from bifrost_cli.cli.app import run
from bifrost_cli.config.load import load_recipe
from bifrost_cli.data.safetensors_io import ShardedCheckpoint
from bifrost_cli.errors import ArtifactError, BifrostError, UsageError
from bifrost_cli.interop import export as stage
from bifrost_cli.interop.export import export, export_mllm
from bifrost_cli.interop.import_checkpoint import import_checkpoint
from bifrost_cli.interop.model_card import model_card
from bifrost_cli.interop.published_names import public_name
from bifrost_cli.loading.resolve import builtin
from bifrost_cli.models.branch.masking import sample_masked


@pytest.fixture(scope="module", params=["flow", "codebook"])
def system(tmp_path_factory, request) -> System:
    return save_system(tmp_path_factory.mktemp("system"), head=request.param)


def test_out_and_in_again_is_the_same_to_the_bit(system, tmp_path):
    """A sampling head has no published name: it goes under ours."""
    folder = export(system.branch.path, output=tmp_path / "out")
    export(system.controlnet.path, output=folder / "flux_controlnet")
    for part, before in zip(import_checkpoint(system.recipe, folder, workspace=tmp_path),
                            (system.branch, system.controlnet), strict=True):  # fmt: skip
        ours, theirs = (load_file(each.file("model.safetensors")) for each in (part, before))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (
        json.loads((folder / "config.json").read_text())["branch"]["head"]
        == load_branch(system.branch, torch.device("cpu")).head_kind
    )


def test_the_branch_has_the_index_that_the_published_loader_opens(system, tmp_path):
    folder = export(system.branch.path, output=tmp_path / "out")
    weights = load_file(folder / "model.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(weights, "model.safetensors")
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in weights.values())}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert ShardedCheckpoint.open(folder).shapes == shapes
    index["weight_map"].pop("mask_token")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match="does not name: mask_token"):
        import_checkpoint(system.recipe, folder, workspace=tmp_path)


def test_no_folder_of_this_machine_is_in_what_is_exported(system, tmp_path):
    """The bases of the system are local folders; neither they, nor the artifact's own folder, are named anywhere."""
    folder = export(system.branch.path, output=tmp_path / "out")
    export(system.controlnet.path, output=folder / "flux_controlnet")
    files = [path for path in folder.rglob("*") if path.is_file()]
    secret = str(Path(system.recipe.models.mllm).parent).encode()
    assert len(files) == 7 and not [path for path in files if secret in path.read_bytes()]


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("builtin:mllm", "builtin:mllm"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("open_clip:ViT-L-14/openai", "open_clip:ViT-L-14/openai"),
        ("open_clip:hf-hub:org/clip", "open_clip:hf-hub:org/clip"),
        ("open_clip:local-dir:/home/jane/clip", "open_clip:clip"),
        ("/home/jane/models/flux", "flux"),
        ("~/models/flux/", "flux"),
        ("./models/flux", "flux"),
        ("mllm", "mllm"),
    ],
)
def test_public_names(name, public):
    assert public_name(name) == public


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "jane" / "flux").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("jane/flux") == "flux"


def test_the_builtin_pair_through_the_command_line(tmp_path, monkeypatch, capsys):
    """It normalises its latents and samples codes, which the published code does not: the same byte by byte."""
    monkeypatch.chdir(tmp_path)
    assert run(["export", "builtin:branch", "-o", "exported", "-q"]) == 0
    assert capsys.readouterr() == ("exported\n", "")
    assert run(["export", "builtin:controlnet", "-o", "exported/flux_controlnet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == "exported/flux_controlnet"
    assert run(["import", "exported", "-o", "again", "-q"]) == 0
    assert capsys.readouterr() == ("again/branch\nagain/controlnet\n", "")
    for kind in ("branch", "controlnet"):
        names = ("model.safetensors", "config.json")
        assert all(Artifact.open(f"again/{kind}").files[name] == builtin(kind).files[name] for name in names)
    own = {name for name in load_file("exported/model.safetensors") if name.startswith("bifrost.")}
    head = {f"bifrost.vision_head.{name}" for name in ("codes_KC", "to_logits.weight", "to_logits.bias")}
    assert own == {"bifrost.latents_mean_C", "bifrost.latents_std_C", *head}
    assert load_recipe("again/branch").models == load_recipe().models


def test_stock_diffusers_reads_every_block(system, tmp_path):
    folder = export(system.controlnet.path, output=tmp_path / "flux_controlnet")
    stock = FluxControlNetModel.from_pretrained(folder, ignore_mismatched_sizes=True, low_cpu_mem_usage=False)
    ours = load_file(system.controlnet.file("model.safetensors"))
    read = {name: tensor for name, tensor in stock.state_dict().items() if not name.startswith("controlnet_x_embedder")}
    assert len(read) > 50 and all(torch.equal(tensor, ours[name]) for name, tensor in read.items())
    left = load_file(folder / "diffusion_pytorch_model.safetensors").keys() - read.keys()
    assert {name.split(".")[0] for name in left} == {"up_sampling_block", "controlnet_x_embedder"}


def test_what_is_refused(system, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists already") as caught:
        export(system.branch.path, output=tmp_path / "there")
    assert caught.value.code == "BF-USE-002" and not list((tmp_path / "there").iterdir())
    with pytest.raises(UsageError, match="inside the artifact"):
        export(system.branch.path, output=system.branch.path / "out")
    with Draft.open(tmp_path / "latents", "latents", {"x": 1}) as draft:
        draft.commit()
    assert run(["export", str(tmp_path / "latents")]) == 2
    assert "is a latents artifact; a branch or a ControlNet can be exported" in capsys.readouterr().err
    with pytest.raises(ArtifactError, match="no artifact"):
        export("branch-0", workspace=tmp_path)


def test_other_families_and_damage_are_refused(system, tmp_path):
    config = json.loads(system.branch.file("config.json").read_text())
    other = {**config, "text_config": {**config["text_config"], "model_type": "qwen3_vl_text"}}
    identity = {**system.branch.identity, "other": 1}
    strange = save_part(tmp_path / "strange", "branch", torch.nn.Linear(1, 1), other, identity)
    with pytest.raises(ArtifactError, match="not of Qwen2.5-VL"):
        export(strange.path, output=tmp_path / "out")
    part = save_part(tmp_path / "part", "branch", torch.nn.Linear(1, 1), {**config, "tune": {"rank": 2}}, identity)
    with pytest.raises(ArtifactError, match="trained in part"):
        export(part.path, output=tmp_path / "out")
    sd3 = save_part(tmp_path / "sd3", "controlnet", torch.nn.Linear(1, 1), {"num_layers": 2}, identity)
    with pytest.raises(ArtifactError, match="not of FLUX"):
        export(sd3.path, output=tmp_path / "out")
    strange.file("model.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="damaged"):
        export(strange.path, output=tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name not in ("strange", "part", "sd3")]


def test_a_failure_leaves_nothing(system, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "model_card", lambda artifact: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(system.branch.path, output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---- the card --------------------------------------------------------------------------------------------------------


def trained(tmp_path: Path, kind: str, **models: str) -> Artifact:
    """An artifact with everything that a training writes down, on latents that are beside it."""
    recipe = {"models": {"mllm": "Qwen/Qwen2.5-VL-7B-Instruct", "painter": "black-forest-labs/FLUX.1-dev", **models}}
    encoder = {"name": "mllm", "weights": "ab12", "image_size": 448}
    with Draft.open(tmp_path / "latents", "latents", {"x": 1}) as draft:
        latents = draft.complete or draft.commit({"funnel": {"seen": 40, "used": 39}})
    identity = {"encoder": encoder, "grid": [16, 16], "channels": 3584, "settings": {"train": {"steps": 7}}}
    with Draft.open(tmp_path / "runs" / kind, kind, identity, [latents]) as draft:
        return draft.commit({"recipe": recipe, "metrics": {"loss": 0.25}}, cost={"device": "cpu", "seconds": 3})


def test_the_card_tells_data_settings_metrics_and_licences(tmp_path):
    card = model_card(trained(tmp_path, "controlnet"))
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "other" and "black-forest-labs/FLUX.1-dev" in head["base_model"]
    assert head["license_name"] == "flux-1-dev-non-commercial-license"
    assert head["license_link"] == "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
    (entry,) = head["model-index"]
    assert entry["results"][0]["metrics"] == [{"type": "loss", "value": 0.25}]
    for told in ("seen 40, used 39", "steps: 7", "| loss | 0.25 |", "FLUX.1 [dev] Non-Commercial License", "Apache-2.0",
                 "grid 16x16", "lmms-eval", "ab12"):  # fmt: skip
        assert told in card, told
    assert str(tmp_path) not in card


def test_the_card_of_a_branch_has_the_licence_of_its_mllm_and_of_no_flux(tmp_path):
    card = model_card(trained(tmp_path, "branch"))
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "apache-2.0" and "license_name" not in head and "FLUX.1" not in card


def test_the_card_guesses_no_licence_and_names_no_folder(tmp_path):
    card = model_card(trained(tmp_path, "branch", mllm=str(tmp_path / "secret" / "my-mllm")))
    assert "| MLLM | my-mllm | see the base model |" in card and "secret" not in card
    assert yaml.safe_load(card.split("---")[1])["license"] == "other"


def test_an_import_can_be_exported_and_says_where_it_is_from(system, tmp_path):
    folder = export(system.branch.path, output=tmp_path / "out")
    (branch,) = import_checkpoint(system.recipe, folder, workspace=tmp_path)
    card = (export(branch.path, output=tmp_path / "again") / "README.md").read_text()
    assert "imported from out" in card and str(tmp_path) not in card and "None were measured here" in card


# ---- the MLLM --------------------------------------------------------------------------------------------------------


def test_the_exported_mllm_is_the_one_that_generates(tmp_path, monkeypatch, capsys):
    """Same hash as the branch's manifest names, and the same logits, to the bit, while a branch trains and decodes."""
    monkeypatch.chdir(tmp_path)
    assert run(["export-mllm", "-o", "understanding", "-q"]) == 0
    assert capsys.readouterr() == ("understanding\n", "")
    cpu = torch.device("cpu")
    theirs, ours = load_mllm("understanding", cpu), load_mllm("builtin:mllm", cpu)
    assert theirs.weights_hash() == builtin("branch").identity["mllm"]
    assert theirs.weights_hash() in Path("understanding/README.md").read_text()
    prefix = ours.encode_prompts(ours.tokenize_prompts(["a red circle"], 96))
    branch = load_branch(builtin("branch"), cpu)
    order_BP = torch.arange(branch.patches)[None]
    noise_BPC = torch.randn(1, branch.patches, branch.channels)
    sample_masked(branch, prefix, prefix, steps=2, guidance=2.0, orders_BP=order_BP, noise_BPC=noise_BPC)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for question in ("what is in the image?", "how many circles?"):
        logits = [mllm.logits(**mllm.question(image, question)) for mllm in (theirs, ours)]
        assert torch.equal(*logits)


def test_an_exported_mllm_is_whole_or_absent(tmp_path, monkeypatch):
    recipe, folder = load_recipe(), tmp_path / "out"
    monkeypatch.setattr(stage, "_blocks", lambda path: iter([path.read_bytes()[:-1]]))
    with pytest.raises(BifrostError):
        export_mllm(recipe, folder)
    assert not folder.exists()
    folder.mkdir()
    with pytest.raises(UsageError, match="exists already"):
        export_mllm(recipe, folder)
