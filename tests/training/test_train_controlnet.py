"""train controlnet: latents in, a ControlNet out; FLUX untouched, no pixels, the same bytes after any interruption."""

from __future__ import annotations

import time

import pytest
import torch
from fixtures_flux import tiny_painter
from fixtures_loading import load_controlnet, load_diffusion
from fixtures_stage_training import end, mllm_store, recipe, save_flux, start
from fixtures_store import make_store

from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.errors import ArtifactError, RecipeError, StoreError
from bifrost_cli.loading.loaders import ModelLoader
from bifrost_cli.models.diffusion.controlnet import latent_controlnet
from bifrost_cli.models.encoders import VaeEncoder
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.training.train_controlnet import ControlNetTask, train_controlnet


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    return save_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    mllm_store(folder / "latents-a")
    return folder


@pytest.fixture(scope="module")
def made(workspace, flux_folder):
    return train_controlnet(recipe(flux=flux_folder), workspace=workspace, device="cpu")


def task(workspace, **changes) -> ControlNetTask:
    diffusion, store = tiny_painter(), LatentsStore.open(workspace / "latents-a")
    torch.manual_seed(0)
    controlnet = latent_controlnet(diffusion.transformer, 1, 1, store.channels)
    return ControlNetTask(controlnet, diffusion, store, recipe(**changes).controlnet, 16)


def test_the_artifact_is_whole_and_loads(made):
    assert made.kind == "controlnet" and made.verify() == [] and made.strays() == []
    assert set(made.files) == {"model.safetensors", "config.json", "losses.csv", "validation.csv",
                               "samples/step-0000012.png"}  # fmt: skip
    assert set(made.info["metrics"]) == {"loss", "loss_no_text", "loss_shuffled"}
    assert {"encoder", "grid", "channels"} <= set(made.identity)
    weights = load_controlnet(made, torch.device("cpu")).state_dict()
    assert any("running_mean" in name for name in weights)
    assert weights["controlnet_x_embedder.proj.weight"].abs().max() > 0


def test_held_out_texts_are_embedded_once_and_others_are_not_kept(workspace, monkeypatch):
    tested, calls = task(workspace), []
    embed = type(tested._diffusion).embed
    monkeypatch.setattr(type(tested._diffusion), "embed", lambda self, *a: calls.append(a[0]) or embed(self, *a))
    tested.module.eval()
    with torch.no_grad():
        first, counted = tested.validate(), len(calls)
        assert tested.validate() == first and len(calls) == counted == 2  # with the captions, and without
    tested.module.train()
    kept = len(tested._kept)
    tested.batch(0, 0)
    assert len(calls) == counted + 1 and len(tested._kept) == kept


def test_gradient_checkpointing_changes_no_byte(made, workspace, flux_folder, tmp_path):
    options = {"workspace": workspace, "output": tmp_path / "c", "device": "cpu"}
    again = train_controlnet(recipe(flux=flux_folder, gradient_checkpointing=True), **options)
    assert again.id == made.id and again.files == made.files


def test_flux_is_what_it_was(made, flux_folder):
    assert made.identity["painter"] == load_diffusion(str(flux_folder), torch.device("cpu")).weights_hash()


def test_the_averaged_weights_have_the_batch_statistics_of_the_training(made):
    weights = load_controlnet(made, torch.device("cpu")).state_dict()
    assert int(weights["controlnet_x_embedder.bn1.num_batches_tracked"]) == 12


def test_a_kill_and_the_same_command_give_the_same_bytes(made, workspace, flux_folder, tmp_path):
    options = {"recipe": recipe(flux=flux_folder), "workspace": workspace, "output": tmp_path / "c", "device": "cpu"}
    process = start(train_controlnet, tmp_path / "error.txt", **options)
    until = time.monotonic() + 60
    while not list(tmp_path.rglob("step-*/manifest.json")) and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    assert end(process) == -9
    assert end(start(train_controlnet, tmp_path / "error.txt", **options)) == 0
    assert train_controlnet(**options).files == made.files


