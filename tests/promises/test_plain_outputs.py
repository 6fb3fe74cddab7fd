"""What is written and is no artifact (drawn folders, single images with their latents, exports, pages): whole or absent
after an error at any call to the disk and after a power cut, and the same command ends in the same bytes."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from faults import KINDS, FailsAt, Recorder, Watched, disk
from fixtures_stage_training import recipe
from fixtures_store import make_store
from fixtures_targets import ON_SHIPPED_MODELS, Noise, _part, inputs
from harness import WAYS, fresh

from bifrost_cli.artifacts import Artifact, files
from bifrost_cli.artifacts.files import TEMP_PREFIX, sha256_file
from bifrost_cli.cli.app import explain
from bifrost_cli.errors import BifrostError
from bifrost_cli.generation import generate, pipeline
from bifrost_cli.interop.export import export
from bifrost_cli.reports.report import report
from bifrost_cli.toy_system.render import render_shapes


def draw(folder: Path) -> None:
    render_shapes(folder / "drawn", n=3)


def one_image(folder: Path) -> None:
    pair = [_part(folder, kind) for kind in ("branch", "controlnet")]
    with mock.patch.object(pipeline, "BifrostPipeline", lambda *rest, **more: Noise(lambda: None, False)):
        generate.generate(ON_SHIPPED_MODELS, "a red circle", output=folder / "out.png", branch=pair[0],
                          controlnet=pair[1], save_latents=True)  # fmt: skip


def exported(folder: Path) -> None:
    export("builtin:branch", output=folder / "exported")


def page(folder: Path) -> None:
    path = inputs(folder) / "store"
    store = Artifact.open(path) if path.exists() else make_store(
        path, info={"recipe": recipe().model_dump(mode="json")}
    )  # fmt: skip
    report(store.path, output=folder / "page.html")


COMMANDS = {"shapes render": draw, "generate to a file": one_image, "export": exported, "report": page}


@pytest.fixture(params=COMMANDS)
def command(request, monkeypatch) -> Callable[[Path], None]:
    monkeypatch.setattr(files, "_UNLOCKED", -1)  # no harness waits until a leftover is old
    return COMMANDS[request.param]


def there(folder: Path) -> dict[str, str]:
    """Digest by name of all that has its final name."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path): sha256_file(folder / path) for path in found if TEMP_PREFIX not in str(path)}


def again(command: Callable[[Path], None], folder: Path, wanted: dict[str, str], when: str) -> None:
    """What has its final name is whole; the same command makes the rest, or says that all is there."""
    left = there(folder)
    assert left.items() <= wanted.items(), when
    with disk(Watched()):
        try:
            command(folder)
        except BifrostError as error:
            assert left == wanted and error.code == "BF-USE-002", f"{when}: {error}"
    assert there(folder) == wanted, when
    if left != wanted:
        assert not list(folder.rglob(f"{TEMP_PREFIX}*")), f"{when}: a leftover"


def harm_every_call(command: Callable[[Path], None], place: Path, step: int) -> int:
    command(fresh(place / "it"))
    wanted, harms = there(place / "it"), 0
    for kind in KINDS:
        code, number = errno.ENOSPC if kind in ("open", "write", "mkdir") else errno.EIO, 1
        while True:
            folder, hook, told = fresh(place / "it"), FailsAt(kind, number, code), None
            with disk(Watched(hook)):
                try:
                    command(folder)
                except BaseException as error:  # noqa: BLE001 what the command line would say of it
                    told = explain(error)
            if not hook.failed:
                break
            # a leftover that cannot be removed is no failure of what was written
            assert told is None or told.exit_code == 3, f"{kind} {number}: {told}"
            assert told is not None or there(folder) == wanted
            again(command, folder, wanted, f"{kind} {number}")
            harms, number = harms + 1, number + step
    return harms


def cut_the_power(command: Callable[[Path], None], place: Path, step: int) -> int:
    command(fresh(place / "it"))
    wanted, recorder, cuts = there(place / "it"), Recorder(fresh(place / "it")), 0
    with disk(recorder):
        command(place / "it")
    for after in range(0, len(recorder) + 1, step):
        for how in WAYS:
            recorder.cut(after, how, seed=after)
            again(command, place / "it", wanted, f"power cut after {after} of {len(recorder)} changes ({how})")
            cuts += 1
    return cuts


def test_an_error_at_a_call_leaves_nothing_half(command, tmp_path):
    assert harm_every_call(command, tmp_path, step=4) > 3


def test_a_power_cut_leaves_nothing_half(command, tmp_path):
    assert cut_the_power(command, tmp_path, step=9) > 3


@pytest.mark.crash
def test_every_error_and_every_power_cut(command, tmp_path):
    assert (
        harm_every_call(command, tmp_path / "errors", step=1) + cut_the_power(command, tmp_path / "cuts", step=1) > 30
    )
