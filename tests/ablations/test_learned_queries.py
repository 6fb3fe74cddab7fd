"""Learned queries: branch and control trained by the diffusion model's loss, one artifact that generates by itself."""

from __future__ import annotations

import pytest
import torch
from fixtures_loading import load_branch, load_controlnet, load_diffusion, load_mllm

from bifrost_cli.ablations.conditioners import TokenConditioner
from bifrost_cli.ablations.learned_queries import LearnedQueries, LearnedQueriesTask
from bifrost_cli.config.load import load_recipe
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.errors import ArtifactError, BifrostError, RecipeError
from bifrost_cli.extraction.extract import extract_latents
from bifrost_cli.generation.choose_models import choose_models
from bifrost_cli.generation.generate import generate
from bifrost_cli.interop.export import export
from bifrost_cli.loading.resolve import builtin
from bifrost_cli.models.branch.masking import random_orders, sample_masked
from bifrost_cli.models.diffusion.flux import FluxModel
from bifrost_cli.planning.plan import plan
from bifrost_cli.training.train_branch import build_branch, train_branch
from bifrost_cli.training.train_controlnet import new_control
from bifrost_cli.training.training_run import shared_identity

CPU = torch.device("cpu")
KEYS = ["shapes.rows=96", "branch.target=queries", "controlnet.control=cross_attention", "generate.steps=2"] + [
    f"branch.train.{key}" for key in ("steps=4", "batch_size=8", "warmup=1", "validate_every=4", "validation_rows=8",
                                      "sample_every=4", "checkpoint_every=2")
]  # fmt: skip


def recipe(*more: str):
    return load_recipe("tiny", [*KEYS, *more])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    extract_latents(recipe(), workspace=folder, device="cpu")
    return folder


@pytest.fixture(scope="module")
def made(workspace):
    return train_branch(recipe(), workspace=workspace, device="cpu")


@pytest.fixture(scope="module")
def task(workspace):
    torch.manual_seed(0)
    wanted, mllm, diffusion = recipe(), load_mllm("builtin:mllm", CPU), load_diffusion("builtin:flux", CPU)
    store = LatentsStore.open(next(workspace.glob("latents-*")))
    control = new_control(wanted, store, diffusion, 0).float()
    torch.nn.init.normal_(control.proj.weight, std=0.1)  # it starts at zero, which tells the branch nothing
    return LearnedQueriesTask(build_branch(wanted, store, mllm), control, mllm, diffusion, store, wanted)


def test_one_artifact_holds_both_parts_and_no_frozen_one(made, workspace):
    assert made.verify() == [] and set(made.info["metrics"]) == {"loss", "loss_caption", "loss_shuffled"}
    assert "samples/step-0000004.png" in made.files
    branch, control = load_branch(made, CPU), load_controlnet(made, CPU)
    assert isinstance(control, TokenConditioner) and branch.patches == control.sizes["patches"] == 16
    count = sum(parameter.numel() for part in (branch, control) for parameter in part.parameters())
    assert made.info["parameters"] == count
    assert made.identity["painter"] == builtin("controlnet").identity["flux"]
    assert made.identity["mllm"] == builtin("branch").identity["mllm"]


def test_training_sees_what_one_decode_step_gives(task):
    module: LearnedQueries = task.module
    module.eval()
    batch = task.batch(0, 0)
    with torch.no_grad():
        tokens_BPC = module(batch.text)
    orders_BP = random_orders(8, 16, torch.Generator().manual_seed(0))
    torch.testing.assert_close(tokens_BPC, sample_masked(module.branch, batch.text, steps=1, orders_BP=orders_BP))


def test_the_loss_is_the_painters_and_trains_both_parts_alone(task, monkeypatch):
    """The store's latents of the images are not even read; the captions that the diffusion model reads are dropped."""
    batch, whole = task.batch(0, 0), torch.Generator().manual_seed(1)
    loss, _ = task.loss(batch, whole)
    loss.backward()
    assert all(p.grad is not None for p in task.module.parameters())
    assert task.module.branch.position_embedding.grad.abs().sum() > 0
    frozen = [*task._mllm.model.parameters(), *task._diffusion.transformer.parameters()]
    assert not any(p.grad is not None for p in frozen)
    assert torch.isfinite(loss) and set(batch.stored) == {"vae"}
    heard, embed = [], FluxModel.embed
    listening = lambda self, texts, *rest: heard.extend(texts) or embed(self, texts, *rest)  # noqa: E731
    monkeypatch.setattr(FluxModel, "embed", listening)
    for seed in range(20):
        task.loss(batch, torch.Generator().manual_seed(seed))
    assert 0.35 < heard.count("") / len(heard) < 0.65, "controlnet.drop_prompt is 0.5"


