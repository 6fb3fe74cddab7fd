"""No code runs from data: whatever an input carries, the canary it would make is not made.

Each command runs where a relative `mkdir canary` or `touch canary` would land in the test's own folder.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_flux import save_system
from fixtures_stage_training import save_mllm
from fixtures_targets import Means, Noise
from refusals import SMALL, refused, told
from test_webdataset import archive, image

from bifrost_cli.artifacts import Draft
from bifrost_cli.cli.app import run as main
from bifrost_cli.data.latents.reader import LatentsStore
from bifrost_cli.data.safetensors_io import save_tensors
from bifrost_cli.generation import pipeline
from bifrost_cli.loading.loaders import ModelLoader

ROOT = Path(__file__).parents[2]


class Canary:
    def __reduce__(self):
        return os.mkdir, ("canary",)


def zipped(data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        made.writestr("archive/data.pkl", data)
    return stream.getvalue()


PICKLES = {
    "protocol 0": pickle.dumps(Canary(), 0),
    "protocol 2": pickle.dumps(Canary(), 2),
    "protocol 5": pickle.dumps(Canary(), 5),
    "as torch.save makes it": zipped(pickle.dumps(Canary())),
}
SHELL = "$(touch canary);`touch canary`|touch canary"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The folder a command runs in; at the end nothing in it, or in the inputs, is called canary."""
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ModelLoader, "encoder", lambda *_, **__: Means(lambda: None))
    yield tmp_path
    assert not [path for path in tmp_path.rglob("*") if path.name == "canary"]


def test_the_canary_sings(here):
    """The pickles do make it, where something loads them; so do the words, where a shell reads them."""
    for data in list(PICKLES.values())[:3]:
        pickle.loads(data)
        (here / "canary").rmdir()
    os.system(f'echo "{SHELL}"')
    (here / "canary").unlink()


# ---- weights and arrays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", PICKLES.values(), ids=PICKLES)
@pytest.mark.parametrize("command", ["import", "mllm", "branch"])
def test_a_pickle_for_weights(here, capsys, command, data):
    folder = here / "in" / "model"
    if command == "import":
        folder.mkdir()
        arguments = ["import", folder, "-o", here / "out"]
    elif command == "mllm":
        arguments = ["export-mllm", "-o", here / "out", "--set", f"models.mllm={save_mllm(folder)}"]
    else:
        arguments = ["generate", "a red circle", "-o", here / "out.png", "--branch",
                     save_system(folder).branch.path, "--device", "cpu"]  # fmt: skip
    place = folder / "branch" if command == "branch" else folder
    (place / "model.safetensors").write_bytes(data)
    code, said = told(capsys, here / "in", *arguments)
    assert code == 5 and "error[BF-ART-00" in said and str(place) in said, f"{code}: {said}"
    assert not (here / "out").exists() and not (here / "out.png").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_a_model_of_pickles_alone(here, capsys, name):
    folder = save_mllm(here / "in" / "model")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(PICKLES["protocol 2"])
    arguments = ["export-mllm", "-o", here / "out", "--set", f"models.mllm={folder}"]
    assert "convert them" in refused(capsys, here / "in", 5, "ART-008", f"{folder} holds pickles", *arguments)


def test_an_npz_of_objects(here, capsys):
    samples = here / "in" / "samples"
    samples.mkdir()
    for value in range(8):
        (samples / f"{value}.png").write_bytes(image(value))
    objects = np.empty(1, object)
    objects[0] = Canary()
    np.savez(here / "in" / "evil.npz", mu=objects, sigma=objects)
    refused(capsys, here / "in", 5, "ART-008", "evil.npz", "eval", "--fid", "--samples", samples, "--reference",
            here / "in" / "evil.npz", "--min-samples", 4, "--device", "cpu")  # fmt: skip


# ---- a model that brings code ----------------------------------------------------------------------------------------

CODE = "import os\nos.mkdir('canary')\nclass X: pass\n"
CLASSES = {
    "config.json": {"auto_map": {"AutoConfig": "modeling_x.X", "AutoModelForImageTextToText": "modeling_x.X"}},
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["modeling_x.X", None]}, "tokenizer_class": "X"},
    "preprocessor_config.json": {"auto_map": {"AutoImageProcessor": "modeling_x.X"}, "image_processor_type": "X"},
    "processor_config.json": {"auto_map": {"AutoProcessor": "modeling_x.X"}, "processor_class": "X"},
}