def test_a_store_without_vae_latents_is_refused_before_a_weight_is_loaded(tmp_path, monkeypatch):
    store = make_store(tmp_path / "plain", encoder={"name": "mllm", "weights": "0" * 64})
    monkeypatch.setattr(ModelLoader, "diffusion", None)
    with pytest.raises(StoreError) as found:
        train_controlnet(recipe(), latents=store.path, device="cpu")
    assert found.value.exit_code == 5 and "latents.vae=true" in found.value.fix


def test_vae_latents_of_another_flux_are_refused(flux_folder, tmp_path):
    other = {**VaeEncoder(tiny_painter().vae, 64).identity, "weights": "2" * 64}
    store = mllm_store(tmp_path / "other", diffusion=other)
    with pytest.raises(ArtifactError) as found:
        train_controlnet(recipe(flux=flux_folder), latents=store.path, device="cpu")
    assert found.value.code == "BF-ART-004" and found.value.at.startswith("weights: 2222")


def test_vae_latents_of_another_grid_are_refused(flux_folder, tmp_path):
    store = mllm_store(tmp_path / "odd", grid=(3, 3))
    with pytest.raises(ArtifactError) as found:
        train_controlnet(recipe(flux=flux_folder), latents=store.path, device="cpu")
    assert found.value.code == "BF-ART-004" and "output_size=48" in found.value.fix


def test_float32_training_through_a_half_precision_flux_is_refused(workspace):
    settings = recipe()
    half = settings.model_copy(update={"models": settings.models.model_copy(update={"dtype": "bfloat16"})})
    with pytest.raises(RecipeError):
        train_controlnet(half, workspace=workspace, device="cpu")


def test_a_dry_run_touches_nothing(workspace, flux_folder):
    before = sorted(workspace.rglob("*"))
    plan = train_controlnet(recipe(flux=flux_folder, seed=9), workspace=workspace, device="cpu", dry_run=True)
    assert plan["steps"] == 12 and plan["disk_needed"] > 4 * plan["parameters"]
    assert sorted(workspace.rglob("*")) == before


# ---- the task --------------------------------------------------------------------------------------------------------


def test_latent_noise_is_bounded_reproducible_and_off_by_default(workspace):
    plain, noisy = task(workspace), task(workspace, latent_noise=0.5)
    batch = plain.batch(0, 0)
    first, second = (noisy._noisy(batch.latents_BPC, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    level_B = ((first - batch.latents_BPC) / noisy._std_C).std(dim=(1, 2))
    assert level_B.max() < 0.55 and level_B.std() > 0.02
    losses = [float(plain.loss(batch, torch.Generator().manual_seed(1))[0].detach()) for _ in range(2)]
    assert losses[0] == losses[1]


def test_dropped_texts_are_the_empty_prompt(workspace):
    tested = task(workspace, drop_prompt=1.0)
    assert torch.equal(tested.batch(0, 0).text.sequence_BTD, tested._diffusion.embed([""] * 4, 16).sequence_BTD)
    assert task(workspace)._text(1, 0) == "a blue square above a red circle"


@pytest.mark.parametrize(("tokens", "cut"), [(3, True), (200, False)])
def test_captions_that_are_cut_are_told_and_counted(workspace, flux_folder, monkeypatch, tokens, cut):
    said, ui, settings = [], Ui(), recipe(flux=flux_folder)
    monkeypatch.setattr(ui, "say", said.append)
    models = settings.models.model_copy(update={"diffusion_text_tokens": tokens})
    train_controlnet(settings.model_copy(update={"models": models}), workspace=workspace, device="cpu", dry_run=True,
                     ui=ui)  # fmt: skip
    lines = [line for line in said if f"longer than {tokens} tokens and are cut" in line]
    assert len(lines) == cut and all(line.split()[0].isdigit() for line in lines), said