def test_a_stopped_training_ends_in_the_same_bytes(made, workspace, tmp_path, monkeypatch):
    plain = LearnedQueriesTask.loss

    def stop(self, batch, generator):
        if batch.total == 8 and len(list(tmp_path.rglob("step-0000002"))):
            raise KeyboardInterrupt
        return plain(self, batch, generator)

    monkeypatch.setattr(LearnedQueriesTask, "loss", stop)
    with pytest.raises(KeyboardInterrupt):
        train_branch(recipe(), workspace=workspace, output=tmp_path / "b", device="cpu")
    monkeypatch.setattr(LearnedQueriesTask, "loss", plain)
    again = train_branch(recipe(), workspace=workspace, output=tmp_path / "b", device="cpu")
    assert again.id == made.id and again.files == made.files


def test_a_changed_painter_stops_the_command(workspace, tmp_path, monkeypatch):
    plain = LearnedQueriesTask.loss

    def meddling(self, batch, generator):
        with torch.no_grad():
            self._diffusion.transformer.proj_out.bias.add_(0.001)
        return plain(self, batch, generator)

    monkeypatch.setattr(LearnedQueriesTask, "loss", meddling)
    with pytest.raises(BifrostError, match="changed weights that are frozen"):
        train_branch(recipe(), workspace=workspace, output=tmp_path / "b", device="cpu")


def test_they_paint_by_themselves(made, workspace, tmp_path):
    images = [generate(recipe(), ["a red circle", "a blue square"], workspace=workspace, output=tmp_path / name,
                         device="cpu", **which)
                for name, which in (("a", {"branch": made.path}), ("b", {}))]  # fmt: skip
    assert [parent["id"] for parent in images[0].parents] == [made.id]
    assert images[0].files == images[1].files, "the newest branch of the workspace needs no ControlNet"


@pytest.mark.parametrize("control", ["controlnet", "concat"])
def test_any_control_can_hear_them(workspace, tmp_path, control):
    wanted = recipe(f"controlnet.control={control}", "branch.train.steps=1", "branch.train.validate_every=0",
                    "branch.train.sample_every=0", "branch.train.gradient_checkpointing=true")  # fmt: skip
    made = train_branch(wanted, workspace=workspace, output=tmp_path / "b", device="cpu")
    file = generate(wanted, "a red circle", branch=made.path, output=tmp_path / "a.png", device="cpu")
    assert file.stat().st_size > 0


def test_what_cannot_be_is_refused(made, workspace, tmp_path):
    with pytest.raises(RecipeError, match="decoded in one") as several:
        generate(recipe("generate.decode_steps=2"), "a red circle", branch=made.path, output=tmp_path / "a.png")
    with pytest.raises(ArtifactError) as other:
        choose_models(made.path, builtin("controlnet").path, workspace)
    with pytest.raises(ArtifactError, match="learned queries") as published:
        export(made.path, output=tmp_path / "e")
    with pytest.raises(RecipeError, match="branch.target queries") as planned:
        plan(recipe("controlnet.control=controlnet"))
    assert [error.value.code for error in (several, other, published, planned)] == [
        "BF-RECIPE-005", "BF-ART-004", "BF-ART-009", "BF-RECIPE-005"]  # fmt: skip
    for key in ("head=flow", "loss_on=masked", "tune=lora --set branch.lora_rank=2"):
        with pytest.raises(RecipeError, match="not for target queries"):
            recipe(*(f"branch.{part.removeprefix('branch.')}" for part in key.split(" --set ")))
    with pytest.raises(RecipeError, match="through frozen weights"):
        train_branch(recipe("models.dtype=bfloat16"), workspace=workspace, device="cpu")


def test_other_branches_are_what_they_were(workspace):
    """The key came later: a branch of latents has the identity that it had before."""
    store = LatentsStore.open(next(workspace.glob("latents-*")))
    assert "target" not in shared_identity(store, load_recipe("tiny").branch)["settings"]
    assert shared_identity(store, recipe().branch)["settings"]["target"] == "queries"