@pytest.mark.parametrize("files", [list(CLASSES), *[[name] for name in CLASSES]], ids=lambda files: " ".join(files))
def test_code_beside_a_model(here, capsys, monkeypatch, files):
    """Stock classes are used where they exist; where only the model's own would do, it is refused, and nobody asked."""
    folder = save_mllm(here / "in" / "model")
    (folder / "modeling_x.py").write_text(CODE)
    for name in files:
        path = folder / name
        values = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**values, **CLASSES[name]}))
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("it asks whether to run the code"))
    code, said = told(capsys, here / "in", "export-mllm", "-o", here / "out", "--set", f"models.mllm={folder}")
    stock = files in (["config.json"], ["tokenizer_config.json"])  # the model's type says which classes to take
    assert code == (0 if stock else 3), said
    assert stock or "brings code of its own, which is never run" in said and str(folder) in said, said


def test_a_family_of_its_own(here, capsys):
    folder = save_mllm(here / "in" / "model")
    (folder / "modeling_x.py").write_text(CODE)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **CLASSES["config.json"], "model_type": "x"}))
    refused(capsys, here / "in", 5, "ART-009", "x", "export-mllm", "-o", here / "out", "--set",
            f"models.mllm={folder}")  # fmt: skip


# ---- recipes ---------------------------------------------------------------------------------------------------------

TAGS = ["!!python/object/apply:os.mkdir [canary]", "!!python/object/new:os.mkdir {args: [canary]}",
        "!!python/name:os.mkdir ''", "!!python/module:canary ''", "!!js/function 'x'",
        "!<tag:yaml.org,2002:python/x> a"]  # fmt: skip
BOMB = "a: &a [x, x]\n" + "".join(f"{chr(i + 1)}: &{chr(i + 1)} [{f'*{chr(i)}, ' * 9}]\n" for i in range(97, 110))


@pytest.mark.parametrize("text", [*[f"name: {tag}\n" for tag in TAGS], *[f"{tag}: x\n" for tag in TAGS[:1]], BOMB])
@pytest.mark.parametrize("way", ["file", "set"])
def test_tags_and_aliases_in_yaml(here, capsys, way, text):
    path = here / "in" / "evil.yaml"
    path.write_text(text)
    if way == "file":
        refused(capsys, here / "in", 2, "RECIPE-001", f"{path}:1:", "recipes", "show", path)
    else:
        refused(capsys, here / "in", 2, "RECIPE-001", "--set", "recipes", "show", "tiny", "--set", f"name={text}")


# ---- archives, tables, addresses -------------------------------------------------------------------------------------


def test_members_of_a_tar(here, capsys):
    evil = PICKLES["protocol 2"]
    path = archive(here / "in" / "a.tar", ("a.png", image()), ("a.txt", b"fine"), ("a.pkl", evil), ("a.pyd", evil),
                   ("a.npy", evil), ("a.pth", evil), ("canary.py", CODE.encode()))  # fmt: skip
    code, said = told(capsys, here / "in", "extract-latents", path, "-o", here / "out", *SMALL)
    assert code == 0 and ".pkl members 1, .pyd members 1" in said, said
    for name, data in (("../canary", b"x"), ("canary", "link"), ("canary", "hard"), ("canary", "fifo")):
        path = archive(here / "in" / "b.tar", ("a.png", image()), ("a.txt", b"fine"), (name, data))
        refused(capsys, here / "in", 4, "DATA-003", f"b.tar: {name}", "extract-latents", path, "-o", here / "b", *SMALL)


@pytest.mark.parametrize("source", ["pipe:touch canary", "pipe:touch canary #.tar", "pipe:touch canary://x.tar",
                                    f"{SHELL}.tar", "| touch canary", "ssh://x/canary.tar", "filecache::file://x.tar",
                                    "-x", "{touch,canary}.tar"])  # fmt: skip
def test_sources_that_others_would_run(here, capsys, source):
    code, said = told(capsys, here / "in", "extract-latents", "-o", here / "out", *SMALL, "--", source)
    assert code in (2, 4) and "error[BF-" in said, said


