"""extract-latents: whole runs, and runs that are killed, stopped, starved of disk or given bad input.

Most tests use an encoder that averages pixels: what is tested is that nothing is lost and nothing is silently wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_flux import save_system
from fixtures_loading import load_vae
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from PIL import Image, ImageOps

from bifrost_cli import extract_latents, load_recipe
from bifrost_cli.artifacts import Artifact
from bifrost_cli.artifacts.identity import provenance
from bifrost_cli.cli.app import run as command_line
from bifrost_cli.config.schema import Images, Latents, Recipe, Shapes
from bifrost_cli.data.images import square
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.data.sources.scan import scan
from bifrost_cli.errors import BifrostError, Diverged, Interrupted, Stopped
from bifrost_cli.extraction import extract
from bifrost_cli.extraction.source import images_of_store
from bifrost_cli.loading.loaders import ModelLoader
from bifrost_cli.runtime.ui import Ui

ROWS = "shapes:90:3"  # 6 shards, 12 batches
RULES = {"shard_rows": 16, "chunk_rows": 4, "batch_size": 8, "vae": False}


def recipe(background: str = "white", **latents: Any) -> Recipe:
    return Recipe(images=Images(input_size=32, background=background), latents=Latents(**{**RULES, **latents}))


class Means:
    """An encoder of nothing but means: 2x2 patches of 32 px, 8 channels. `hook(call)` runs before each batch."""

    image_size, grid, channels = 32, (2, 2), 8

    def __init__(self, hook: Callable[[int], object] = lambda call: None, weights: str = "a" * 64) -> None:
        self.identity = {"name": "averages", "weights": weights, "grid": [2, 2], "channels": 8}
        self._hook, self._calls = hook, 0

    def encode(self, pixels_BSS3: Any) -> torch.Tensor:
        self._hook(self._calls)
        self._calls += 1
        parts = torch.as_tensor(pixels_BSS3).float().unflatten(1, (2, 16)).unflatten(3, (2, 16)).mean((2, 4))
        return parts.flatten(1, 2)[..., [0, 1, 2, 0, 1, 2, 0, 1]] * torch.arange(1, 9) / 64


class Said(Ui):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def means(monkeypatch: pytest.MonkeyPatch) -> Callable[[Means], None]:
    """Put this encoder in the place of the recipe's."""

    def use(encoder: Means) -> None:
        monkeypatch.setattr(ModelLoader, "encoder", lambda *_, **__: encoder)

    use(Means())
    return use


@pytest.fixture
def undisturbed(means: Any, tmp_path: Path) -> dict[str, Any]:
    return run(tmp_path / "undisturbed").files


def run(output: Path, source: Path | str = ROWS, **latents: Any) -> Artifact:
    return extract_latents(recipe(**latents), source=source, output=output)


def refused(code: str, exit_code: int, *arguments: Any, **latents: Any) -> str:
    with pytest.raises(BifrostError) as caught:
        run(*arguments, **latents)
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code), str(caught.value)
    return str(caught.value)


def payload(path: Path) -> dict[str, str]:
    """Digest of every file that belongs to the artifact's payload, read from the disk."""
    return {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in Artifact.open(path).files}


def folder_of(path: Path, count: int = 20, size: int = 40) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rgb = np.random.default_rng(i).integers(0, 255, (size, size, 3), np.uint8)
        Image.fromarray(rgb).save(path / f"{i:02d}.png")
        (path / f"{i:02d}.txt").write_text(f"caption {i}")
    return path


# ---- a whole run -----------------------------------------------------------------------------------------------------


