"""One writer per folder.

In: a folder. Out: an exclusive `flock` on `<folder>/.lock`, which the kernel releases even after kill -9, so a stale
lock never has to be deleted. The file says who holds it. Does not know what is written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from pathlib import Path
from types import TracebackType

from bifrost_cli.artifacts.files import disk_errors, make_folder, write_all
from bifrost_cli.errors import ArtifactError

LOCK_NAME = ".lock"


class Lock:
    """Hold a folder for writing. ArtifactError at once when another process holds it, naming that process."""

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / LOCK_NAME
        self._descriptor: int | None = None

    def acquire(self) -> Lock:
        make_folder(self.path.parent)
        with disk_errors(self.path):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(descriptor, 4096)
            os.close(descriptor)
            raise _held(self.path.parent, owner) from error
        self._descriptor = descriptor
        try:
            with disk_errors(self.path):
                os.ftruncate(descriptor, 0)
                write_all(descriptor, _self_description())
        except BaseException:
            self.release()
            raise
        return self

    def release(self) -> None:
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)  # a released lock leaves the same bytes behind, whoever held it
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # closing alone is not enough while a forked child has it open
        os.close(self._descriptor)
        self._descriptor = None

    def __enter__(self) -> Lock:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _self_description() -> bytes:
    value = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(sys.argv)[:1000],
    }
    return json.dumps(value).encode("utf-8") + b"\n"


def _held(folder: Path, owner: bytes) -> ArtifactError:
    try:
        value = json.loads(owner)
        who = f"pid {value['pid']} on {value['host']} since {value['since']}"
        at = str(value["command"])
    except (ValueError, KeyError, TypeError):  # the owner has not written its name yet
        who, at = "another process", None
    return ArtifactError(
        f"{folder} is being written: locked by {who}",
        at=at,
        fix="wait for it to end, or write elsewhere with -o",
        code="BF-ART-006",
    )
