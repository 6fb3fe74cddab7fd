"""train branch: latents in, a branch out; the MLLM untouched, the same bytes after any interruption."""

from __future__ import annotations

import signal
import time
from types import SimpleNamespace

import pytest
import torch
from fixtures_loading import load_branch
from fixtures_mllm import random_mllm
from fixtures_stage_training import CAPTIONS, PLANS, end, mllm_store, recipe, save_mllm, start

from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.errors import ArtifactError, BifrostError, DataError, OutOfMemory, RecipeError, UsageError
from bifrost_cli.loading.loaders import ModelLoader
from bifrost_cli.models.encoders import MllmEncoder
from bifrost_cli.training import loop
from bifrost_cli.training.data_order import micro_seed
from bifrost_cli.training.train_branch import BranchTask, build_branch, train_branch


@pytest.fixture(scope="module")
def mllm_folder(tmp_path_factory):
    return save_mllm(tmp_path_factory.mktemp("mllm"))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    mllm_store(folder / "latents-a")
    return folder


@pytest.fixture(scope="module")
def made(workspace, mllm_folder):
    return train_branch(recipe(mllm_folder), workspace=workspace, device="cpu")


def task(workspace, **changes) -> BranchTask:
    settings = recipe(**changes)
    store, mllm = LatentsStore.open(workspace / "latents-a"), random_mllm()
    return BranchTask(build_branch(settings, store, mllm), mllm, store, settings.branch)


def test_the_artifact_is_whole_and_loads(made, workspace):
    assert made.kind == "branch" and made.verify() == [] and made.strays() == []
    assert set(made.files) == {"model.safetensors", "config.json", "losses.csv", "validation.csv",
                               "samples/step-0000012.png"}  # fmt: skip
    assert made.parents[0]["id"] == LatentsStore.open(workspace / "latents-a").artifact.id
    assert {"loss", "cosine", "variance", "loss_shuffled"} <= set(made.info["metrics"])
    assert made.manifest["cost"]["samples"] == 48 and made.manifest["made"]["seed"] == 0
    branch = load_branch(made, torch.device("cpu"))
    assert branch.patches == 16 and not any(parameter.requires_grad for parameter in branch.parameters())
    assert len((made.path / "losses.csv").read_text().splitlines()) == 13
    assert not (made.path / "work" / "checkpoints").exists()


def test_only_the_branch_is_saved_and_the_mllm_is_what_it_was(made, mllm_folder):
    assert made.identity["mllm"] == random_mllm().weights_hash()
    names = load_branch(made, torch.device("cpu")).state_dict()
    assert not any("embed_tokens" in name or "visual." in name for name in names)


def test_a_changed_mllm_stops_the_command(workspace, mllm_folder, tmp_path, monkeypatch):
    plain = BranchTask.loss

    def meddling(self, batch, generator):
        with torch.no_grad():
            self._mllm.model.lm_head.weight.mul_(1.001)
        return plain(self, batch, generator)

    monkeypatch.setattr(BranchTask, "loss", meddling)
    with pytest.raises(BifrostError, match="changed weights that are frozen"):
        train_branch(recipe(mllm_folder, steps=3), workspace=workspace, output=tmp_path / "b", device="cpu")
    assert not (tmp_path / "b" / "manifest.json").exists()


def test_the_same_call_again_returns_what_is_there(made, workspace, mllm_folder):
    again = train_branch(recipe(mllm_folder, keep=7, log_every=3), workspace=workspace, device="cpu")
    assert again.path == made.path and again.manifest == made.manifest


def test_gradient_checkpointing_changes_no_byte_and_is_no_other_branch(made, workspace, mllm_folder, tmp_path):
    again = train_branch(recipe(mllm_folder, gradient_checkpointing=True), workspace=workspace, output=tmp_path / "b",
                         device="cpu")  # fmt: skip
    assert again.id == made.id and again.files == made.files


def test_a_lack_of_memory_in_training_names_what_keeps_the_bytes(workspace, mllm_folder, tmp_path, monkeypatch):
    def hungry(self, batch, generator):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(BranchTask, "loss", hungry)
    for changes, fix in ({}, "gradient_checkpointing=true"), ({"gradient_checkpointing": True}, "batch_size=2 "):
        with pytest.raises(OutOfMemory) as found:
            train_branch(recipe(mllm_folder, **changes), workspace=workspace, output=tmp_path / "b", device="cpu")
        assert found.value.fix.startswith(f"--set branch.train.{fix}")


def test_other_settings_in_the_same_place_are_refused(made, workspace, mllm_folder):
    with pytest.raises(ArtifactError, match="different setup") as found:
        train_branch(recipe(mllm_folder, lr=2e-3), workspace=workspace, output=made.path, device="cpu")
    assert found.value.code == "BF-ART-003" and "lr: 0.001 -> 0.002" in found.value.at