def test_rows_captions_plans_and_statistics(means: Any, tmp_path: Path) -> None:
    ui = Said()
    artifact = extract_latents(recipe(), source=ROWS, workspace=tmp_path / "runs", ui=ui)
    assert artifact.path == tmp_path / "runs" / artifact.id and artifact.verify() == [] and artifact.strays() == []
    store, samples = LatentsStore.open(artifact), scan(ROWS, Latents()).samples
    assert store.keys == [s.key for s in samples] and store.captions == [s.caption for s in samples]
    assert store.plans == [s.plan for s in samples] and store.encoder == Means().identity
    pixels = np.stack([square(sample.load().rgb, 32) for sample in samples])
    expected = Means().encode(pixels).half().numpy()
    assert np.array_equal(store.latents(range(90)), expected)
    assert np.allclose(store.mean_C, expected.astype(np.float64).mean((0, 1)), rtol=1e-6)
    assert ui.lines[0] == f"source: {ROWS}" and "seen 90, readable 90, captioned 90, used 90" in ui.lines[-3]
    assert "images/s" in ui.lines[-1] and "mean norm of a token" in ui.lines[-2]
    assert artifact.info["recipe"]["images"]["input_size"] == 32 and artifact.info["funnel"]["used"] == 90
    assert artifact.info["statistics"]["mean"] == [min(store.attributes["mean"]), max(store.attributes["mean"])]


def test_without_a_source_the_built_in_world_is_used(means: Any, tmp_path: Path) -> None:
    ui = Said()
    small = recipe().model_copy(update={"shapes": Shapes(rows=5, seed=2)})
    artifact = extract_latents(small, workspace=tmp_path, ui=ui)
    assert "shapes:5:2 (none given: the built-in world)" in ui.lines[0] and LatentsStore.open(artifact).rows == 5


def test_the_same_command_again_does_nothing(means: Any, tmp_path: Path) -> None:
    first = run(tmp_path / "a")
    means(Means(lambda call: pytest.fail("encoded again")))
    assert run(tmp_path / "a").manifest == first.manifest


def test_a_dry_run_touches_nothing(means: Any, tmp_path: Path) -> None:
    plan = extract_latents(recipe(), source=ROWS, workspace=tmp_path / "runs", dry_run=True)
    assert plan["disk_needed"] == 90 * 4 * 8 * 2 and plan["shards"] == 6 and plan["used"] == 90
    assert list(tmp_path.iterdir()) == []


def test_batch_size_and_time_are_not_part_of_the_identity(means: Any, tmp_path: Path) -> None:
    artifact = run(tmp_path / "a")
    assert run(tmp_path / "a", batch_size=4, max_bad=0.5, bad_image="skip").id == artifact.id


def test_another_setup_into_the_same_place_names_what_differs(means: Any, tmp_path: Path) -> None:
    run(tmp_path / "a")
    means(Means(weights="b" * 64))
    message = refused("BF-STORE-003", 5, tmp_path / "a", background="black")
    assert "encoder.weights: aaa" in message and "preprocessing.background: white -> black" in message
    assert "rows: 90 -> 5" in refused("BF-STORE-003", 5, tmp_path / "a", "shapes:5:3")


def test_other_images_or_captions_into_the_same_place_are_counted(means: Any, tmp_path: Path) -> None:
    source, store = folder_of(tmp_path / "in", 20), tmp_path / "a"
    run(store, source)
    folder_of(source, 21)
    told = refused("BF-STORE-003", 5, store, source)
    assert "finished latents of other images or captions" in told
    assert "at:  rows: 20 -> 21; samples: 1 image added, no caption changed\n" in told
    (source / "20.png").unlink()
    for name in ("03", "04"):
        (source / f"{name}.txt").write_text("mended")
    assert "at:  samples: 2 captions changed\n" in refused("BF-STORE-003", 5, store, source)
    (source / "05.png").write_bytes((source / "06.png").read_bytes())
    (source / "07.png").unlink()
    told = refused("BF-STORE-003", 5, store, source, background="black")
    assert "samples: 1 image removed, 1 image changed, 2 captions changed" in told and "different setup" in told
    assert "preprocessing.background: white -> black" in told
    next((store / "index").glob("*.jsonl")).write_bytes(b"damaged")
    assert "-> 19; samples: " in refused("BF-STORE-003", 5, store, source)


def test_of_an_unfinished_store_the_rows_that_it_has_are_compared(means: Any, tmp_path: Path) -> None:
    source, store = folder_of(tmp_path / "in", 40), tmp_path / "a"
    means(Means(lambda call: os.kill(os.getpid(), signal.SIGTERM) if call == 1 else None))
    with pytest.raises(Stopped):
        run(store, source)
    means(Means())
    folder_of(source, 41)
    (source / "02.txt").write_text("mended")
    told = refused("BF-STORE-003", 5, store, source)
    assert "samples: 1 caption changed of the 16 rows written so far" in told and "unfinished latents of other" in told


