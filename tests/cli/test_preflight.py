"""Refusals that need no model come before any model library is imported."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from bifrost_cli.artifacts import Draft

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
from bifrost_cli.cli.app import run
cases, found = json.loads(sys.argv[1]), []
for case in cases:
    code = run(case)
    found.append([code, sorted({"torch", "transformers", "diffusers", "open_clip", "zarr"} & set(sys.modules))])
print(json.dumps(found))
"""
CASES = [
    (["generate", "a star", "-o", "out.png"], 2, "out.png exists already"),
    (["generate", "a star", "-o", "link.png"], 2, "link.png exists already"),
    (["generate", "a star", "-o", "out.gif"], 2, "out.gif would be no PNG, JPEG or WebP"),
    (["generate", "a star", "-o", "folder"], 2, "folder exists and was not made by bifrost"),
    (["generate", "a star", "-n", "2", "-o", "new.png"], 2, "2 images do not fit into new.png"),
    (["generate", ""], 2, "the prompt is empty"),
    (["generate", "a star", "--prompts", "prompts.txt"], 2, "a prompt and --prompts were both given"),
    (["generate", "--prompts", "none.txt"], 2, "none.txt cannot be read"),
    (["generate", "--prompts", "prompts.txt"], 2, "prompts.txt holds no prompt"),
    (["generate", "a star", "--branch", "nothing"], 5, "there is no artifact nothing"),
    (["generate", "a star", "--controlnet", "builtin:branch"], 5, "is a branch artifact, not controlnet"),
    (["reconstruct", "none.png"], 4, "file not found"),
    (["reconstruct", "prompts.txt"], 4, "empty file"),
    (["reconstruct", "none.png", "-o", "out.png"], 2, "out.png exists already"),
    (["reconstruct", "none.png", "-o", "folder"], 2, "folder is no image file"),
    (["ask", "none.png", "what?"], 4, "file not found"),
    (["ask", "none.png", " "], 2, "the question is empty"),
    (["train", "branch"], 5, "there is no latents artifact in runs"),
    (["train", "controlnet", "--latents", "nothing"], 5, "there is no artifact nothing"),
    (["train", "branch", "--latents", "store", "-o", "link"], 2, "link exists and is not a folder"),
    (["train", "branch", "--set", "branch.train.stesp=3"], 2, "unknown key branch.train.stesp"),
    (["extract-latents", "shapes:4", "-o", "link"], 2, "link is a link"),
    (["extract-latents", "shapes:4", "-o", "folder"], 2, "folder exists and was not made by bifrost"),
    (["extract-latents", "missing"], 4, "missing does not exist"),
    (["extract-latents", "missing.csv"], 4, "missing.csv does not exist"),
    (["extract-latents", "prompts.txt"], 4, "prompts.txt is not a folder, a table or an archive"),
    (["extract-latents", "folder", "-o", "folder/store"], 2, "lies inside the source folder"),
    (["eval", "--gate", "nonsense"], 2, "nonsense"),
    (["eval", "--samples", "nothing"], 5, "there is no artifact nothing"),
    (["eval", "--prompts", "none.txt"], 2, "none.txt cannot be read"),
    (["export", "builtin:branch", "-o", "folder"], 2, "folder exists already"),
    (["export", "builtin"], 5, "names no artifact"),
    (["export", "nothing"], 5, "there is no artifact nothing"),
    (["import", "nowhere/"], 3, "nowhere/ is neither a folder nor a hub id"),
]  # fmt: skip


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> tuple[list, list[str], float]:
    """For each case its exit code and the libraries imported until then; the errors; seconds of CPU for all."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "folder").mkdir()
    (folder / "folder" / "mine.txt").write_text("kept")
    for name in ("out.png", "prompts.txt"):
        (folder / name).touch()
    (folder / "link").symlink_to("folder")
    (folder / "link.png").symlink_to("nowhere.png")
    with Draft.open(folder / "store", "latents", {"x": 1}) as draft:
        draft.commit()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([case for case, *_ in CASES])],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 0, done.stderr
    kept = ["folder", "link", "link.png", "out.png", "prompts.txt", "store"]
    assert sorted(path.name for path in folder.iterdir()) == kept
    errors = ["error[" + text for text in done.stderr.split("error[")[1:]]
    return json.loads(done.stdout), errors, seconds


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: " ".join(CASES[number][0]))
def test_a_refusal_comes_before_any_model_library(refused, number):
    found, errors, _ = refused
    _, code, message = CASES[number]
    assert len(errors) == len(CASES)
    assert found[number] == [code, []] and message in errors[number]


def test_each_refusal_takes_a_fraction_of_a_second_of_cpu(refused):
    assert refused[2] < 4
