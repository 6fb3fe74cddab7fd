"""Every lasting write: files and folders that are absent or whole, whatever fails, and suspicious reading.

A file gets its final name only when it is whole and on the disk: temporary name in the same folder, fsync, rename,
fsync of the folder. All that Bifrost writes goes through the calls of `os` in this one module.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote
from typing import Any

from bifrost_cli.errors import ArtifactError, DiskFull, EnvironmentProblem, UsageError

TEMP_PREFIX = ".bifrost-tmp-"
_UNLOCKED = 3600  # seconds in which a slow disk may keep a process from locking what it has just made
JSON_LIMIT = 64 * 1024 * 1024
_WAITING = 32 * 1024 * 1024  # bytes of a long file that may wait in memory before they are written out
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}
_BROKEN = {errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE}
# No child process inherits a descriptor, and Windows writes the bytes that it is given.
OPEN_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


@contextlib.contextmanager
def new_file(
    path: Path, size: int = 0, replace: bool = True, write_out: bool = False
) -> Iterator[Callable[[bytes | memoryview], None]]:
    """Give `write(data)`; at the end of the block `path` is the whole new file, after an error the old one or none.

    `size` is what DiskFull says is needed. With `replace` false a file that is there by then is kept (UsageError). With
    `write_out` the system writes as the file grows, so that a long one neither waits in memory nor in fsync. A failed
    fsync is not tried again: a second one can succeed although the bytes are lost.
    """
    with disk_errors(path, size), _temporary(path) as tmp:
        with open_file(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
            hold(descriptor)
            yield _written_out(descriptor) if write_out else lambda data: write_all(descriptor, data)
            os.fsync(descriptor)
        if not replace:  # a disk without hard links leaves a moment in which a second writer is not seen
            try:
                os.link(tmp, path)
            except OSError as error:
                if os.path.lexists(path):
                    raise exists(path) from error
        os.replace(tmp, path)  # changes nothing where both are one file already
        if not replace:
            with contextlib.suppress(OSError):
                _remove(tmp)
        sync(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill with whole files; at the end of the block it becomes `path`, after an error it is gone.

    UsageError BF-USE-002 when by then `path` is a file, or a folder that is not empty.
    """
    with disk_errors(path), contextlib.ExitStack() as held, _temporary(path) as tmp:
        os.mkdir(tmp)
        if os.name != "nt":
            hold(held.enter_context(open_file(tmp, os.O_RDONLY)))
        yield tmp
        sync(tmp)
        try:
            os.rename(tmp, path)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise exists(path) from error
            raise
        sync(path.parent)
    _sweep_beside(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds the old file or the whole new one. DiskFull when there is no room."""
    with new_file(path, len(data)) as write:
        write(data)


def write_new(path: Path, data: bytes) -> None:
    """As `write_bytes`, and nothing is overwritten: of two writers at once one gets UsageError BF-USE-002."""
    with new_file(path, len(data), replace=False) as write:
        write(data)
    _sweep_beside(path.parent)


def exists(path: Path, other: str | None = None) -> UsageError:
    """The refusal of an output that is there already; `other` is a name for it that is free."""
    fix = f"-o {quote(other)}, or remove {path}" if other else "choose another name, or remove it"
    return UsageError(f"{path} exists already", at="nothing is overwritten", fix=fix, code="BF-USE-002")


def write_json(path: Path, value: Any) -> None:
    """As `write_bytes`, in the form a person can read: sorted keys, one space of indent, a newline at the end."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(path, text.encode("utf-8") + b"\n")


def append(path: Path, text: str) -> None:
    """Add to the end of a file. Until `sync` of the file and its folder, a power cut may leave any part of it, or other
    bytes: who reads it goes by whole lines, and by what it knows was synced."""
    data = text.encode("utf-8")
    if path.is_symlink():
        raise ArtifactError(f"{path} is a link: what it points to would be changed", fix=f"remove {path}")
    with disk_errors(path, len(data)), open_file(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as descriptor:
        write_all(descriptor, data)


class GrowingFile:
    """A file that several attempts fill; see `growing_file`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @property
    def size(self) -> int:
        """How many bytes are there."""
        return os.fstat(self._descriptor).st_size

    def keep(self, size: int) -> None:
        """Keep the first `size` bytes; writing goes on behind them."""
        os.ftruncate(self._descriptor, size)
        os.lseek(self._descriptor, size, os.SEEK_SET)

    def write(self, data: bytes) -> None:
        """Add to the end."""
        write_all(self._descriptor, data)


@contextlib.contextmanager
def growing_file(path: Path) -> Iterator[GrowingFile]:
    """Open what an earlier attempt left of a file, or a new one; an error leaves what was written. `finish_file` gives
    it its name. ArtifactError BF-ART-006: another process writes it."""
    with disk_errors(path), open_file(path, os.O_RDWR | os.O_CREAT) as descriptor:
        if hold(descriptor) is False:
            raise ArtifactError(f"another process writes {path}", fix="wait until it has ended", code="BF-ART-006")
        yield GrowingFile(descriptor)
        os.fsync(descriptor)


def finish_file(partial: Path, path: Path) -> None:
    """Give a whole `growing_file` its name."""
    with disk_errors(path):
        os.replace(partial, path)
        sync(path.parent)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, durably."""
    folder = Path(folder)
    with disk_errors(folder):
        for path in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)
            sync(path.parent)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there. A kill or a power cut leaves a leftover to sweep, never half of it."""
    path = Path(path)
    if not os.path.lexists(path):
        return  # a disk that is mounted read-only refuses even to remove what is not there
    with disk_errors(path):
        if path.is_dir() and not path.is_symlink():
            tmp = _temp_path(path)
            os.rename(path, tmp)
            sync(path.parent)
            path = tmp
        _remove(path)


def sweep(folder: Path) -> int:
    """Remove what a killed process left below `folder`; the caller holds its lock. Returns how many were removed."""
    leftovers = list(Path(folder).rglob(f"{TEMP_PREFIX}*"))
    with disk_errors(folder):
        for path in leftovers:
            _remove(path)
    return len(leftovers)


def _sweep_beside(folder: Path) -> None:
    """Remove what killed processes left under temporary names in a folder of the user's: what nobody has locked, and is
    not new, as a process makes its file a moment before it locks it."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f"{TEMP_PREFIX}*"):
            if not path.is_symlink() and time.time() - path.stat().st_mtime > _UNLOCKED:
                with open_file(path, os.O_RDONLY) as descriptor:
                    free = hold(descriptor)
                if free:
                    _remove(path)


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to the disk. Windows opens no folder."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return
    with disk_errors(path), open_file(path, os.O_RDWR if windows else os.O_RDONLY) as descriptor:
        os.fsync(descriptor)


@contextlib.contextmanager
def open_file(path: Path, flags: int) -> Iterator[int]:
    """A descriptor, closed at the end."""
    descriptor = os.open(path, flags | OPEN_FLAGS, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """All of `data`: a full disk, a signal or 2 GB cut a single write short."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _written_out(descriptor: int) -> Callable[[bytes | memoryview], None]:
    """As `write_all`; of what waits in memory the system begins to write, and forgets what is on the disk."""
    waiting = 0

    def write(data: bytes | memoryview) -> None:
        nonlocal waiting
        write_all(descriptor, data)
        waiting += len(data)
        if waiting >= _WAITING and hasattr(os, "posix_fadvise"):
            waiting = 0
            with contextlib.suppress(OSError):  # advice; a disk that fails says so in fsync
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    return write


def _temp_path(path: Path) -> Path:
    """A fresh name beside `path` that `sweep` recognises; short, because `path.name` may fill all 255 bytes."""
    return path.with_name(f"{TEMP_PREFIX}{secrets.token_hex(8)}")  # by chance: containers have the same process ids


def hold(descriptor: int) -> bool | None:
    """Lock an open file or folder while it is open, so that no other process takes it for a leftover: False when
    another process has it, None where the system or the disk cannot lock it."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows; NFS, for a folder
        return None
    return True


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside `path`, which after an error is gone: a full disk must not be kept full by half a checkpoint."""
    tmp = _temp_path(path)
    try:
        yield tmp
    except BaseException:
        with contextlib.suppress(OSError):  # the error that brought us here is the one to tell; `sweep` finds the rest
            _remove(tmp)
        raise


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            for inner in path.iterdir():
                _remove(inner)
            os.rmdir(path)
        else:
            os.unlink(path)


def canonical_json(value: Any) -> bytes:
    """One value, one spelling: sorted keys, no spaces, UTF-8. NaN and infinity are refused (ValueError)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(path: Path, limit: int = JSON_LIMIT) -> Any:
    """Read one JSON value. ArtifactError on a missing, oversized or broken file, or a key given twice."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > limit:
            what = f"{path} has {size} bytes, more than a file of this kind can have ({limit})"
            raise ArtifactError(what, code="BF-ART-005")
        text = path.read_bytes().decode("utf-8")
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist", code="BF-ART-001") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}", code="BF-ART-005") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}", code="BF-ART-001") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is given twice")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


@contextlib.contextmanager
def disk_errors(path: Path, need: int = 0, doing: str = "write") -> Iterator[None]:
    """Turn the system's disk errors inside the block into ours; `need` is the number of bytes being written."""
    try:
        yield
    except OSError as error:
        kind, at, again = EnvironmentProblem, None, "give the same command again; finished work is kept"
        if error.errno in _NO_ROOM:
            place = next(folder for folder in (path, *Path(path).absolute().parents) if folder.exists())
            wanted = f"need {_size(need)}, " if need else ""
            what = f"no room to write {path}: {wanted}free {_size(shutil.disk_usage(place).free)}"
            kind, code, at = DiskFull, "BF-ENV-010", error.strerror
            fix = f"free some space (or raise the quota) and {again}"
        elif error.errno in _NOT_WRITABLE:
            writing = doing == "write" or error.errno == errno.EROFS
            what, code = f"cannot {'write' if writing else doing} {path}: {error.strerror}", "BF-ENV-011"
            fix = "choose another place with -o or --workspace" if writing else f"see its permissions: ls -ld {path}"
        elif error.errno in _BROKEN:
            what, code = f"the disk of {path} fails: {error.strerror}", "BF-ENV-012"
            fix = f"have the disk looked at, then {again}"
        else:
            raise
        raise kind(what, at=at, fix=fix, code=code) from error


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