@pytest.mark.parametrize("form", ["{}", "{}/list-*.csv", "{}/list-{{0..1}}.csv"])
def test_a_relative_source_is_found_from_elsewhere(means: Any, tmp_path: Path, monkeypatch: Any, form: str) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    source = form.format("photos")
    folder_of(home / "photos", 4)
    folder_of(elsewhere / "photos", 3)  # of that name, and not meant
    for number in range(2):
        lines = "".join(f"{i:02d}.png,caption {i}\n" for i in range(2 * number, 2 * number + 2))
        (home / "photos" / f"list-{number}.csv").write_text("file_name,caption\n" + lines)
    monkeypatch.chdir(home)
    store = run(Path("runs") / "lat", source)
    assert store.info["source"] == source and str(tmp_path) not in json.dumps(store.manifest["info"])
    identity = store.id
    monkeypatch.chdir(elsewhere)
    assert len(images_of_store(Artifact.open(home / "runs" / "lat")).entries) == 4
    home.rename(tmp_path / "moved")  # both together
    found = Artifact.open(tmp_path / "moved" / "runs" / "lat")
    assert len(images_of_store(found).entries) == 4 and found.id == identity
    monkeypatch.chdir(tmp_path / "moved")
    (found.path).rename(tmp_path / "alone")  # the store alone: as typed, from here
    assert len(images_of_store(Artifact.open(tmp_path / "alone")).entries) == 4
    (tmp_path / "moved" / "photos" / "00.txt").write_text("mended")
    (tmp_path / "moved" / "photos" / "list-0.csv").write_text("file_name,caption\n00.png,mended\n01.png,caption 1\n")
    with pytest.raises(BifrostError, match="1 caption changed"):
        images_of_store(Artifact.open(tmp_path / "alone"))


def test_relative_class_names_are_found_from_elsewhere(means: Any, tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("n01", "n02"):
        folder_of(tmp_path / "home" / "photos" / name, 2)
    (tmp_path / "home" / "names.txt").write_text("n01 tench\nn02 goldfish\n")
    monkeypatch.chdir(tmp_path / "home")
    run(Path("lat"), "photos", captions="folders", class_names="names.txt")
    monkeypatch.chdir(tmp_path)
    prompts = [entry.prompt for entry in images_of_store(Artifact.open(Path("home") / "lat")).entries]
    assert prompts == ["tench", "tench", "goldfish", "goldfish"]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bytes], None]:
    """https:// in memory, whose every address may be asked for with a user, a password and a query."""

    class Https(MemoryFileSystem):
        protocol, store, pseudo_dirs = ("https",), {}, [""]

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.rpartition("://")[2].partition("?")[0].rpartition("@")[2].lstrip("/")

    monkeypatch.setitem(_registry, "https", Https)
    return lambda name, data: Https().pipe(f"/host/{name}", data)


