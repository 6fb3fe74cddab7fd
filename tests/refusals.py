"""What every bad input must come to: an exit code, our code, the place, no traceback, and inputs as they were.

In: a command line, the folder of its inputs. Out: what was said, or AssertionError. The command runs in this process.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest

from bifrost_cli.cli.main import run

# An extraction as small as it goes, with fixtures_targets.Means in the encoder's place.
SMALL = ["--set", "latents.image_size=32", "--set", "latents.vae=false", "--set", "latents.shard_rows=4",
         "--set", "latents.chunk_rows=2", "--device", "cpu"]  # fmt: skip


def tree(folder: Path) -> dict[str, str]:
    """What lies below a folder (or the one file): the digest of each file, where each link leads, what else is what."""
    paths = [folder, *sorted(folder.rglob("*"))] if folder.is_dir() else [folder]
    return {str(path.relative_to(folder.parent)): _content(path) for path in paths}


def _content(path: Path) -> str:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return f"link to {os.readlink(path)}"
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(mode) else ""
    return f"{stat.filemode(mode)} {digest}"


def told(capsys: pytest.CaptureFixture, inputs: Path, *arguments: object) -> tuple[int, str]:
    """Exit code and all that a command says; its inputs are untouched, and it shows no traceback."""
    before = tree(inputs)
    capsys.readouterr()
    code = run([str(argument) for argument in arguments])
    said = "".join(capsys.readouterr())
    assert "Traceback" not in said and "BF-BUG" not in said, said
    assert tree(inputs) == before, "an input was changed"
    return code, said


def refused(capsys: pytest.CaptureFixture, inputs: Path, exit_code: int, name: str, words: str,
            *arguments: object) -> str:  # fmt: skip
    """What a command says that must be refused with this exit code, this BF- code, and these words."""
    code, said = told(capsys, inputs, *arguments)
    assert code == exit_code and f"error[BF-{name}]" in said and words in said, f"{code}: {said}"
    return said