@pytest.mark.parametrize("name", ["pipe:touch canary", SHELL, "pipe:touch canary://x.png", "ssh://x/canary.png"])
def test_paths_in_a_table_that_others_would_run(here, capsys, name):
    (here / "in" / "list.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}) + "\n")
    for rules in ([], ["--set", "latents.allow_outside=true"]):
        code, said = told(capsys, here / "in", "extract-latents", here / "in" / "list.jsonl", "-o", here / "out",
                          *SMALL, *rules)  # fmt: skip
        assert code in (2, 4) and "error[BF-" in said, said


# ---- names and words -------------------------------------------------------------------------------------------------


def test_names_of_files_and_words_of_captions_and_prompts(here, capsys, monkeypatch):
    photos = here / "in" / SHELL
    photos.mkdir()
    (photos / f"{SHELL}.png").write_bytes(image())
    (photos / f"{SHELL}.txt").write_text(SHELL)
    out = here / f"runs {SHELL}"
    code, said = told(capsys, here / "in", "extract-latents", photos, "-o", out / "latents", *SMALL)
    assert code == 0 and LatentsStore.open(out / "latents").captions == [SHELL], said
    system = save_system(here / "in" / "system")
    prompts = here / "in" / f"{SHELL}.txt"
    prompts.write_text(f"{SHELL}\n-o canary\n")
    monkeypatch.setattr(pipeline, "BifrostPipeline", lambda *rest, **more: Noise(lambda: None, False))
    code, said = told(capsys, here / "in", "generate", "--prompts", prompts, "-o", out / "samples", "--branch",
                      system.branch.path, "--controlnet", system.controlnet.path, "--device", "cpu")  # fmt: skip
    assert code == 0 and sorted(path.name for path in (out / "samples").glob("*.png")) == ["00000.png", "00001.png"]
    code, said = told(capsys, here / "in", "report", out / "latents", "-o", out / "page.html")
    assert code == 0, said
    assert told(capsys, here / "in", "artifacts", "ls", "-w", out)[0] == 0


def test_postscript_starts_no_interpreter(here, capsys, monkeypatch):
    programs = here / "bin"
    programs.mkdir()
    for name in ("gs", "gswin64c", "magick", "rsvg-convert"):
        (programs / name).write_text("#!/bin/sh\nmkdir canary\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(canary) (w) file\n%%EOF\n"
    for name in ("a.png", "a.jpg", "a.eps"):
        (here / "in" / name).write_bytes(program)
        (here / "in" / "a.txt").write_text("x")
        code, said = told(capsys, here / "in", "extract-latents", here / "in", "-o", here / "out", *SMALL)
        assert code == 4 and "error[BF-DATA-00" in said and str(here / "in") in said, said
        (here / "in" / name).unlink()


def test_names_of_tensors_lead_nowhere(here, capsys):
    folder = here / "in" / "model"
    folder.mkdir()
    save_tensors(folder / "model.safetensors", {"../../canary": torch.ones(1), "/canary": torch.ones(1)}, {})
    code, said = told(capsys, here / "in", "import", folder, "-o", here / "out")
    assert code == 5 and "error[BF-ART-007]" in said and not (here / "out").exists(), said


# ---- the current folder ----------------------------------------------------------------------------------------------


def test_modules_in_the_current_folder_are_not_found_by_several_processes(here):
    """A data set may hold a yaml.py; `--gpus` starts `python -c` and `python -m`, which look in the current folder."""
    names = ("logging", "typer", "yaml", "numpy", "torch")
    for name in names:
        (here / f"{name}.py").write_text("import os; os.makedirs('canary', exist_ok=True); raise SystemExit(9)\n")
    words = ["extract-latents", str(here / "in"), "-o", str(here / "out"), "--gpus", "2"]
    code = f"from bifrost_cli.runtime.launch import start; start(2, {words!r})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 4 and "BF-DATA-001" in done.stderr  # the folder holds no images: the processes did run
    assert not (here / "canary").exists()


def test_a_printed_command_can_be_pasted(here, capsys):
    """A folder's name is one word of it, whatever is in the name."""
    folder = here / "in" / SHELL
    with Draft.open(folder, "samples", {"of": "a test"}) as draft:
        (draft.path / "00000.png").write_bytes(b"x")
        draft.commit({})
    (folder / "00000.png").write_bytes(b"y")
    assert main(["report", str(folder)]) == 5
    assert f"bifrost artifacts verify {shlex.quote(str(folder))};" in capsys.readouterr().err
