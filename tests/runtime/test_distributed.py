"""Several processes: the numbers of one process, whatever their number and way, also when another number goes on.

Two jobs, of 2 and of 3 real processes, do all that needs processes (tests/fixtures/job_training.py); the tests
read what they left.
"""

from __future__ import annotations

import csv
import hashlib
import json
import socket
from pathlib import Path

import job_training as job
import pytest
import torch
from fixtures_stage_training import SERVER, end, mllm_store, save_flux, save_mllm

from bifrost_cli.artifacts import Artifact
from bifrost_cli.data.safetensors_io import load_tensors
from bifrost_cli.errors import EnvironmentProblem
from bifrost_cli.runtime import distributed
from bifrost_cli.training.checkpoint import Checkpoints
from bifrost_cli.training.parallel import _SharedBatchNorm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the jobs of 1, 2 and 3 processes made."""
    folder = tmp_path_factory.mktemp("job")
    mllm_store(folder / "latents")
    save_mllm(folder / "mllm")
    save_flux(folder / "flux")
    threads, encoder = torch.get_num_threads(), job.ModelLoader.encoder
    torch.set_num_threads(1)
    job.everything(folder)
    for world in (2, 3):
        run_job(world, folder)
    job.go_on(folder, "ddp-2", "ddp")
    job.go_on(folder, "fsdp-3", "ddp")
    job.facts(folder)
    torch.set_num_threads(threads)
    job.ModelLoader.encoder = encoder
    return folder


def run_job(world: int, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = [SERVER.Process(target=job.main, args=(folder, number, world, port)) for number in range(world)]
    for process in processes:
        process.start()
    assert [end(process) for process in processes] == [0] * world


def losses(path: Path) -> dict[str, list[float]]:
    with open(path / "losses.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {name: [float(row[name]) for row in rows] for name in ("step", "loss", "grad_norm", "lr")}


def same_training(one: Path, other: Path) -> None:
    for name, values in losses(one).items():
        assert losses(other)[name] == pytest.approx(values, rel=1e-5), name
    if one.name.startswith(("small", "controlnet")):
        return  # a bias before a BatchNorm has no gradient but rounding, of which AdamW makes steps
    weights, others = (load_tensors(path / "final.safetensors")[0] for path in (one, other))
    torch.testing.assert_close(others, weights, rtol=1e-4, atol=1e-5)
    validated, again = ((path / "validation.csv").read_text().split("\n")[1].split(",") for path in (one, other))
    assert list(map(float, again)) == pytest.approx(list(map(float, validated)), rel=1e-4)


# ---- trainings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"{name}-{world}" for world in (2, 3) for name in job.TRAINED[world]])
def test_any_number_of_processes_and_either_way_train_the_same(folder, name):
    same_training(folder / f"{name.split('-')[0]}-ddp-1", folder / name)


@pytest.mark.parametrize("name", ["ddp-1-ddp-3", "fsdp-2-fsdp-3", "ddp-2-fsdp-3", "ddp-2-ddp-1", "fsdp-3-ddp-1"])
def test_another_number_of_processes_goes_on_where_one_stopped(folder, name):
    """Asked in one process alone, all stop after the same step; what is left is one training, in the same order."""
    half = folder / f"half-{'-'.join(name.split('-')[:2])}"
    assert Checkpoints(half / "checkpoints").steps()[-1] == job.HALF
    reference = folder / "rest-ddp-2-ddp-1"
    assert losses(reference)["step"] == list(range(1, 5))
    same_training(reference, folder / f"rest-{name}")
    assert losses(half)["loss"] == pytest.approx(losses(reference)["loss"][: job.HALF], rel=1e-5)


def test_a_checkpoint_in_parts_is_safetensors_and_json_and_every_byte_counts(folder):
    checkpoints = Checkpoints(folder / "linear-fsdp-3" / "checkpoints")
    path = checkpoints.path(checkpoints.steps()[-1])
    names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    parts = [name for name in names if name.startswith("shards/shard-0000") and name.endswith(".safetensors")]
    assert len(parts) == 3 and sorted([*parts, "manifest.json", "state.json"]) == names
    sizes = [(path / name).stat().st_size for name in parts]
    assert max(sizes) < 1.2 * min(sizes), "each process writes about as much"
    for name in names:
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        assert job.told(checkpoints.newest) == "ArtifactError BF-ART-005 5", name
        (path / name).write_bytes(whole)
    assert checkpoints.newest().step == 4


def test_no_room_for_one_process_is_no_room_for_all_and_the_earlier_checkpoint_stays(folder):
    assert {seen["full disk"] for seen in facts(folder, 2)} == {"DiskFull BF-ENV-010 3"}
    checkpoints = Checkpoints(folder / "full" / "checkpoints")
    assert checkpoints.newest().step == 2 and [path.name for path in checkpoints.folder.iterdir()] == ["step-0000002"]


def test_layers_that_are_gathered_in_bfloat16_train_nearly_alike(folder):
    plain, half = facts(folder, 2)[0]["gathered"]
    assert half != plain and half == pytest.approx(plain, rel=0.02)


def test_shared_batch_statistics_are_those_of_torch():
    torch.manual_seed(0)
    ours, theirs = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    ours.__class__ = _SharedBatchNorm
    values = 5 + torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(ours.eval()(values), theirs.eval()(values))


# ---- agreement -------------------------------------------------------------------------------------------------------


def facts(folder: Path, world: int) -> list[dict]:
    return [json.loads((folder / f"facts-{world}-{number}.json").read_text()) for number in range(world)]


@pytest.mark.parametrize("world", [2, 3])
def test_an_error_of_one_is_the_error_of_all(folder, world):
    for seen in facts(folder, world):
        assert seen["share"] == "RecipeError BF-RECIPE-005 2"
        assert seen["first"] == "RecipeError BF-RECIPE-004 2"
        assert seen["bad part"] == "DataError BF-DATA-003 4"


def test_a_port_in_use_has_a_message(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        with pytest.raises(EnvironmentProblem, match="cannot meet at 127.0.0.1") as found:
            distributed.join(0, 2, 0, "cpu")
    assert found.value.code == "BF-ENV-032" and "MASTER_PORT" in found.value.fix


# ---- extraction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["store", "few"])
def test_any_number_of_processes_extracts_the_same_bytes(folder, name):
    made = [Artifact.open(folder / f"{name}-{world}") for world in (1, 2, 3)]
    assert made[0].files == made[1].files == made[2].files and made[0].id == made[2].id
    for artifact in made:
        assert artifact.verify() == [] and artifact.strays() == []
        file = sorted(name for name in artifact.files if "index" in name)[-1]
        assert hashlib.sha256((artifact.path / file).read_bytes()).hexdigest() == artifact.files[file]["sha256"]


def test_processes_without_a_shard_are_said_once(folder):
    first, *others = facts(folder, 3)
    assert sum("1 of the 3 processes have nothing to do" in line for line in first["said of few"]) == 1
    assert not any("nothing to do" in line for line in first["said"])
    assert all(seen["said"] == [] and seen["said of few"] == [] for seen in others)
