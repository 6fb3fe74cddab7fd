"""generate and eval by several processes: the bytes of one, whatever their number, also when one of them is killed."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import job_generation as job
import numpy as np
import pytest
from fixtures_clip import save_tiny_clip
from fixtures_flux import System, save_system
from fixtures_stage_training import SERVER, end
from PIL import Image

from bifrost_cli.artifacts import Artifact
from bifrost_cli.cli.app import run
from bifrost_cli.errors import ArtifactError, UsageError
from bifrost_cli.evaluation.evaluate import evaluate
from bifrost_cli.generation.generate import generate
from bifrost_cli.runtime import launch

PROMPTS = ["a star", "a red circle", "a star", "two blue squares", "a green cross"]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> System:
    return save_system(tmp_path_factory.mktemp("system"), head="codebook")


def options(system: System) -> dict[str, Any]:
    return {"branch": system.branch.path, "controlnet": system.controlnet.path, "device": "cpu"}


def run_job(of: int, said: Path, *calls: Any, killed: int | None = None) -> tuple[list[int], list[str], list[int]]:
    """Exit codes, what the first process said, and how many images each made."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = [SERVER.Process(target=job.main, args=(said, n, of, port, calls, killed)) for n in range(of)]
    for process in processes:
        process.start()
    codes = [end(process) for process in processes]
    counts = [said.parent / f"{said.stem}-{n}.count" for n in range(of)]
    return codes, json.loads(said.read_text()), [int(one.read_text()) if one.exists() else -1 for one in counts]


def test_two_processes_make_and_measure_what_one_does(system: System, tmp_path: Path) -> None:
    recipe = system.recipe.model_copy(update={"evaluate": system.recipe.evaluate.model_copy(
        update={"features": f"open_clip:local-dir:{save_tiny_clip(tmp_path / 'clip')}"})})  # fmt: skip
    (tmp_path / "true").mkdir()
    for number in range(70):  # batches of 32: the second process has the last two
        rgb = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(rgb).save(tmp_path / "true" / f"{number}.png")
    given = {**options(system), "save_latents": True, "grid": True, "seed": 3}
    alone = generate(recipe, PROMPTS, output=tmp_path / "alone", **given)
    measured = {"reference": tmp_path / "true", "min_samples": 4, "device": "cpu"}
    one = evaluate(recipe, samples=tmp_path / "alone", workspace=tmp_path / "one", output=tmp_path / "report-one",
                   **measured)  # fmt: skip
    calls = [("generate", (recipe, PROMPTS), {**given, "output": tmp_path / "both"}),
             ("evaluate", (recipe,), {**measured, "samples": tmp_path / "both", "workspace": tmp_path / "two",
                                      "output": tmp_path / "report-two"})]  # fmt: skip
    codes, said, counts = run_job(2, tmp_path / "said.json", *calls)
    assert codes == [0, 0], said
    both, two = Artifact.open(tmp_path / "both"), Artifact.open(tmp_path / "report-two")
    assert both.files == alone.files and both.id == alone.id and sorted(counts) == [2, 3]
    assert not (both.path / "work").exists() and not both.strays()
    results = [json.loads(report.file("report.json").read_text())["results"] for report in (one, two)]
    assert results[0] == results[1] and two.id == one.id
    kept = [sorted(path.read_bytes() for path in (tmp_path / name / "statistics").iterdir()) for name in ("one", "two")]
    assert kept[0] == kept[1]


def test_a_killed_process_ends_the_job_and_another_number_goes_on(system: System, tmp_path: Path) -> None:
    recipe = system.recipe.model_copy(update={"generate": system.recipe.generate.model_copy(
        update={"offload": "model"})})  # fmt: skip  # latents of all first
    call = ("generate", (recipe, PROMPTS), {**options(system), "output": tmp_path / "out"})
    codes, said, _ = run_job(2, tmp_path / "killed.json", call, killed=1)
    assert codes == [3, -9] and said[-1].startswith("BF-ENV-031") and "killed or lost" in said[-1]
    there = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert there == ["00000.png", "00001.png", "00002.png"], "all of the first process, one of the second"
    codes, said, counts = run_job(3, tmp_path / "said.json", call)
    assert codes == [0, 0, 0], said
    assert "3 of 5 images are there already" in said and sorted(counts) == [0, 1, 1]
    assert "2 images to be made: 1 of the 3 processes have nothing to do" in said
    alone = generate(system.recipe, PROMPTS, output=tmp_path / "alone", **options(system))
    assert {name: (tmp_path / "out" / name).read_bytes() for name in alone.files if name.endswith(".png")} == {
        name: alone.file(name).read_bytes() for name in alone.files if name.endswith(".png")
    }


def test_a_batch_is_another_setup_and_its_images_are_alike(system: System, tmp_path: Path) -> None:
    given = {**options(system), "save_latents": True}
    one = generate(system.recipe, PROMPTS, output=tmp_path / "one", **given)
    three = generate(system.recipe, PROMPTS, output=tmp_path / "three", batch=3, **given)
    assert "batch" not in one.info["settings"] and three.info["settings"]["batch"] == 3 and one.id != three.id
    for number in range(len(PROMPTS)):
        images = [np.asarray(Image.open(made.file(f"{number:05d}.png"))).astype(int) for made in (one, three)]
        assert np.abs(images[0] - images[1]).max() <= 1, "rounding"
    with pytest.raises(ArtifactError, match="different setup") as caught:
        generate(system.recipe, PROMPTS, output=tmp_path / "one", batch=3, **given)
    assert "batch" in caught.value.at
    with pytest.raises(UsageError, match="0 images at a time"):
        generate(system.recipe, PROMPTS, batch=0)


def test_prompts_that_can_be_read_once_are_not_for_several(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", type("Text", (), {"buffer": __import__("io").BytesIO(b"a star\n")})())
    assert run(["generate", "--prompts", "-", "--gpus", "2", "-o", "out"]) == 2
    assert "can be read only once" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["generate", "a star"], ["eval", "--fid"]])
def test_the_commands_are_given_to_processes(words, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    started: list[Any] = []
    monkeypatch.setattr(launch, "_torchrun", lambda arguments, environment: started.append(arguments) or 0)
    monkeypatch.setattr("sys.argv", ["bifrost", *words, "--gpus", "3"])
    assert run([*words, "--gpus", "3"]) == 0
    assert started == [["--standalone", "--nproc-per-node=3", "-m", "bifrost_cli", *words]]
