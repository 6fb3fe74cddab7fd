"""Checkpoints: whole or absent, every changed byte found, the old one dropped only after the new one verified."""

from __future__ import annotations

import errno
import shutil
import threading
import tracemalloc

import pytest
import torch
from fixtures_training import SmallTask, settings
from torch import nn

from bifrost_cli.errors import ArtifactError, DiskFull
from bifrost_cli.training.background import BackgroundWork
from bifrost_cli.training.checkpoint import Checkpoint, Checkpoints, module_tensors, restore_module
from bifrost_cli.training.loop import fit


def checkpoint(step: int) -> Checkpoint:
    weights = {"w": torch.arange(6.0).reshape(2, 3) + step}
    return Checkpoint(step, {"model": weights, "optimizer": {"w/step": torch.tensor(float(step))}}, {"seconds": 1.5})


def saved(folder, *steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    checkpoints.prepare()
    for step in steps:
        checkpoints.save(checkpoint(step))
    return checkpoints


def test_round_trip_keeps_the_newest(tmp_path):
    checkpoints = saved(tmp_path, 5, 10, 15)
    assert checkpoints.steps() == [10, 15]
    found = checkpoints.newest()
    assert found.step == 15 and found.state["seconds"] == 1.5
    assert torch.equal(dict(found.read("model", nn.Module()))["w"], checkpoint(15).groups["model"]["w"])


def test_none_is_not_an_error_and_the_same_step_is_written_once(tmp_path):
    assert Checkpoints(tmp_path / "none").newest() is None
    checkpoints = saved(tmp_path, 5)
    before = (checkpoints.path(5) / "manifest.json").stat().st_mtime_ns
    checkpoints.save(checkpoint(5))
    assert (checkpoints.path(5) / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_flipped_byte_anywhere_is_an_error(tmp_path, name):
    path = saved(tmp_path, 5).path(5) / name
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
        with pytest.raises(ArtifactError):
            Checkpoints(tmp_path).newest()
    path.write_bytes(whole)
    assert Checkpoints(tmp_path).newest().step == 5


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a_missing_file_is_an_error_and_not_step_zero(tmp_path, name):
    fit(SmallTask(settings()), settings(), tmp_path)
    (tmp_path / "checkpoints" / "step-0000020" / name).unlink()
    with pytest.raises(ArtifactError, match="is damaged") as found:
        fit(SmallTask(settings()), settings(), tmp_path)
    assert found.value.exit_code == 5 and "step-0000020" in found.value.at


def test_a_renamed_checkpoint_is_an_error(tmp_path):
    checkpoints = saved(tmp_path, 5)
    checkpoints.path(5).rename(checkpoints.path(6))
    with pytest.raises(ArtifactError, match="step 5"):
        checkpoints.newest()


def test_leftovers_of_a_killed_save_are_swept(tmp_path):
    checkpoints = saved(tmp_path, 5)
    shutil.copytree(checkpoints.path(5), tmp_path / ".bifrost-tmp-1-1")
    checkpoints.prepare()
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000005"]


def test_a_save_that_does_not_read_back_keeps_the_old_ones(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 5, keep=1)

    def broken(path):
        raise ArtifactError("the disk lies")

    monkeypatch.setattr("bifrost_cli.training.checkpoint.verify", broken)
    with pytest.raises(ArtifactError):
        checkpoints.save(checkpoint(10))
    assert checkpoints.steps() == [5, 10]


def test_a_full_disk_keeps_the_old_checkpoint_and_leaves_no_half_one(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 5)
    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(DiskFull):
        checkpoints.save(checkpoint(10))
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000005"]
    assert checkpoints.newest().step == 5


def full_disk(descriptor):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_tied_weights_are_stored_once_and_other_models_refused(tmp_path):
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    assert list(module_tensors(module)) == ["0.weight", "0.bias", "1.bias"]
    with pytest.raises(ArtifactError, match="another model") as found:
        restore_module(module, module_tensors(nn.Linear(3, 3)).items())
    assert "0.weight" in found.value.at


def test_a_checkpoint_is_read_one_tensor_at_a_time(tmp_path):
    """Eight tensors of 8 MB: what reading holds beyond the module is one of them, not the file."""
    wide = nn.ParameterDict({str(number): nn.Parameter(torch.full((2_000_000,), 1.0 + number)) for number in range(8)})
    checkpoints = Checkpoints(tmp_path)
    checkpoints.prepare()
    checkpoints.save(Checkpoint(1, {"model": module_tensors(wide), "optimizer": {}}, {}))
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.zero_()
    found = checkpoints.newest()
    tracemalloc.start()
    restore_module(wide, found.read("model", wide))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * 8_000_000, peak  # one, and the one that is being read
    assert [float(parameter[0]) for parameter in wide.parameters()] == [1.0 + number for number in range(8)]


# ---- in the background -----------------------------------------------------------------------------------------------


def test_checkpoints_in_the_background_are_the_same_bytes(tmp_path):
    for name, background in (("beside", True), ("within", False)):
        train = settings(save_in_background=background, keep=9)
        fit(SmallTask(train), train, tmp_path / name)
    for path in (tmp_path / "within" / "checkpoints").rglob("*.safetensors"):
        other = tmp_path / "beside" / path.relative_to(tmp_path / "within")
        assert other.read_bytes() == path.read_bytes(), path
    assert Checkpoints(tmp_path / "beside" / "checkpoints").steps() == [5, 10, 15, 20]


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    train, going_on, seen = settings(save_in_background=True), threading.Event(), []
    task, save, loss = SmallTask(train), Checkpoints.save_alone, SmallTask.loss

    def waiting(self, checkpoint):
        seen.append(going_on.wait(30))
        save(self, checkpoint)

    def counted(batch, generator):
        task.losses += 1
        if task.losses == 7:  # two steps after the first checkpoint
            going_on.set()
        return loss(task, batch, generator)

    task.losses, task.loss = 0, counted
    monkeypatch.setattr(Checkpoints, "save_alone", waiting)
    fit(task, train, tmp_path)
    assert seen and all(seen)
    assert Checkpoints(tmp_path / "checkpoints").newest().step == 20


def test_a_full_disk_in_the_background_ends_the_training_and_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    train = settings(save_in_background=True)
    task = SmallTask(train)
    save = Checkpoints.save_alone

    def full(self, checkpoint):
        if checkpoint.step == 10:
            raise DiskFull("no room")
        save(self, checkpoint)

    monkeypatch.setattr(Checkpoints, "save_alone", full)
    with pytest.raises(DiskFull):
        fit(task, train, tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").newest().step == 5
    assert len((tmp_path / "losses.csv").read_text().splitlines()) == 1 + 15  # it arrived with the next save


def test_an_error_in_the_background_does_not_hide_the_one_that_ends_the_training():
    def broken():
        raise DiskFull("no room")

    with pytest.raises(ValueError, match="first"), BackgroundWork() as work:
        work.start(broken)
        raise ValueError("first")
    with pytest.raises(DiskFull), BackgroundWork() as work:
        work.start(broken)