def test_a_signed_address_is_not_kept(means: Any, served: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    lines = ["file_name,caption"]
    for path in sorted(folder_of(tmp_path / "in", 4).glob("*.png")):
        served(f"b/{path.name}", path.read_bytes())
        lines.append(f"{path.name},a caption of https://host/page?which=5")
    lines.append("https://bob:SECRET@host/b/00.png?key=SECRET.1,another")
    served("b/list.csv", "\n".join(lines).encode())
    source = "https://alice:SECRET@host/b/list.csv?X-Amz-Signature=SECRET"
    flags = [f"--set=latents.{name}={json.dumps(value)}" for name, value in RULES.items()]
    command = ["extract-latents", source, *flags, "--set=latents.allow_outside=true", "--set=images.input_size=32"]
    monkeypatch.setattr(sys, "argv", ["bifrost", *command])
    monkeypatch.chdir(tmp_path)
    assert command_line([*command, "-o", "store"]) == 0
    store = Artifact.open(tmp_path / "store")
    assert store.info["source"] == "https://***@host/b/list.csv?***" and "***@host" in store.manifest["made"]["command"]
    index = LatentsStore.open(store)
    assert index.captions.count("a caption of https://host/page?which=5") == 4, "a caption is no address"
    assert len(set(index.keys)) == 5
    with pytest.raises(BifrostError, match="a store keeps neither"):
        images_of_store(store)
    assert command_line(["report", "store", "-o", "page.html"]) == 0
    assert command_line(["artifacts", "show", "store"]) == 0

    served("b/01.png", b"no image")  # findings, problems that are kept, and errors
    assert command_line(["data", "check", source, "--set=latents.allow_outside=true"]) == 8
    assert command_line(["data", "check", source, "--set=latents.allow_outside=true", "--json"]) == 8
    assert command_line([*command, "-o", "other"]) == 4
    assert command_line([*command, "-o", "other", "--json", "--debug"]) == 4
    assert command_line([*command, "-o", "skipped", "--bad-image", "skip", "--max-bad", "0.5"]) == 0
    assert command_line(["extract-latents", source.replace("list", "none"), "-o", "other"]) == 4
    out, err = capsys.readouterr()
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and b"SECRET" in path.read_bytes()]
    assert "SECRET" not in out + err and kept == [] and "https://***@host/b/list.csv?***" in err


