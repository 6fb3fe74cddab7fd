"""What tests/README.md promises is held by tests that exist, and the commands it names run what it says."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "tests" / "README.md").read_text("utf-8").split("## What it promises")[1].split("\n## ")[0]
PROMISES = {found[1]: found[0] for found in re.finditer(r"- \*\*(P\d) .*?(?=\n- \*\*P|\n\n|\Z)", SECTION, re.DOTALL)}
OPTIONS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["pytest"]["ini_options"]
MARKERS = {line.partition(":")[0] for line in OPTIONS["markers"]}


def test_there_are_nine():
    assert list(PROMISES) == [f"P{number}" for number in range(1, 10)]


@pytest.mark.parametrize("name", PROMISES)
def test_a_promise_names_tests_that_exist_and_run(name):
    """Each file has tests that the plain `pytest` runs, not only those of a marker."""
    files = re.findall(r"`(tests/\w+/test_\w+\.py)`", PROMISES[name])
    assert files
    for file in files:
        found = [node for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8")))
                 if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]  # fmt: skip
        plain = [node for node in found if not any(f"mark.{marker}" in ast.unparse(one) and "param" not in
                 ast.unparse(one) for one in node.decorator_list for marker in MARKERS)]  # fmt: skip
        assert plain, file


@pytest.mark.parametrize("marker", re.findall(r"`pytest -m (\w+)`", SECTION))
def test_a_marker_is_known_left_out_by_default_and_in_use(marker):
    assert marker in MARKERS and f"not {marker}" in OPTIONS["addopts"]
    uses = [path for path in (ROOT / "tests").rglob("test_*.py") if f"mark.{marker}" in path.read_text("utf-8")]
    assert uses
