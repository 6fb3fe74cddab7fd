"""Bad input 60, as commands: what YAML can hide, and what must change no output byte: clock, hash seed, locale."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from refusals import refused, told
from timing import within

ROOT = Path(__file__).parents[2]

# Text of a recipe; code; line:column; words.
REFUSED = {
    "no": ("latents:\n  vae: no\n", "003", "2:3", 'latents.vae is "no"'),
    "010": ("branch:\n  train:\n    steps: 010\n", "001", "3:12", "010 starts with 0"),
    "a duplicate key": ("name: a\nname: b\n", "001", "2:1", "name is given twice"),
    "an alias bomb": ("claim: &a [x]\nname: [*a, *a]\n", "001", "1:8", "anchors (&name) are refused"),
    "a python tag": ("name: !!python/object/apply:os.getcwd []\n", "001", "1:7", "tags"),
    "20,000 brackets": ("name: " + "[" * 20_000, "001", "1:39", "more than 32 levels"),
    "an unknown key": ("branch:\n  train:\n    stepz: 3\n", "002", "3:5", "did you mean branch.train.steps?"),
    "lr: true": ("branch:\n  train:\n    lr: true\n", "003", "3:5", "branch.train.lr is true"),
    "negative steps": ("branch:\n  train:\n    steps: -1\n", "003", "3:5", "branch.train.steps is -1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_60_a_bad_recipe_has_file_line_and_column_within_a_second(tmp_path, capsys, name):
    text, code, place, words = REFUSED[name]
    path = tmp_path / "r.yaml"
    path.write_text(text)
    said = within(1, lambda: refused(capsys, path, 2, f"RECIPE-{code}", words, "recipes", "show", path))
    assert f"{path}:{place}" in said


def test_60_1e_4_is_a_number(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text("branch:\n  train:\n    lr: 1e-4\n")
    code, said = told(capsys, path, "recipes", "show", path, "--json")
    assert code == 0 and '"lr": 0.0001' in said or "lr: 0.0001" in said, said


# ---- clock, hash seed, locale ----------------------------------------------------------------------------------------

RUN = """
import json, shutil, sys, time
from pathlib import Path
real, back = time.time, float(sys.argv[2])
calls = iter(range(10**9))
time.time = lambda: real() - back * next(calls)   # set back further at every look
from fixtures_targets import TARGETS, result
found = {}
for name in ("extract", "train", "generate", "eval"):
    folder = Path(sys.argv[1]) / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    TARGETS[name].run(folder, lambda: None)
    found[name] = result(folder)
print(json.dumps(found, sort_keys=True))
"""


def test_60_clock_hash_seed_and_locale_change_no_byte(tmp_path):
    """Four commands, twice, from the same inputs: every file's digest, and the manifests without who made them when."""
    outputs = []
    for seed, locale, zone, back in (("0", "C.UTF-8", "UTC", 0), ("1", "C", "Asia/Tokyo", 86_400)):
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'fixtures'}", 
                       "PYTHONHASHSEED": seed, "LC_ALL": locale,
                       "TZ": zone}  # fmt: skip
        done = subprocess.run([sys.executable, "-c", RUN, str(tmp_path), str(back)], env=environment, text=True,
                              capture_output=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        outputs.append(json.loads(done.stdout.splitlines()[-1]))
    assert outputs[0]["extract"] and outputs[0] == outputs[1]
