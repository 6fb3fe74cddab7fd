"""Under load: memory that does not grow with the rows, readers beside a writer, long prompt files, long trainings.

Each in a small size here; `pytest -m soak` has the full figures and prints what was measured.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from faults import Watched, disk
from fixtures_load import FORK, FULL, STORE, TINY, WORK, extraction, measured
from fixtures_store import make_store
from fixtures_targets import ON_SHIPPED_MODELS, OUT, Noise, Regression, _part, inputs
from memory_meter import held

from bifrost_cli.artifacts import Artifact
from bifrost_cli.config.schema import Recipe, Train
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.errors import ArtifactError
from bifrost_cli.generation import generate, pipeline, samples_folder
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.training import training_run as training

MB = 2**20
SOAK = [pytest.mark.soak, pytest.mark.timeout(4 * 3600)]
TEXT = 1500  # bytes a row may cost in memory beside its numbers: key, caption, plan, where it is read from
SLACK = 64 * MB  # what two runs of the same may differ by, beside two shards that wait for the garbage collector


# ---- stores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "few", "many"),
    [
        pytest.param(TINY, 512, 4096, id="tiny rows"),
        pytest.param(FULL, 64, 224, id="full rows"),
        pytest.param(TINY, 20_000, 200_000, id="200000 tiny rows", marks=SOAK),
        pytest.param(FULL, 200, 2_000, id="2000 full rows", marks=SOAK),
    ],
)
def test_memory_does_not_grow_with_the_rows(size, few, many, tmp_path):
    """Beside each row's own text: its numbers, which are most of a store, are never in memory together."""
    small, large = (measured(size, tmp_path / str(rows), rows) for rows in (few, many))
    for name in WORK:
        (less, _), (more, seconds) = small[name], large[name]
        print(f"{name}: {few} rows {less / MB:.0f} MB, {many} rows {more / MB:.0f} MB, {seconds:.0f} s")
        assert more - less < SLACK + 2 * size.rules["shard_rows"] * size.row_bytes + TEXT * (many - few), name


def _read_over_and_over(path: Path, until: Path, sums: Path, number: int) -> None:
    torch.set_num_threads(1)
    chance, done = np.random.default_rng(number), 0
    store = LatentsStore.open(path)
    expected = store.latents(range(store.rows)).astype(np.float64).sum((1, 2))
    while not until.exists() or done < 20:
        rows = chance.integers(0, store.rows, 8)
        found = LatentsStore.open(path).latents(rows).astype(np.float64).sum((1, 2))
        assert np.array_equal(found, expected[rows])
        done += 1
    sums.write_text(repr(float(expected.sum())))


@pytest.mark.parametrize(("readers", "rows"), [(2, 200), pytest.param(8, 20_000, marks=SOAK)], ids=["two", "eight"])
def test_readers_are_right_while_a_longer_store_is_written(readers, rows, tmp_path):
    """A store never changes: more images are another artifact in the same workspace, which cannot be read until it is
    whole; the readers of the old one see the same numbers all along."""
    extraction(TINY, tmp_path / "old", rows)
    old, done = tmp_path / "old" / STORE, tmp_path / "done"
    sums = [tmp_path / f"sum-{number}" for number in range(readers)]
    found = [FORK.Process(target=_read_over_and_over, args=(old, done, sums[number], number))
             for number in range(readers)]  # fmt: skip
    for process in found:
        process.start()
    writer = FORK.Process(target=extraction, args=(TINY, tmp_path / "new", 2 * rows))
    writer.start()
    while not (tmp_path / "new" / STORE / "draft.json").exists() and writer.is_alive():
        time.sleep(0.005)
    if writer.is_alive():
        with pytest.raises(ArtifactError):
            LatentsStore.open(tmp_path / "new" / STORE)
    writer.join()
    done.touch()
    for process in found:
        process.join()
    assert [process.exitcode for process in (writer, *found)] == [0] * (readers + 1)
    assert len({path.read_text() for path in sums}) == 1
    new = LatentsStore.open(tmp_path / "new" / STORE)
    assert new.keys[:rows] == LatentsStore.open(old).keys
    assert np.array_equal(new.latents(range(rows)), LatentsStore.open(old).latents(range(rows)))


# ---- a long prompt file ---------------------------------------------------------------------------------------------


def _paint(folder: Path, count: int, kill_after: int, dry_run: bool = False) -> dict[str, int]:
    """Generate a file of `count` prompts with a diffusion model of noise; a SIGKILL after so many images, unless 0."""
    torch.set_num_threads(1)
    prompts = inputs(folder) / "prompts.txt"
    if not prompts.exists():
        prompts.parent.mkdir(parents=True, exist_ok=True)
        prompts.write_text("".join(f"a red circle, number {number}\n" for number in range(count)))
    seen = {"painted": 0, "read before": -1, "read": 0}

    def work() -> None:
        if seen["painted"] == 0:
            seen["read before"] = seen["read"]
        if kill_after and seen["painted"] == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        seen["painted"] += 1

    real = samples_folder.sha256_file

    def counted(path: Path) -> str:
        seen["read"] += 1
        return real(path)

    parts = {"branch": _part(folder, "branch"), "controlnet": _part(folder, "controlnet")}
    with (disk(Watched()), mock.patch.object(pipeline, "BifrostPipeline", lambda *rest, **more: Noise(work, False)),
          mock.patch.object(samples_folder, "sha256_file", counted)):  # fmt: skip
        made = generate.generate(ON_SHIPPED_MODELS, prompts, output=folder / OUT, **parts, dry_run=dry_run)
    return made if dry_run else seen


