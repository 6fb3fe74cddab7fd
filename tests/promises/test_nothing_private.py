"""Nothing private leaves with what is given away: PNGs, exported folders, pages; and `show --private` finds it all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from fixtures_stage_training import recipe
from fixtures_store import make_store
from PIL import Image

from bifrost_cli.artifacts import Artifact
from bifrost_cli.cli.app import run
from bifrost_cli.data.png import WRITTEN, image_bytes
from bifrost_cli.data.safetensors_io import save_tensors
from bifrost_cli.generation.requests import ImageRequest, generate_settings, png_facts
from bifrost_cli.interop.export import export
from bifrost_cli.interop.privacy import private_facts, shared_command, without_places
from bifrost_cli.reports.page import Page
from bifrost_cli.reports.report import report

MARK = "annmarker"  # in every name of this machine: user, host, folders


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """A folder in whose path, user and host the mark stands; the command that makes things there names them."""
    home = tmp_path / MARK
    desk = home / f"client-{MARK}"
    desk.mkdir(parents=True)
    for name in ("HOME", "USER", "LOGNAME"):
        monkeypatch.setenv(name, str(home) if name == "HOME" else MARK)
    monkeypatch.setattr("socket.gethostname", lambda: f"host-{MARK}.lan")
    command = ["bifrost", "extract-latents", str(desk / "photos"), "-o", f"../{MARK}/lat", "--set",
               f"models.mllm={desk}/mllm", f"https://u:{MARK}@h/list.csv?token={MARK}"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.chdir(desk)
    return desk


def told(path: Path) -> set[str]:
    return {fact.kind for fact in private_facts(path)}


def test_a_page_names_no_place_of_the_machine(machine):
    store = make_store(machine / "lat", info={"recipe": recipe().model_dump(mode="json")})
    assert MARK in json.dumps(Artifact.open(store.path).manifest)  # at home the command stays as it was typed
    page = report(store.path, output=machine / "page.html").read_text()
    assert MARK not in page and "bifrost extract-latents ... -o ..." in page
    assert not told(machine / "page.html") & {"path", "user", "host", "secret", "command"}


def test_a_page_of_a_measured_folder_names_neither_it_nor_the_reference(machine):
    command = f"bifrost eval --fid --samples {machine}/mine --reference {MARK} --workspace runs"
    page = Page(f"Evaluation of folder {machine}/mine", f"24 images to folder {MARK}; 3 runs",
                notes=[f"Left out of {MARK}: folders not entered 1."], commands={"The same again": [command]},
                folded={"Settings": {"samples": f"folder {machine}/mine", "file": f"/srv/{MARK}/x.npz"}})  # fmt: skip
    html = page.html()
    assert MARK not in html and "Evaluation of a folder" in html and "24 images to a folder; 3 runs" in html


def test_an_image_and_an_export_carry_ids_and_public_names_alone(machine):
    parents = [Artifact.open(make_store(machine / "lat").path)]
    facts = png_facts(ImageRequest(0, "a red circle", 0), generate_settings(recipe()), parents, "a plan")
    for suffix in WRITTEN:
        file = machine / f"out{suffix}"
        file.write_bytes(image_bytes(np.zeros((8, 8, 3), np.uint8), facts, suffix=suffix))
        assert told(file) == {"prompt"} and MARK.encode() not in file.read_bytes()
        prompts = {fact.value for fact in private_facts(file)}
        assert prompts == {"a red circle", "a plan"}
    folder = export("builtin:branch", output=machine / "exported")
    assert told(folder) == set()
    assert not any(MARK.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_show_private_finds_every_kind_where_it_lies(machine, capsys):
    folder = machine / "given"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x013B], exif[0x010F] = "Ann Marker", "Camera Works"
    exif.get_ifd(0x8825)[1] = "N"
    Image.new("RGB", (8, 8)).save(folder / "photo.jpg", exif=exif)
    (folder / "lines.jsonl").write_text('{"caption": "a secret garden"}\nnot json, sent to ann@example.org\n')
    (folder / "notes").write_text(f"see C:\\Users\\{MARK}\\x and /srv/data/photos, on host-{MARK}; hf_{'a' * 30}\n")
    save_tensors(folder / "model.safetensors", {"a": np.zeros(2, np.float32)}, {"from": f"/home/{MARK}/model"})
    (folder / "blob.bin").write_bytes(b"/not/looked/into")
    found = {(fact.file, fact.kind) for fact in private_facts(folder)}
    assert found >= {("photo.jpg", "user"), ("photo.jpg", "camera"), ("photo.jpg", "place"), ("lines.jsonl", "prompt"),
                     ("lines.jsonl", "mail"), ("notes", "path"), ("notes", "host"), ("notes", "secret"),
                     ("model.safetensors", "path"), ("model.safetensors", "user")}  # fmt: skip
    assert not any(file == "blob.bin" for file, _ in found)
    assert run(["show", "--private", str(folder), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["private"]) == len(private_facts(folder))
    assert run(["show", "--private", str(machine / "none")]) == 2


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("x.py generate 'a /red/ circle' -n 2 --branch /x/y -q --seed -1", "bifrost generate 'a /red/ circle' -n 2 "
         "--branch ... -q --seed -1"),
        ("bifrost train branch --latents latents-0123456789ab -o b --recipe tiny --resume=auto --set branch.codes=4",
         "bifrost train branch --latents latents-0123456789ab -o ... --recipe tiny --resume=auto --set branch.codes=4"),
        ("bifrost extract-latents photos --set models.diffusion=black-forest-labs/FLUX.1-dev --set models.mllm=/a/b",
         "bifrost extract-latents ... --set models.diffusion=black-forest-labs/FLUX.1-dev --set models.mllm=b"),
        ("bifrost extract-latents shapes:40 --recipe=my.yaml", "bifrost extract-latents shapes:40 --recipe=..."),
        ("bifrost ask photo.png 'what is", "..."),
        ("", ""),
    ],
)  # fmt: skip
def test_a_shown_command_hides_places_and_keeps_the_rest(typed, shown):
    assert shared_command(typed) == shown


def test_what_is_no_path_stays():
    text = "1/2 of the images, and/or https://a.example/b/c </td> sha256:a/b 24 runs"
    assert without_places(text, ["bifrost eval --workspace runs"]) == text
