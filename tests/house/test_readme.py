"""Every command and every line of Python that the README shows is run; links of every README lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
OPTIONS = ROOT / "tests" / "options.txt"
PAGES = ["README.md", "recipes/README.md", "tests/README.md", ".github/CONTRIBUTING.md", ".github/SECURITY.md"]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# The README shows the defaults, which take minutes; here the same commands run on less.
SHORTER = {
    "extract-latents": ["--set", "shapes.rows=160"],
    "train branch": ["--set", "branch.train.steps=52", "--set", "branch.train.sample_every=0"],
    "train controlnet": ["--set", "controlnet.train.steps=52", "--set", "controlnet.train.sample_every=0"],
    "eval --fid": ["--min-samples", "16"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every shown command, `&&` taken apart, in the order shown."""
    lines = [line for block in blocks("sh") for line in block.splitlines() if line]
    return [part.strip() for line in lines for part in line.split("&&")]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with the files that the shown commands speak of."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "prompts.txt").write_text("a red circle\ntwo blue squares\na green star above an orange cross\n")
    (folder / "my-recipe.yaml").write_text(
        "name: mine\nimages: {input_size: 64, output_size: 64}\n"
        "models: {mllm: 'builtin:mllm', diffusion: 'builtin:flux', dtype: float32}\n"
    )
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (90, 120, 3), np.uint8)).save(folder / "photos" / f"{i}.jpg")
        (folder / "photos" / f"{i}.txt").write_text(f"picture {i}")
    return folder


@pytest.mark.timeout(900)
def test_every_command_runs(desk):
    shown = [words for command in commands() if (words := shlex.split(command))[0] == "bifrost"]
    assert len(shown) > 15
    for words in shown:
        extra = next((more for start, more in SHORTER.items() if " ".join(words[1:]).startswith(start)), [])
        extra = [] if "my-recipe.yaml" in words else extra
        done = subprocess.run(
            [sys.executable, "-m", "bifrost_cli", *words[1:], *extra], cwd=desk, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"


def test_what_is_not_a_bifrost_command_is_the_install_or_the_tests():
    others = {command for command in commands() if not command.startswith("bifrost ")}
    assert others == {"pip install -e .", "pip install -e '.[dev]'", "pytest"}


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split("\n", 1)[0].split()[-1])
def test_the_python_shown_runs(desk, code):
    short = code.replace(
        'branch.train.steps=1600"]',
        'branch.train.steps=52", "branch.train.sample_every=0", "controlnet.train.steps=52", '
        '"controlnet.train.sample_every=0", "shapes.rows=160"]',
    )
    assert (short != code) == ("train_branch" in code)
    done = subprocess.run([sys.executable, "-c", short], cwd=desk, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_is_read_in_a_few_minutes():
    assert len(README.splitlines()) <= 250


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        assert target.startswith("https://") or ((ROOT / page).parent / target).exists(), target


def test_every_command_is_in_the_overview():
    overview = README.split("## Commands")[1].split("\n## ")[0]
    names = {line.split(":")[0].split()[1] for line in OPTIONS.read_text().splitlines() if line.startswith("bifrost ")}
    rows = "".join(line for line in overview.splitlines() if line.startswith("|"))
    missing = [name for name in sorted(names) if not re.search(rf"\b{name}\b", rows)]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_named_tests_exist(page):
    for name in re.findall(r"`(tests/[\w/]+\.py)", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


def test_environment_is_not_needed():
    assert "BIFROST_" not in README and not any(name.startswith("BIFROST_") for name in os.environ)
