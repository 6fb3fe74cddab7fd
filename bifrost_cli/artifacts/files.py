"""Writing files that must last, and reading them with suspicion.

In: bytes or JSON values and a path. Out: a file that is either absent or whole: temporary name in the same folder,
flush, fsync, rename, fsync of the folder. Does not know what the files mean.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bifrost_cli.errors import ArtifactError, DiskFull, EnvironmentProblem

TEMP_PREFIX = ".bifrost-tmp-"
JSON_LIMIT = 64 * 1024 * 1024
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}
_counter = itertools.count()


def temp_path(path: Path) -> Path:
    """A fresh name beside `path` that `sweep` recognises; short, because `path.name` may fill all 255 bytes."""
    return path.with_name(f"{TEMP_PREFIX}{os.getpid()}-{next(_counter)}")


def canonical_json(value: Any) -> bytes:
    """One value, one spelling: sorted keys, no spaces, UTF-8. NaN and infinity are refused (ValueError)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds the old file or the whole new one. DiskFull when there is no room."""
    path = Path(path)
    tmp = temp_path(path)
    with disk_errors(path, len(data)):
        try:
            tmp.write_bytes(data)
            replace_file(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """As `write_bytes`, in the form a person can read: sorted keys, one space of indent, a newline at the end."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(path, text.encode("utf-8") + b"\n")


def replace_file(tmp: Path, path: Path) -> None:
    """Give a finished temporary file its final name, durably."""
    with disk_errors(path, 0):
        sync_file(tmp)
        os.replace(tmp, path)
        sync_folder(Path(path).parent)


def sync_file(path: Path) -> None:
    """Force a file's bytes to the disk. An fsync that fails is fatal for that file and is not tried again."""
    with disk_errors(path, 0):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Force a folder's names to the disk."""
    sync_file(folder)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, with the errors of this module."""
    with disk_errors(folder, 0):
        Path(folder).mkdir(parents=True, exist_ok=True)


def sweep(folder: Path) -> int:
    """Remove what a killed process left below `folder`; the caller holds its lock. Returns how many were removed."""
    leftovers = [path for path in Path(folder).rglob(f"{TEMP_PREFIX}*")]
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(leftovers)


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
            raise ArtifactError(
                f"{path} has {size} bytes, more than a file of this kind can have ({limit})", code="BF-ART-005"
            )
        return json.loads(
            path.read_bytes().decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
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
def disk_errors(path: Path, need: int = 0) -> Iterator[None]:
    """Turn the system's disk errors inside the block into DiskFull; `need` is the number of bytes being written."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            free = _free(Path(path))
            wanted = f"need {_size(need)}, " if need else ""
            raise DiskFull(
                f"no room to write {path}: {wanted}free {_size(free)}",
                at=error.strerror,
                fix="free some space (or raise the quota) and give the same command again; finished work is kept",
            ) from error
        if error.errno in _NOT_WRITABLE:
            raise EnvironmentProblem(
                f"cannot write {path}: {error.strerror}",
                fix="choose another place with -o or --workspace",
                code="BF-ENV-011",
            ) from error
        raise


def _free(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def _size(count: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