def test_a_codebook_is_made_of_the_stores_latents_and_trains_to_the_same_bytes(workspace, mllm_folder, tmp_path):
    settings = recipe(mllm_folder, head="codebook", codes=6, loss_on="masked", normalize=True)
    made, again = (train_branch(settings, workspace=workspace, output=tmp_path / name, device="cpu") for name in "ab")
    assert made.files == again.files and made.identity["settings"]["codes"] == 6
    branch, store = load_branch(made, torch.device("cpu")), LatentsStore.open(workspace / "latents-a")
    tokens_NC = branch.to_decoder(torch.from_numpy(store.latents(list(range(40))))).flatten(0, 1)
    index_N = branch.vision_head.nearest(tokens_NC).squeeze(-1)
    centres_KC = torch.stack([tokens_NC[index_N == code].mean(0) for code in range(6)])
    assert torch.allclose(branch.vision_head.codes_KC, centres_KC, atol=0.1)  # k-means has all but come to rest


def test_more_codes_than_latents_are_refused(workspace, mllm_folder):
    with pytest.raises(RecipeError, match="9999 codes cannot be made of 640 latents"):
        train_branch(recipe(mllm_folder, head="codebook", codes=9999), workspace=workspace, device="cpu")


def wait_for_checkpoint(folder):
    until = time.monotonic() + 60
    while not list(folder.rglob("step-*/manifest.json")) and time.monotonic() < until:
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_training_ends_in_the_same_bytes(made, workspace, mllm_folder, tmp_path, number):
    options = {"recipe": recipe(mllm_folder), "workspace": workspace, "output": tmp_path / "b", "device": "cpu"}
    process = start(train_branch, tmp_path / "error.txt", **options)
    wait_for_checkpoint(tmp_path)
    process.kill() if number == signal.SIGKILL else process.terminate()
    assert end(process) == (-9 if number == signal.SIGKILL else 75)
    assert not (tmp_path / "b" / "manifest.json").exists()
    assert end(start(train_branch, tmp_path / "error.txt", **options)) == 0
    assert train_branch(**options).files == made.files


def test_latents_of_another_encoder_are_refused_before_any_loading(mllm_folder, tmp_path, monkeypatch):
    other = mllm_store(tmp_path / "clip", encoder={"name": "open_clip:ViT-B-32/x", "weights": "1" * 64})
    monkeypatch.setattr(ModelLoader, "mllm", None)
    with pytest.raises(ArtifactError) as found:
        train_branch(recipe(mllm_folder), latents=other.path, workspace=tmp_path, device="cpu")
    assert found.value.code == "BF-ART-004" and "open_clip:ViT-B-32/x, not mllm" in found.value.at


def test_the_same_encoder_with_other_weights_is_refused(mllm_folder, tmp_path):
    other = mllm_store(tmp_path / "other", encoder={**MllmEncoder(random_mllm(), 64).identity, "weights": "1" * 64})
    with pytest.raises(ArtifactError) as found:
        train_branch(recipe(mllm_folder), latents=other.path, workspace=tmp_path, device="cpu")
    assert found.value.code == "BF-ART-004" and found.value.at.startswith("weights: 1111")


def test_an_external_encoder_of_another_width_trains_when_the_recipe_names_it(mllm_folder, tmp_path, monkeypatch):
    identity = {"name": "open_clip:ViT-B-32/x", "weights": "1" * 64}
    store = mllm_store(tmp_path / "clip", encoder=identity, channels=24)
    encoder = type("External", (), {"identity": identity})
    monkeypatch.setattr(ModelLoader, "encoder", lambda *_, **__: encoder)
    external = recipe(mllm_folder, encoder=identity["name"], steps=3, normalize=True)
    made = train_branch(external, latents=store.path, workspace=tmp_path, device="cpu")
    branch = load_branch(made, torch.device("cpu"))
    assert branch.channels == 24
    torch.testing.assert_close(branch.latents_mean_C, torch.from_numpy(LatentsStore.open(store).mean_C))


def test_a_dry_run_touches_nothing(workspace, mllm_folder, tmp_path):
    before = sorted(workspace.rglob("*"))
    plan = train_branch(recipe(mllm_folder, seed=9), workspace=workspace, device="cpu", dry_run=True)
    assert plan["rows"] == 36 and plan["held_out"] == 4 and plan["continues_at"] == 0 and plan["parameters"] > 10_000
    assert sorted(workspace.rglob("*")) == before


def test_a_batch_larger_than_the_store_is_refused(workspace, mllm_folder):
    with pytest.raises(RecipeError, match="36 rows"):
        train_branch(recipe(mllm_folder, batch_size=37), workspace=workspace, device="cpu")


def test_one_row_is_too_few(mllm_folder, tmp_path):
    store = mllm_store(tmp_path / "one", rows=1)
    with pytest.raises(DataError, match="1 rows"):
        train_branch(recipe(mllm_folder), latents=store.path, device="cpu")


def test_resume_names_a_run_or_its_newest_checkpoint(workspace, mllm_folder, tmp_path):
    with pytest.raises(ArtifactError, match="no checkpoint"):
        train_branch(recipe(mllm_folder), workspace=workspace, resume=tmp_path, device="cpu")
    options = {"recipe": recipe(mllm_folder, checkpoint_every=2), "workspace": workspace, "device": "cpu"}
    process = start(train_branch, tmp_path / "error.txt", output=tmp_path / "b", **options)
    wait_for_checkpoint(tmp_path)
    process.terminate()
    assert end(process) == 75
    checkpoints = sorted((tmp_path / "b" / "work" / "checkpoints").glob("step-*"))
    if len(checkpoints) > 1:
        with pytest.raises(UsageError, match="not the newest"):
            train_branch(resume=checkpoints[0], **options)
    assert train_branch(resume=checkpoints[-1], **options).path == tmp_path / "b"


