"""The commands that need no model, where POSIX's own modules and calls are missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ELSEWHERE = """
import os, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_DIRECTORY", "sched_getaffinity", "getuid", "geteuid", "sysconf", "fork"):
    if hasattr(os, name):
        delattr(os, name)
"""
RUN = """
from bifrost_cli.cli.app import run
sys.exit(run(sys.argv[1:]))
"""
LOCK = """
import errno, types
from bifrost_cli.artifacts import Draft, Lock
from bifrost_cli.artifacts.lock import is_locked
from bifrost_cli.errors import ArtifactError

held, where = set(), lambda descriptor: (os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR))

def locking(descriptor, mode, size):
    place = where(descriptor)
    assert place[1] > 1 << 20, "a byte that is locked cannot be read"
    if mode == 1 and place in held:
        raise OSError(errno.EACCES, "Permission denied")
    held.add(place) if mode == 1 else held.remove(place)

sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=1, LK_UNLCK=0, locking=locking)
with Draft.open("a", "branch", {"x": 1}) as draft:
    assert is_locked("a")
    try:
        Lock("a").acquire()
        raise SystemExit("a second lock was given")
    except ArtifactError as error:
        assert f"locked by pid {os.getpid()} on" in error.message, error.message
    assert draft.commit().verify() == []
assert not held and not is_locked("a") and os.path.getsize("a/.lock") == 0
"""


def elsewhere(script: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ELSEWHERE + script, *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("arguments", [["--help"], ["recipes", "ls"], ["artifacts", "ls"]], ids=" ".join)
def test_a_command_without_a_model_runs_where_posix_is_missing(arguments, tmp_path):
    done = elsewhere(RUN, tmp_path, *arguments)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout


def test_a_folder_has_one_writer_without_flock(tmp_path):
    done = elsewhere(LOCK, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
