"""Where bytes lie: a local path, or an address that fsspec opens (s3://, https://, ...).

In: a place as text. Out: its bytes, a part of them, or an open file; BadImage when there is no such file, and
EnvironmentProblem when the way there fails, so that a broken network is never counted as a bad image. Only the
schemes below are opened: fsspec knows others that run commands. Does not know what the bytes mean.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from bifrost_cli.data.images import FILE_BYTES, BadImage, read_regular
from bifrost_cli.errors import BifrostError, EnvironmentProblem, UsageError

SCHEMES = ("s3", "gs", "az", "abfs", "https", "http", "hf", "memory")
_BACKENDS = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "https": "aiohttp", "http": "aiohttp"}
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_FILES = 100_000


def is_remote(place: str) -> bool:
    return "://" in place


def read_place(place: str, limit: int = FILE_BYTES) -> bytes:
    """All bytes of a place; BadImage for a local file of more than `limit`."""
    if not is_remote(place):
        return read_regular(Path(place), limit)
    with reading(place):
        return _files(place).cat_file(place)


def read_span(place: str, start: int, size: int) -> bytes:
    """`size` bytes from `start`; fewer where the file ends before."""
    if is_remote(place):
        with reading(place):
            data = _files(place).cat_file(place, start, start + size)
            if len(data) > size:  # the server took no notice of the range
                raise _whole_files_only(place)
            return data
    with open_place(place) as stream:
        stream.seek(start)
        return stream.read(size)


def open_place(place: str) -> BinaryIO:
    """An open file that can seek; the caller closes it, and reads it inside `reading(place)`."""
    if is_remote(place):
        with reading(place):
            stream = _files(place).open(place, "rb")
            if not stream.seekable():
                raise _whole_files_only(place)
            return stream
    path = Path(place)
    if not path.exists():
        raise BadImage("dangling link" if path.is_symlink() else "file not found")
    if not path.is_file():
        raise BadImage("not a regular file")
    return open(path, "rb")


def suffix_of(place: str) -> str:
    """`.csv` and so on, lower case; an address's query does not count."""
    return Path(place.partition("?")[0] if is_remote(place) else place).suffix.lower()


def expand(pattern: str) -> list[str]:
    """`shards-{000..099}.tar` or a local `shards-*.tar` as its files, in order; what exists as it is stands for itself.

    UsageError: a range that runs backwards, or more than 100,000 files; a pattern that nothing matches.
    """
    found = _RANGE.search(pattern)
    if not is_remote(pattern) and re.search(r"[*?]", pattern) and not Path(pattern).exists():
        if not (files := sorted(glob.glob(pattern))):
            raise UsageError(f"no file matches {pattern}", fix="for example 'shards-*.tar', in quotes")
        return files
    if not found or (not is_remote(pattern) and Path(pattern).exists()):
        return [pattern]
    first, last = found.groups()
    if not 0 <= int(last) - int(first) < _MOST_FILES:
        raise UsageError(f"{found[0]} in {pattern} is no range of files", fix="for example shards-{000..099}.tar")
    names = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    return [place for name in names for place in expand(pattern[: found.start()] + name + pattern[found.end() :])]


def beside(place: str, name: str) -> str:
    """The place of `name` as seen from the folder that `place` lies in; an address stands for itself."""
    if is_remote(name):
        return name
    return f"{place.rpartition('/')[0]}/{name}" if is_remote(place) else str(Path(place).parent / name)


@contextmanager
def reading(place: str) -> Iterator[None]:
    """Errors on the way to an address, as ours; those of a local file are left as they are."""
    if not is_remote(place):
        yield
        return
    scheme = place.partition("://")[0]
    try:
        yield
    except BifrostError:
        raise
    except ImportError as error:
        name = _BACKENDS.get(scheme, "fsspec")
        raise EnvironmentProblem(
            f"reading {scheme}:// needs the package {name}", at=place, fix=f"pip install {name}", code="BF-ENV-002"
        ) from error
    except FileNotFoundError:
        raise BadImage("file not found") from None
    except Exception as error:  # each backend raises its own kinds
        raise EnvironmentProblem(
            f"{place} cannot be read: {error or type(error).__name__}",
            fix="see that the address and the network are right, then give the same command again; it continues",
            code="BF-ENV-020",
        ) from error


def _whole_files_only(place: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"{place} cannot be read in parts: its server serves whole files only",
        fix="download it and give the local file",
        code="BF-ENV-020",
    )


def _files(place: str) -> Any:
    """The file system of an address."""
    scheme = place.partition("://")[0]
    if scheme not in SCHEMES:
        raise UsageError(f"{scheme}:// is not read", fix="one of " + ", ".join(f"{name}://" for name in SCHEMES))
    from fsspec.core import url_to_fs

    return url_to_fs(place)[0]
