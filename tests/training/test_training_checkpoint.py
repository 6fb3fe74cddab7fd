"""Checkpoints: whole or absent, every changed byte found, the old one dropped only after the new one verified."""

from __future__ import annotations

import errno
import shutil

import pytest
import torch
from fixtures_training import SmallTask, settings
from torch import nn

from bifrost_cli.errors import ArtifactError, DiskFull
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
    assert torch.equal(found.read("model", nn.Module())["w"], checkpoint(15).groups["model"]["w"])


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
        restore_module(module, module_tensors(nn.Linear(3, 3)))
    assert "0.weight" in found.value.at