def _paint_in_a_process(folder: Path, count: int, kill_after: int) -> int:
    process = FORK.Process(target=_paint, args=(folder, count, kill_after))
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("count", [60, pytest.param(100_000, marks=SOAK)])
def test_a_long_prompt_file_is_planned_killed_and_resumed(count, tmp_path):
    folder, kill_after = tmp_path / "it", count // 2
    began = time.monotonic()
    plan = _paint(folder, count, 0, dry_run=True)
    planned = time.monotonic() - began
    assert plan["pictures"] == count and plan["pictures_there"] == 0 and not (folder / OUT).exists()
    assert _paint_in_a_process(folder, count, kill_after) == -signal.SIGKILL
    first = (folder / OUT / "00000.png").stat().st_mtime_ns
    began = time.monotonic()
    seen = _paint(folder, count, 0)
    seconds = time.monotonic() - began
    print(f"{count} prompts: planned in {planned:.1f} s, {seen['painted']} generated after the kill in {seconds:.0f} s")
    assert seen["painted"] == count - kill_after, "nothing is made twice"
    assert seen["read before"] == 0, "nothing that is done is read before the work goes on"
    assert (folder / OUT / "00000.png").stat().st_mtime_ns == first
    assert len(Artifact.open(folder / OUT).files) == count + 1


# ---- generate for a long time ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "images"), [(10, 2), pytest.param(1800, 50, marks=SOAK)], ids=["seconds", "half an hour"]
)
def test_generate_in_one_process_keeps_its_memory_and_its_files(seconds, images, tmp_path):
    process = FORK.Process(target=_generate_for, args=(seconds, images, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0


def _generate_for(seconds: float, images: int, place: Path) -> None:
    """Run after run with the built-in system: after the first ones neither memory nor open files grow.

    Medians, as memory goes up and down. Each run reads the bases anew, after which some 40 KB more are held: over half
    are small objects, two for every tensor that safetensors (0.6 to 0.8) reads from a file. Images leave nothing.
    """
    from bifrost_cli.config.load import load_recipe

    torch.set_num_threads(1)
    recipe, run, samples = load_recipe("tiny", ["generate.steps=2"]), 0, []
    until = time.monotonic() + seconds
    while time.monotonic() < until or run < 8:
        prompts = [f"a red circle above a {'blue' if n % 2 else 'green'} square" for n in range(images)]
        generate.generate(recipe, prompts, seed=run, output=place / f"{run}", device="cpu", ui=Ui())
        shutil.rmtree(place / f"{run}")
        run += 1
        samples.append((held(), len(os.listdir("/proc/self/fd"))))
    memory, files = zip(*samples, strict=True)
    early, late = statistics.median(memory[run // 4 : run // 2]), statistics.median(memory[-(run // 4) :])
    print(f"{run} runs of {images} images: {early / MB:.0f} MB in the second quarter, {late / MB:.0f} in the last")
    assert files[-1] <= max(files[: run // 2]) and late - early < SLACK


# ---- a long training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [100, pytest.param(2000, marks=SOAK)])
def test_a_long_training_leaves_its_result_alone(steps, tmp_path):
    """Checkpoints every 20 steps, two kept: at no time are there more than three, and at the end none is left."""
    train = Train(steps=steps, batch_size=8, lr=1e-2, warmup=1, ema=0.9, precision="fp32", checkpoint_every=20, keep=2,
                  validate_every=steps // 2, validation_rows=4, sample_every=steps // 2)  # fmt: skip
    most, folder = [0], tmp_path / "it"

    def work() -> None:
        most[0] = max(most[0], len(list((folder / OUT / "work").glob("checkpoints/step-*"))))

    store = LatentsStore.open(make_store(tmp_path / "store", rows=4))
    job = training.TrainingRun("branch", Recipe(), train, store, {"test": 1}, Regression(train, work), {"test": 1},
                       lambda: "0", "0", torch.device("cpu"))  # fmt: skip
    with disk(Watched()):
        made = training.run_training(job, output=folder / OUT, workspace=folder / "runs", resume="auto", dry_run=False,
                                ui=Ui())  # fmt: skip
    left = {path.relative_to(made.path).as_posix() for path in made.path.rglob("*") if path.is_file()}
    assert 1 <= most[0] <= 2 and made.verify() == [] and made.strays() == []
    records = {name for name in left if name.startswith("work/samples/") or name.endswith((".csv", ".log"))}
    assert left - set(made.files) - records == {"manifest.json", ".lock"}
    assert not list(folder.rglob("checkpoints")) and not list(folder.rglob("*.tmp*"))