# ---- the task --------------------------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_the_step(workspace):
    one, other = task(workspace).batch(5, 0), task(workspace).batch(5, 0)
    assert one.rows == other.rows and torch.equal(one.latents_BPC, other.latents_BPC)
    assert all(torch.equal(a, b) for a, b in zip(one.text.keys, other.text.keys, strict=True))
    assert task(workspace).batch(6, 0).rows != one.rows


def test_accumulated_masked_tokens_count_alike(workspace, tmp_path):
    """Two micro-batches give the gradient of the mean over all masked tokens of the step, however many each has."""
    changes = {"loss_on": "masked", "mask_low": 0.0, "mask_sd": 0.5, "mask_mean": 0.5, "batch_size": 1, "accumulate": 4,
               "clip": 0.0, "drop_prompt": 0.0}  # fmt: skip
    one = task(workspace, **changes)
    seed, patches, train = one._settings.train.seed, 16, one._settings.train
    counts = [int(one._masks(1, patches, torch.Generator().manual_seed(micro_seed(seed, 0, micro))).sum())
              for micro in range(4)]  # fmt: skip
    assert len(set(counts)) > 1 and one.weights(0) == pytest.approx([4 * count / sum(counts) for count in counts])
    state = loop._start(one, train, torch.device("cpu"))
    taken = {}
    state.optimizer.step = lambda: taken.update(
        {name: p.grad.clone() for name, p in one.module.named_parameters() if p.grad is not None}
    )
    row, _ = loop._step(state, tmp_path, SimpleNamespace(requested=False))
    state.step, total = 0, 0.0
    for micro in range(4):
        loss, _ = loop._micro(state, micro)
        (loss * counts[micro] / sum(counts)).backward()
        total += loss.item() * counts[micro] / sum(counts)
    assert row["loss"] == pytest.approx(total, rel=1e-5)
    for name, parameter in one.module.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(taken[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_held_out_rows_are_never_trained_on(workspace):
    tested = task(workspace)
    seen = {row for step in range(40) for row in tested.batch(step, 0).rows}
    assert seen == set(tested.train_rows) and not seen & set(tested.held_rows) and len(tested.held_rows) == 4


def test_texts_are_captions_plans_or_nothing_by_their_shares(workspace):
    texts = {share: [task(workspace, drop_prompt=drop, plan_share=share)._text(row, 3) for row in range(4)]
             for share, drop in ((0.0, 0.0), (1.0, 0.0), (0.5, 1.0))}  # fmt: skip
    assert texts[0.0] == [CAPTIONS[0], CAPTIONS[1], "A green circle", CAPTIONS[3]]
    assert texts[1.0][1] == f"{CAPTIONS[1]}\n{PLANS[1]}"
    assert texts[0.5] == [""] * 4
    tested = task(workspace, drop_prompt=0.25)
    dropped = sum(tested._text(row, number) == "" for row in range(40) for number in range(50))
    assert 400 < dropped < 600


def test_a_row_of_a_batch_is_a_row_alone(workspace):
    """Left padding to the longest text of a batch changes nothing that the branch predicts."""
    tested = task(workspace)
    both, alone = tested._batch([0, 1], CAPTIONS[:2]), tested._batch([0], CAPTIONS[:1])
    masked_BP = torch.ones(2, 16, dtype=torch.bool)
    torch.testing.assert_close(
        tested.module(both.latents_BPC, masked_BP, both.text)[:1],
        tested.module(alone.latents_BPC, masked_BP[:1], alone.text),
        rtol=1e-4,
        atol=1e-5,
    )


def test_captions_of_300_tokens_are_read_and_longer_ones_are_cut_and_counted(tmp_path):
    long = [" ".join(["red", "circle"] * (60 * n)) for n in range(4)]
    mllm_store(tmp_path / "latents-a", captions=long * 10)
    tested = task(tmp_path, max_text_tokens=300, drop_prompt=0.0)
    batch = tested._batch([0, 1, 2, 3], long)
    assert batch.text.keys[0].shape[2] == 300 and 10 <= sum(map(tested.too_long, range(40))) < 40
    cut = tested._batch([3], long[3:])  # a text that is cut is the same text, whoever else is in the batch
    torch.testing.assert_close(batch.text.keys[0][3:], cut.text.keys[0], rtol=1e-4, atol=1e-5)
    loss, _ = tested.loss(batch, torch.Generator().manual_seed(0))
    assert torch.isfinite(loss)


def test_validation_says_which_text_was_heard(workspace):
    with torch.no_grad():
        found, again = (task(workspace, plan_share=0.5).validate() for _ in range(2))
    assert set(found) == {"loss", "cosine", "variance", "loss_caption", "loss_shuffled"}
    assert found == again