def test_a_page_of_an_older_store_shows_no_secret(means: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    told = "bifrost extract-latents 'https://alice:SECRET@host/b.csv?key=SECRET'"
    monkeypatch.setattr(
        "bifrost_cli.artifacts.draft.provenance", lambda **more: {**provenance(**more), "command": told}
    )
    one, other = run(tmp_path / "a", "shapes:4:1"), run(tmp_path / "b", "shapes:4:2")
    assert "SECRET" in one.manifest["made"]["command"]
    monkeypatch.chdir(tmp_path)
    assert command_line(["report", "a", "-o", "a.html"]) == command_line(["report", "a", "b", "-o", "ab.html"]) == 0
    assert command_line(["artifacts", "show", "a"]) == command_line(["artifacts", "show", "b", "--json"]) == 0
    pages = (tmp_path / "a.html").read_text() + (tmp_path / "ab.html").read_text() + capsys.readouterr().out
    assert "SECRET" not in pages and pages.count("https://***@host/b.csv?***") == 2 and other.id != one.id


def test_an_encoder_that_gives_nan_is_refused(means: Any, tmp_path: Path) -> None:
    encoder = Means()
    real = encoder.encode
    encoder.encode = lambda pixels: real(pixels) * (float("nan") if encoder._calls == 4 else 1)  # type: ignore[method-assign]
    means(encoder)
    assert "00000024 are not finite" in refused("BF-DATA-003", 4, tmp_path / "a")


# ---- real encoders on photographs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three dozen JPEGs of 1600x1200, every fourth one turned by EXIF, with captions beside them."""
    folder = tmp_path_factory.mktemp("photographs")
    for i in range(36):
        small = np.random.default_rng(i).integers(0, 255, (9, 12, 3), np.uint8)
        image = Image.fromarray(small).resize((1600, 1200), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        if i % 4 == 0:
            exif[0x0112] = (6, 8, 3, 2)[i // 4 % 4]
        image.save(folder / f"IMG_{i:04d}.JPG", "JPEG", quality=88, exif=exif)
        (folder / f"IMG_{i:04d}.txt").write_text(f"a texture with number {i}\r\n")
    return folder


def test_photographs_go_through_the_real_encoders(photographs: Path, tmp_path: Path) -> None:
    system = save_system(tmp_path / "system")
    latents = Latents(shard_rows=16, chunk_rows=8, batch_size=8)
    wanted = system.recipe.model_copy(update={"latents": latents})
    ui = Said()
    artifact = extract_latents(wanted, source=photographs, output=tmp_path / "a", ui=ui)
    store = LatentsStore.open(artifact)
    assert store.rows == 36 and store.captions[7] == "a texture with number 7" and store.keys[7] == "IMG_0007"
    assert any("exif-rotated 9" in line for line in ui.lines)
    encoder = ModelLoader(wanted.models).encoder(wanted.latents, wanted.images)
    cpu = torch.device("cpu")
    assert store.encoder == encoder.identity and store.grid == (4, 4)
    files = sorted(photographs.glob("*.JPG"))[:8]
    pixels = np.stack([square(np.asarray(ImageOps.exif_transpose(Image.open(file))), 64) for file in files])
    np.testing.assert_allclose(store.latents(range(8)), encoder.encode(pixels).numpy(), rtol=2e-3, atol=2e-3)
    vae = load_vae(wanted.models.diffusion, cpu)
    from bifrost_cli.models.encoders import VaeEncoder

    np.testing.assert_allclose(store.vae(range(8)), VaeEncoder(vae, 64).encode(pixels).numpy(), rtol=2e-3, atol=2e-3)
    assert store.attributes["painter"] == VaeEncoder(vae, 64).identity
    assert store.lines[0]["size"] == [1200, 1600] and store.lines[0]["notes"] == ["exif-rotated"]


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_bad_images_stop_before_anything_is_written(means: Any, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "source")
    for i in range(7):
        (source / f"{i:02d}.png").write_bytes(b"")
    with pytest.raises(BifrostError) as caught:
        extract_latents(recipe(), source=source, workspace=tmp_path / "runs")
    assert caught.value.code == "BF-DATA-003" and "and 2 more" in str(caught.value)
    problems = tmp_path / "runs" / "extract-latents-problems.jsonl"
    assert str(problems) in str(caught.value) and len(problems.read_text().splitlines()) == 7
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [problems.name]


def test_skipped_samples_are_counted_and_listed(means: Any, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "source")
    (source / "03.png").write_bytes(b"<!DOCTYPE html>")
    (source / "05.txt").unlink()
    artifact = run(tmp_path / "a", source, bad_image="skip", max_bad=0.1, missing_caption="skip")
    assert artifact.info["funnel"] == {"seen": 20, "readable": 19, "captioned": 18, "used": 18}
    events = [json.loads(line) for line in (tmp_path / "a" / "work" / "events.jsonl").read_text().splitlines()]
    assert sorted(event["event"] for event in events) == ["bad-image", "missing-caption"]
    assert "03" not in LatentsStore.open(artifact).keys


def test_no_images_and_no_captions_make_no_store(means: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused("BF-DATA-001", 4, tmp_path / "a", tmp_path / "empty")
    source = folder_of(tmp_path / "source", 3)
    for path in source.glob("*.txt"):
        path.unlink()
    refused("BF-DATA-002", 4, tmp_path / "a", source)
    assert not (tmp_path / "a").exists()


def test_the_output_is_neither_a_link_nor_inside_the_source(means: Any, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "source", 3)
    assert "inside the source" in refused("BF-USE-001", 2, source / "out", source)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert "is a link" in refused("BF-USE-002", 2, tmp_path / "link", source)
    assert "inside the source" in refused("BF-USE-001", 2, tmp_path / "source" / ".." / "source", source)
    before = sorted(path.name for path in source.iterdir())
    run(tmp_path / "a", source)
    assert sorted(path.name for path in source.iterdir()) == before


def test_foreign_files_in_the_output_are_left_alone(means: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("x")
    assert "thesis.tex" in refused("BF-USE-002", 2, tmp_path / "a")


@pytest.mark.parametrize("harm", ["changed", "removed"])
def test_an_image_that_changes_during_the_run_is_no_row(means: Any, tmp_path: Path, harm: str) -> None:
    source = folder_of(tmp_path / "source", 40)
    victim = source / "37.png"
    original = victim.read_bytes()

    def hurt(call: int) -> None:
        victim.unlink(missing_ok=True) if harm == "removed" else victim.write_bytes(original + b"x")

    means(Means(hurt))
    assert "37: " in refused("BF-DATA-003", 4, tmp_path / "a", source)
    victim.write_bytes(original)
    means(Means(hurt))
    ui = Said()
    skipping = recipe(bad_image="skip", max_bad=0.1)
    store = LatentsStore.open(extract_latents(skipping, source=source, output=tmp_path / "skipped", ui=ui))
    assert store.rows == 39 and "37" not in store.keys and store.keys[37] == "38"
    assert any("failed: 1 images" in line for line in ui.lines) and np.isfinite(store.latents(range(39))).all()
    victim.write_bytes(original)
    means(Means(hurt))
    assert "more than max_bad" in refused("BF-DATA-004", 4, tmp_path / "b", source, bad_image="skip", max_bad=0.0)


# ---- stopped and killed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_between_shards_and_the_command_continues(
    means: Any, undisturbed: dict[str, Any], tmp_path: Path, number: int
) -> None:
    means(Means(lambda call: os.kill(os.getpid(), number) if call == 5 else None))
    with pytest.raises(Stopped) as caught:
        run(tmp_path / "a")
    assert caught.value.exit_code == 75 and "3 of 6 are written" in str(caught.value)
    calls: list[int] = []
    means(Means(calls.append))
    assert run(tmp_path / "a").files == undisturbed and len(calls) == 12 - 6
    assert payload(tmp_path / "a") == payload(tmp_path / "undisturbed")


def test_a_second_signal_stops_at_once(means: Any, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    means(Means(lambda call: os.kill(os.getpid(), signal.SIGTERM) if call >= 4 else None))
    with pytest.raises(Interrupted) as caught:
        run(tmp_path / "a")
    assert caught.value.exit_code == 130
    means(Means())
    assert run(tmp_path / "a").files == undisturbed


def test_a_crash_inside_the_encoder_keeps_finished_shards(
    means: Any, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    def crash(call: int) -> None:
        if call == 7:
            raise Diverged("the encoder broke")

    means(Means(crash))
    with pytest.raises(Diverged):
        run(tmp_path / "a")
    calls: list[int] = []
    means(Means(calls.append))
    assert run(tmp_path / "a").files == undisturbed and len(calls) == 12 - 6


def in_child(work: Callable[[], object]) -> multiprocessing.Process:
    """Run `work` in a forked process (no second import of torch); its exit status is that of the command."""

    def body() -> None:
        with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink):
            try:
                work()
                status = 0
            except BifrostError as error:
                status = error.exit_code
        os._exit(status)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    return process


def slow(seconds: float = 0.004) -> Means:
    return Means(lambda call: time.sleep(seconds))


@pytest.mark.crash
def test_kill_9_at_random_moments_ends_in_the_same_bytes(
    means: Any, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    means(slow(0.02))
    began = time.monotonic()
    in_child(lambda: run(tmp_path / "timed")).join()
    whole = time.monotonic() - began
    moments, killed = random.Random(0), 0
    for trial in range(15):
        if killed >= 10:
            break
        output = tmp_path / f"killed{trial}"
        for _ in range(2):
            process = in_child(lambda output=output: run(output))
            time.sleep(moments.uniform(0.02, 0.6) * whole)
            process.kill()
            process.join()
            killed += process.exitcode == -signal.SIGKILL
        assert run(output).files == undisturbed
        assert payload(output) == payload(tmp_path / "undisturbed") and Artifact.open(output).strays() == []
    assert killed >= 10, "the kills came too late to count"


@pytest.mark.crash
def test_death_at_any_call_to_the_disk_ends_in_the_same_bytes(
    means: Any, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """The process dies at its n-th fsync, rename, link or unlink; n runs over the whole extraction."""
    calls = multiprocessing.get_context("fork").Value("i", 0)
    in_child(lambda: (dying(10**9, calls), run(tmp_path / "counted"))).join()
    total = calls.value
    assert total > 60
    for n in [*range(1, 9), *range(9, total, total // 9), total - 1, total]:
        calls.value, output = 0, tmp_path / f"died{n}"
        process = in_child(lambda n=n, output=output: (dying(n, calls), run(output)))
        process.join()
        assert process.exitcode == 99, f"call {n} of {total}"
        assert run(output).files == undisturbed and payload(output) == payload(tmp_path / "undisturbed")


def dying(at: int, calls: Any) -> None:
    """From now on this process ends without a word at the `at`-th call that changes the disk."""
    for name in ("fsync", "replace", "rename", "unlink"):
        setattr(os, name, _counted(getattr(os, name), at, calls))


def _counted(real: Callable[..., Any], at: int, calls: Any) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        with calls.get_lock():
            calls.value += 1
            last = calls.value == at
        if last:
            os._exit(99)
        return real(*arguments, **options)

    return call


def test_a_second_extraction_into_the_same_store_names_the_first(means: Any, tmp_path: Path) -> None:
    means(slow(0.2))
    process = in_child(lambda: run(tmp_path / "a"))
    try:
        while not (tmp_path / "a" / "draft.json").exists():
            time.sleep(0.02)
        message = refused("BF-ART-006", 5, tmp_path / "a")
        assert f"locked by pid {process.pid} on " in message and " since " in message
    finally:
        process.kill()
        process.join()


# ---- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of one megabyte; where mounting is not allowed the test is skipped and says so."""
    place, libc = tmp_path / "disk", ctypes.CDLL(None, use_errno=True)
    place.mkdir()
    if libc.mount(b"tmpfs", str(place).encode(), b"tmpfs", 0, b"size=1m") != 0:
        pytest.skip(f"mounting a tmpfs: {os.strerror(ctypes.get_errno())}")
    yield place
    libc.umount2(str(place).encode(), 2)


def test_a_full_disk_stops_with_3_and_freeing_it_continues(
    means: Any, undisturbed: dict[str, Any], small_disk: Path
) -> None:
    filler = small_disk / "filler"

    def fill(call: int) -> None:
        if call == 6:
            with contextlib.suppress(OSError), open(filler, "wb") as stream:
                for _ in range(2048):
                    stream.write(b"x" * 1024)
                    stream.flush()

    means(Means(fill))
    message = refused("BF-ENV-010", 3, small_disk / "a")
    assert "no room" in message and "free" in message and not (small_disk / "a" / "manifest.json").exists()
    filler.unlink()
    calls: list[int] = []
    means(Means(calls.append))
    assert run(small_disk / "a").files == undisturbed and len(calls) == 12 - 6


def test_a_disk_too_small_from_the_start_is_refused_before_encoding(
    means: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    means(Means(lambda call: pytest.fail("encoded")))
    monkeypatch.setattr(extract, "_free", lambda path: 5000)
    message = refused("BF-ENV-010", 3, tmp_path / "a")
    assert "need 5,760 bytes, free 5,000" in message


def test_a_limit_on_file_size_stops_with_3(means: Any, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """The quota of those who may not mount: no file above 600 bytes."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
        run(tmp_path / "a")

    process = in_child(limited)
    process.join()
    assert process.exitcode == 3
    assert run(tmp_path / "a").files == undisturbed


# ---- other sources, other stores -------------------------------------------------------------------------------------


def written_as(kind: str, path: Path, count: int = 20, changed: bool = False) -> str:
    """The images of `folder_of` as another kind of source; `changed` gives the last one another caption."""
    import io
    import tarfile

    folder = folder_of(path / "pictures", count)
    captions = [f"caption {i}" for i in range(count - 1)] + ["other" if changed else f"caption {count - 1}"]
    images = {f"{i:02d}": (folder / f"{i:02d}.png").read_bytes() for i in range(count)}
    if kind == "csv":
        lines = [f"pictures/{name}.png,{caption}\n" for name, caption in zip(images, captions, strict=True)]
        (path / "list.csv").write_text("image,text\n" + "".join(lines))
        return str(path / "list.csv")
    if kind == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = pa.table({"image": list(images.values()), "text": captions})
        pq.write_table(table, path / "a.parquet", row_group_size=7)
        return str(path / "a.parquet")
    with tarfile.open(path / "a.tar", "w") as tar:
        for (name, data), caption in zip(images.items(), captions, strict=True):
            for extension, content in (("png", data), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{name}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(path / "a.tar")


@pytest.mark.parametrize("kind", ["csv", "parquet", "tar"])
def test_every_source_gives_the_same_rows_and_a_changed_one_is_no_continuation(
    means: Any, tmp_path: Path, kind: str
) -> None:
    source = written_as(kind, tmp_path)
    folder = LatentsStore.open(run(tmp_path / "folder", tmp_path / "pictures"))
    means(Means(lambda call: os.kill(os.getpid(), signal.SIGTERM) if call == 1 else None))
    with pytest.raises(Stopped):
        run(tmp_path / "a", source)
    means(Means())
    written_as(kind, tmp_path, changed=True)
    assert "samples: " in refused("BF-STORE-003", 5, tmp_path / "a", source)
    written_as(kind, tmp_path, count=19)
    assert "rows: 20 -> 19" in refused("BF-STORE-003", 5, tmp_path / "a", source)
    written_as(kind, tmp_path)
    calls: list[int] = []
    means(Means(calls.append))
    store = LatentsStore.open(run(tmp_path / "a", source))
    assert len(calls) == 1, "the first shard was kept"
    assert store.captions == folder.captions
    assert [line["image"] for line in store.lines] == [line["image"] for line in folder.lines]
    assert np.array_equal(store.latents(range(20)), folder.latents(range(20)))


def test_an_archive_that_is_damaged_while_it_is_read_loses_nothing(means: Any, tmp_path: Path) -> None:
    source = written_as("tar", tmp_path)
    whole = Path(source).read_bytes()
    means(Means(lambda call: Path(source).write_bytes(whole[:2048]) if call == 1 else None))
    assert "changed during the run" in refused("BF-DATA-003", 4, tmp_path / "a", source)
    assert "is damaged" in refused("BF-DATA-005", 4, tmp_path / "a", source)
    Path(source).write_bytes(whole)
    calls: list[int] = []
    means(Means(calls.append))
    assert LatentsStore.open(run(tmp_path / "a", source)).rows == 20 and len(calls) == 1


@pytest.mark.crash
def test_flipped_rows_in_8_bits_survive_kills(means: Any, tmp_path: Path) -> None:
    source, rules = folder_of(tmp_path / "source", 40), {"flip": True, "storage": "int8"}
    whole = run(tmp_path / "whole", source, **rules)
    store, plain = LatentsStore.open(whole), LatentsStore.open(run(tmp_path / "plain", source))
    assert store.rows == 80 and store.keys[:3] == ["00", "00#flip", "01"] and whole.info["funnel"]["flipped"] == 40
    own, mirrored = store.latents(range(0, 80, 2)), store.latents(range(1, 80, 2))
    assert np.allclose(own, plain.latents(range(40)), rtol=0.02)
    assert np.allclose(mirrored, own[:, [1, 0, 3, 2]], rtol=0.04), "patches change places"
    means(slow(0.02))
    for trial in range(4):
        process = in_child(lambda: run(tmp_path / "killed", source, **rules))
        time.sleep(0.1 * (trial + 1))
        process.kill()
        process.join()
    assert run(tmp_path / "killed", source, **rules).files == whole.files


def test_8_bits_are_another_artifact_of_half_the_size(means: Any, tmp_path: Path) -> None:
    plans = [extract_latents(recipe(storage=kind), source=ROWS, workspace=tmp_path, dry_run=True)
             for kind in ("float16", "int8")]  # fmt: skip
    assert plans[0]["output"] != plans[1]["output"]
    run(tmp_path / "a")
    assert "storage: (none) -> int8" in refused("BF-STORE-003", 5, tmp_path / "a", storage="int8")


def test_the_built_in_latents_in_8_bits_keep_their_direction(tmp_path: Path) -> None:
    stores = []
    for kind in ("float16", "int8"):
        wanted = load_recipe("tiny", [f"latents.storage={kind}", "latents.vae=false"])
        stores.append(LatentsStore.open(extract_latents(wanted, source="shapes:32", output=tmp_path / kind)))
    a, b = (store.latents(range(32)).astype(np.float64) for store in stores)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert cosine.min() > 0.9999 and np.allclose(stores[0].std_C, stores[1].std_C, rtol=0.01)


def test_a_caption_of_300_words_is_kept_whole(means: Any, tmp_path: Path) -> None:
    caption = " ".join(f"word{i}" for i in range(300))
    source = folder_of(tmp_path / "source", 3)
    (source / "01.txt").write_text(caption)
    assert LatentsStore.open(run(tmp_path / "a", source)).captions[1] == caption
