"""One writer per folder, on POSIX and on Windows.

A `Lock` is the system's own lock of `<folder>/.lock`, which ends with its process, so that none is stale; and of the
folder where the disk can: who deletes `.lock` meanwhile lets no second process in.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import socket
import stat
import sys
import time
from pathlib import Path

from bifrost_cli.artifacts.files import OPEN_FLAGS, disk_errors, hold, make_folder, open_file, write_all
from bifrost_cli.errors import ArtifactError, public

LOCK_NAME = ".lock"
_FAR = 1 << 30  # Windows: the byte that is locked, far behind the text, since a locked byte cannot be read by others


class Lock:
    """An exclusive lock on a folder, as a context manager or by `acquire` and `release`."""

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / LOCK_NAME
        self._held: list[tuple[Path, int]] = []  # what is locked, by its open descriptor: the folder, and the file

    def acquire(self) -> Lock:
        """Lock the folder, creating it where it is missing.

        ArtifactError BF-ART-006: another process holds it (it is named), or `.lock` is not a regular file.
        """
        make_folder(self.path.parent)
        descriptor = self._open()
        if not _try_lock(descriptor):
            owner = os.read(descriptor, 4096)
            os.close(descriptor)
            raise self._refusal(owner)
        self._held = [(self.path, descriptor)]
        try:
            if os.name != "nt":  # Windows opens no folder, and removes no file that is open
                folder = os.open(self.path.parent, os.O_RDONLY | OPEN_FLAGS)
                if held := hold(folder):
                    self._held.insert(0, (self.path.parent, folder))
                else:
                    os.close(folder)
                if held is False:
                    raise self._refusal(b"")
            me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            text = json.dumps({**me, "command": shlex.join(map(public, sys.argv))[:1000]}) + "\n"
            with disk_errors(self.path):
                os.ftruncate(descriptor, 0)
                os.lseek(descriptor, 0, os.SEEK_SET)
                write_all(descriptor, text.encode())
        except BaseException:
            self.release()
            raise
        return self

    def release(self) -> None:
        """Unlock; does nothing when the lock is not held."""
        for path, descriptor in self._held:
            if path == self.path:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, 0)  # a released lock leaves the same bytes behind, whoever held it
            _unlock(descriptor)  # closing alone is not enough while a forked child has it open
            os.close(descriptor)
        self._held = []

    def require_held(self) -> None:
        """ArtifactError BF-ART-006 when the folder (without a folder's lock: its `.lock`) was moved or removed since it
        was locked, so that another process may have written."""
        for path, descriptor in self._held[:1]:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                    return
            what, fix = f"{path} was removed or replaced while this process wrote there", "give the same command again"
            raise ArtifactError(what, fix=f"{fix}; it continues, or begins anew", code="BF-ART-006")

    def _open(self) -> int:
        """The file's descriptor; a link is not followed, since what it points to would be emptied."""
        what = f"{self.path.parent} cannot be locked: {LOCK_NAME} is not a regular file"
        refusal = ArtifactError(what, at=str(self.path), fix=f"remove {self.path}", code="BF-ART-006")
        status = self.path.lstat() if os.path.lexists(self.path) else None
        if status and (not stat.S_ISREG(status.st_mode) or status.st_nlink > 1):  # or has a name elsewhere
            raise refusal
        with disk_errors(self.path):
            try:
                flags = os.O_RDWR | os.O_CREAT | OPEN_FLAGS | getattr(os, "O_NOFOLLOW", 0)
                return os.open(self.path, flags, 0o644)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.EISDIR):
                    raise refusal from error
                raise

    def _refusal(self, owner: bytes) -> ArtifactError:
        try:
            value = json.loads(owner)
            who, at = f"pid {value['pid']} on {value['host']} since {value['since']}", str(value["command"])
        except (ValueError, KeyError, TypeError):  # the owner has not written its name yet
            who, at = "another process", None
        what = f"{self.path.parent} is being written: locked by {who}"
        return ArtifactError(what, at=at, fix="wait for it to end, or write elsewhere with -o", code="BF-ART-006")

    def __enter__(self) -> Lock:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


def is_locked(folder: Path) -> bool:
    """True when a process writes the folder now; changes nothing."""
    path = Path(folder) / LOCK_NAME
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with open_file(path, os.O_RDWR) as descriptor:
            if free := _try_lock(descriptor) and not is_held(folder):
                _unlock(descriptor)
            return not free
    except OSError:
        return True  # not ours to write, so not ours to judge


def is_held(path: Path) -> bool:
    """True when a process has locked a file or a folder with `hold`; changes nothing."""
    if os.name == "nt":
        return False
    try:
        with open_file(path, os.O_RDONLY) as descriptor:
            return hold(descriptor) is False
    except OSError:
        return True


def _try_lock(descriptor: int) -> bool:
    """Take the lock of an open file unless another process has it."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except ImportError:
        try:
            _windows_lock(descriptor, "LK_NBLCK")
        except OSError as error:
            os.lseek(descriptor, 0, os.SEEK_SET)
            if error.errno in (errno.EACCES, errno.EDEADLK):
                return False
            raise
    return True


def _unlock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:
        _windows_lock(descriptor, "LK_UNLCK")
    else:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _windows_lock(descriptor: int, mode: str) -> None:
    import msvcrt

    os.lseek(descriptor, _FAR, os.SEEK_SET)
    msvcrt.locking(descriptor, getattr(msvcrt, mode), 1)  # type: ignore[attr-defined]
