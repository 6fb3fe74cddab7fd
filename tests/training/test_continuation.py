"""More training: a finished run goes on where its schedule kept the rate, and a new one begins with given weights."""

from __future__ import annotations

import shutil

import pytest
import torch
from fixtures_loading import load_branch
from fixtures_stage_training import mllm_store, recipe, save_flux, save_mllm
from fixtures_training import SmallTask, settings
from transformers import get_scheduler

from bifrost_cli.artifacts import lineage
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.data.safetensors_io import load_tensors
from bifrost_cli.errors import ArtifactError, UsageError
from bifrost_cli.training.checkpoint import Checkpoints
from bifrost_cli.training.loop import fit, learning_rate, stays_until
from bifrost_cli.training.train_branch import train_branch
from bifrost_cli.training.train_controlnet import train_controlnet

SCHEDULES = [{"schedule": "constant_with_warmup"}, {"schedule": "warmup_stable_decay", "decay_steps": 5}]


@pytest.mark.parametrize("given", [*SCHEDULES, {"schedule": "cosine"}], ids=lambda given: given["schedule"])
def test_rates_are_those_of_transformers_by_the_same_name(given):
    train = settings(steps=20, warmup=4, lr=0.3, **given)
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.3)
    options = {"num_decay_steps": 5} if train.schedule == "warmup_stable_decay" else None
    theirs = get_scheduler(train.schedule, optimizer, 4, 20, scheduler_specific_kwargs=options)
    for step in range(4, 20):  # in the warm-up transformers begins at 0, and so makes a first step of nothing
        assert learning_rate(step, train) == pytest.approx(0.3 * theirs.lr_lambdas[0](step), abs=1e-12), step


@pytest.mark.parametrize("given", SCHEDULES, ids=lambda given: given["schedule"])
def test_more_steps_go_on_to_the_bit(tmp_path, given):
    first, more = settings(steps=12, validate_every=0, **given), settings(steps=20, validate_every=0, **given)
    whole = fit(SmallTask(more), more, tmp_path / "whole")
    fit(SmallTask(first), first, tmp_path / "first")
    Checkpoints(tmp_path / "first" / "checkpoints", pinned=stays_until(first)).tidy()  # as a finished run is left
    shutil.copytree(tmp_path / "first", tmp_path / "again", ignore=shutil.ignore_patterns("checkpoints"))
    again = fit(SmallTask(more), more, tmp_path / "again", before=tmp_path / "first")
    assert f"continues at step {stays_until(first)} of 20" in (tmp_path / "again" / "train.log").read_text()
    assert all(torch.equal(value, again.ema_state[name]) for name, value in whole.ema_state.items())
    tables = [(tmp_path / name / "losses.csv").read_bytes() for name in ("whole", "again")]
    assert tables[0] == tables[1]


def test_a_schedule_that_has_fallen_does_not_go_on(tmp_path):
    fit(SmallTask(settings(steps=12)), settings(steps=12), tmp_path)
    with pytest.raises(ArtifactError, match="other training settings") as told:
        fit(SmallTask(settings(steps=20)), settings(steps=20), tmp_path)
    assert "steps 12 -> 20" in str(told.value.at)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {"mllm": save_mllm(folder / "mllm"), "flux": save_flux(folder / "flux")}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    mllm_store(folder / "latents-a")
    return folder


def trained(bases, workspace, stage=train_branch, **options):
    own = {name: options.pop(name) for name in ("resume", "init", "output") if name in options}
    few = {"steps": 4, "checkpoint_every": 2, "validate_every": 0, "sample_every": 0, "ema": 0.0, **options}
    return stage(recipe(**bases, **few), workspace=workspace, device="cpu", **own)


@pytest.fixture(scope="module")
def cosine(bases, workspace):
    return trained(bases, workspace, output=workspace / "cosine")


def weights(artifact):
    return load_tensors(artifact.path / "model.safetensors")[0]


def test_a_finished_constant_run_goes_on_and_names_its_origin(bases, workspace):
    first = trained(bases, workspace, schedule="constant_with_warmup", output=workspace / "constant")
    assert [path.name for path in first.path.glob("work/checkpoints/*")] == ["step-0000004"]
    assert first.verify() == [] and first.strays() == []
    whole = trained(bases, workspace, schedule="constant_with_warmup", steps=6)
    more = trained(bases, workspace, schedule="constant_with_warmup", steps=6, resume=first.path)
    assert all(torch.equal(value, weights(more)[name]) for name, value in weights(whole).items())
    assert more.id != whole.id and [line.id for line in lineage(more, workspace)][:3] == [
        more.id, LatentsStore.open(workspace / "latents-a").artifact.id, first.id
    ]  # fmt: skip
    again = trained(bases, workspace, schedule="constant_with_warmup", steps=6, resume=first.path)
    assert again.path == more.path
    with pytest.raises(UsageError, match="has made 4 steps already"):
        trained(bases, workspace, schedule="constant_with_warmup", steps=3, resume=first.path)
    with pytest.raises(ArtifactError, match="other settings") as told:
        trained(bases, workspace, schedule="constant_with_warmup", steps=6, lr=1e-4, resume=first.path)
    assert "lr" in str(told.value.at) and told.value.code == "BF-ART-003"


def test_a_cosine_begins_again_with_the_weights_for_the_steps_that_are_lacking(bases, workspace, cosine):
    assert not (cosine.path / "work" / "checkpoints").exists()
    more = trained(bases, workspace, steps=6, resume=cosine.path)
    same = trained(bases, workspace, steps=2, init=cosine.path)
    assert more.id == same.id and more.parents[1]["id"] == cosine.id
    assert more.identity["settings"]["train"]["steps"] == 2 and not torch.equal(
        weights(more)["mask_token"], weights(cosine)["mask_token"]
    )


def test_init_takes_the_weights_on_any_store_of_the_same_encoder(bases, workspace, cosine, tmp_path):
    other = mllm_store(tmp_path / "other", seed=5)
    begun = trained(bases, workspace, init=cosine.path, lr=1e-12, steps=1, warmup=0, output=tmp_path / "begun")
    assert all(torch.allclose(value, weights(begun)[name], atol=1e-6) for name, value in weights(cosine).items())
    fresh = trained(bases, workspace, lr=1e-12, steps=1, warmup=0, output=tmp_path / "fresh")
    assert not torch.allclose(weights(fresh)["mask_token"], weights(cosine)["mask_token"], atol=1e-4)
    assert load_branch(begun, torch.device("cpu")).patches == 16
    few = recipe(**bases, steps=1, validate_every=0, sample_every=0)
    moved = train_branch(few, latents=other.path, init=cosine.path, output=tmp_path / "moved", device="cpu")
    assert [parent["id"] for parent in moved.parents] == [other.id, cosine.id]


def test_init_of_what_does_not_fit_is_refused(bases, workspace, cosine, tmp_path):
    with pytest.raises(ArtifactError, match="other weights than this training trains") as told:
        trained(bases, workspace, init=cosine.path, normalize=True, output=tmp_path / "a")
    assert "latents_mean_C" in str(told.value.at) and told.value.code == "BF-ART-004"
    with pytest.raises(ArtifactError, match=r"is a branch|branch, not"):
        trained(bases, workspace, train_controlnet, init=cosine.path, output=tmp_path / "b")
    control = trained(bases, workspace, train_controlnet, output=tmp_path / "c")
    more = trained(bases, workspace, train_controlnet, steps=5, resume=control.path, output=tmp_path / "d")
    assert more.parents[1]["id"] == control.id
