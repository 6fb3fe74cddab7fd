"""What leaves on which stream: errors as JSON, closed pipes, hidden characters, names without a code, completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bifrost_cli.artifacts import Draft
from bifrost_cli.cli.app import run
from bifrost_cli.errors import UsageError, printable, render
from bifrost_cli.runtime.ui import TerminalUi, counted

ROOT = Path(__file__).parents[2]
BIFROST = [sys.executable, "-m", "bifrost_cli"]
KEYS = {"code", "message", "at", "fix", "exit_code"}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def bifrost(*arguments: str, **more: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    return subprocess.run([*BIFROST, *arguments], env=environment, capture_output=True, timeout=60)


# ---- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "name"),
    [(["artifacts", "show", "nothing"], 5, "BF-ART-001"), (["recipes", "show", "--set", "x=1"], 2, "BF-RECIPE-002"),
     (["generate", "--no-such-option"], 2, "BF-USE-001"), (["extract-latents", "missing"], 4, "BF-DATA-001")],
)  # fmt: skip
def test_an_error_is_one_json_object(arguments, code, name, capsys):
    assert run([*arguments, "--json"]) == code
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found.keys() == KEYS and (found["code"], found["exit_code"]) == (name, code)
    assert f"error[{name}]: {found['message']}" in err
    assert run(arguments) == code and capsys.readouterr().out == ""


def test_findings_are_in_the_object_of_the_result(capsys):
    with Draft.open("runs/a", "latents", {"x": 1}) as draft:
        (draft.path / "data").write_text("1")
        draft.commit()
    Path("runs/a/data").write_text("2")
    assert run(["artifacts", "verify", "--json"]) == 8
    found = json.loads(capsys.readouterr().out)
    assert found["error"].keys() == KEYS and found["error"]["exit_code"] == 8 and list(found["damaged"])


# ---- pipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["recipes", "ls"], ["--help"], ["train", "branch", "--help"], [], ["recipes"]])
def test_a_closed_pipe_ends_quietly(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*BIFROST, *arguments], env=environment, stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_a_full_disk_behind_stdout_is_no_closed_pipe():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        done = subprocess.run([*BIFROST, "recipes", "ls"], env=environment, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 3 and b"BF-ENV-010" in done.stderr and b"Traceback" not in done.stderr


# ---- names -----------------------------------------------------------------------------------------------------------

FORGED = "a\n\x1b[31mred\r\u202eb\u2028[bold]c\udcff \U0001f468\u200d\U0001f469 \u00e9"
SHOWN = "a\\n\\x1b[31mred\\r\\u202eb\\u2028[bold]c\\udcff \U0001f468\u200d\U0001f469 \u00e9"


def test_hidden_characters_are_escaped_wherever_a_line_is_printed(capsys):
    assert printable(FORGED) == SHOWN and printable("plain \u00e9") == "plain \u00e9"
    assert render(UsageError(FORGED, at=f"x\n{FORGED.replace(chr(10), '')}", fix="f")).count("\n") == 3
    TerminalUi().say("a\x1b[2Jb\nc")
    assert capsys.readouterr().err == "a\\x1b[2Jb\\nc\n"


def test_a_name_that_stdout_cannot_encode_fails_no_command():
    folder = Path("runs/caf\u00e9\u4e2d")
    with Draft.open(folder, "latents", {"x": 1}) as draft:
        draft.commit()
    done = bifrost("artifacts", "ls", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0 and b"caf\\xe9\\u4e2d" in done.stdout and done.stderr == b""


def test_counts_have_their_plural():
    assert [counted(n, "image") for n in (0, 1, 2, 1000)] == ["0 images", "1 image", "2 images", "1,000 images"]


# ---- completion ------------------------------------------------------------------------------------------------------


def completed(*words: str) -> list[str]:
    line = " ".join(["bifrost", *words])
    variables = {"_BIFROST_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
    done = bifrost(**variables)
    assert done.stderr == b""
    return done.stdout.decode().split()


def test_commands_recipes_and_artifacts_are_completed():
    with Draft.open("runs/a", "latents", {"x": 1}) as draft:
        artifact = draft.commit()
    assert completed("extr") == ["extract-latents"]
    assert "bifrost1-7b" in completed("doctor", "--recipe", "bif") and completed("recipes", "show", "tin") == ["tiny"]
    assert completed("artifacts", "show", "lat") == [artifact.id]
    assert completed("generate", "--branch", "b") == [
        "builtin:branch", "builtin:branch-linear", "builtin:controlnet"]  # fmt: skip


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_is_shown(shell):
    done = bifrost(**{"_BIFROST_COMPLETE": f"source_{shell}"})
    assert done.returncode == 0 and b"_BIFROST_COMPLETE=complete_" + shell.encode() in done.stdout


def test_the_short_version():
    assert run(["-V"]) == 0
