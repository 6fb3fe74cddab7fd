"""Where bytes lie: a local path, or an address that fsspec opens (s3://, https://, ...). BadImage when there is no such
file; EnvironmentProblem when the way there fails, so that a broken network is never counted as a bad image. Only the
schemes below are opened: fsspec knows others that run commands."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from bifrost_cli.data.images import FILE_BYTES, BadImage, read_regular
from bifrost_cli.errors import BifrostError, DataError, EnvironmentProblem, UsageError

SCHEMES = ("s3", "gs", "az", "abfs", "https", "http", "hf", "memory")
_BACKENDS = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "https": "aiohttp", "http": "aiohttp"}
TIME_LIMIT = 120  # seconds in which a store has to answer
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_remote(place: str) -> bool:
    return "://" in place


def read_place(place: str, limit: int = FILE_BYTES) -> bytes:
    """All bytes of a place; BadImage for a local file of more than `limit`."""
    if not is_remote(place):
        return read_regular(Path(place), limit)
    with reading(place):
        return _cat(place)


def size_of(place: str) -> int:
    """Bytes of the file at an address. BadImage: there is none."""
    with reading(place):
        return int(_answer(_files(place), "info", place)["size"])


def read_span(place: str, start: int, size: int) -> bytes:
    """`size` bytes from `start`. BadImage: the file ends before."""
    if is_remote(place):
        with reading(place):
            data = _cat(place, start=start, end=start + size)
            _require_parts(len(data) <= size, place)
    else:
        with open_place(place) as stream:
            stream.seek(start)
            data = stream.read(size)
    if len(data) != size:
        raise BadImage("changed during the run")
    return data


def open_place(place: str) -> BinaryIO:
    """An open file that can seek; the caller closes it, and reads it inside `reading(place)`."""
    if is_remote(place):
        with reading(place):
            stream = _files(place).open(place, "rb")
            _require_parts(stream.seekable(), place)
            return stream
    path = Path(place)
    if not path.exists():
        raise BadImage("dangling link" if path.is_symlink() else "file not found")
    if not path.is_file():
        raise BadImage("not a regular file")
    return open(path, "rb")


def suffix_of(place: str) -> str:
    """`.csv` and so on, lower case; an address's query does not count."""
    return path_of(place).suffix.lower()


def path_of(place: str) -> Path:
    """A place as a path, without an address's query."""
    return Path(place.partition("?")[0] if is_remote(place) else place)


def expand(pattern: str) -> list[str]:
    """`shards-{000..099}.tar` or a local `shards-*.tar` as its files, in order; what exists as it is stands for itself.
    UsageError: a range that runs backwards, or more than 100,000 files; a pattern that nothing matches."""
    if not is_remote(pattern):
        if Path(pattern).exists():
            return [pattern]
        if re.search(r"[*?]", pattern):
            if not (files := sorted(glob.glob(pattern))):
                raise UsageError(f"no file matches {pattern}", fix="for example 'shards-*.tar', in quotes")
            return files
    if not (found := _RANGE.search(pattern)):
        return [pattern]
    first, last = found.groups()
    if not 0 <= int(last) - int(first) < 100_000:
        raise UsageError(f"{found[0]} in {pattern} is no range of files", fix="for example shards-{000..099}.tar")
    names = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    return [place for name in names for place in expand(pattern[: found.start()] + name + pattern[found.end() :])]


@contextmanager
def required(place: str, fix: str | None = None) -> Iterator[None]:
    """DataError for a place that is no image itself and cannot be opened."""
    try:
        yield
    except BadImage as error:
        raise DataError(f"{place} does not exist or cannot be read", at=error.message, fix=fix) from error


@contextmanager
def reading(place: str) -> Iterator[None]:
    """Errors on the way to an address, as ours; those of a local file are left as they are."""
    try:
        yield
    except Exception as error:  # each backend raises its own kinds
        if isinstance(error, BifrostError) or not is_remote(place):
            raise
        if isinstance(error, FileNotFoundError):
            raise BadImage("file not found") from None
        if isinstance(error, TimeoutError):
            error = TimeoutError(f"no answer in {TIME_LIMIT} seconds")
        if isinstance(error, ImportError):
            scheme = place.partition("://")[0]
            name = _BACKENDS.get(scheme, "fsspec")
            raise EnvironmentProblem(f"reading {scheme}:// needs the package {name}", at=place,
                                     fix=f"pip install {name}", code="BF-ENV-002") from error  # fmt: skip
        again = "see that the address and the network are right, then give the same command again; it continues"
        why = error or type(error).__name__
        raise EnvironmentProblem(f"{place} cannot be read: {why}", fix=again, code="BF-ENV-020") from error


def _require_parts(possible: bool, place: str) -> None:
    if not possible:
        raise EnvironmentProblem(f"{place} cannot be read in parts: its server serves whole files only",
                                 fix="download it and give the local file", code="BF-ENV-020")  # fmt: skip


def _cat(place: str, **span: int) -> bytes:
    return _answer(_files(place), "cat_file", place, **span)


def _answer(files: Any, method: str, place: str, **span: int) -> Any:
    """What a file system's method gives, in `TIME_LIMIT` where the file system can be interrupted."""
    if not getattr(files, "async_impl", False):
        return getattr(files, method)(place, **span)
    from fsspec.asyn import sync

    return sync(files.loop, getattr(files, f"_{method}"), place, timeout=TIME_LIMIT, **span)


def _files(place: str) -> Any:
    """The file system of an address."""
    scheme = place.partition("://")[0]
    if scheme not in SCHEMES:
        raise UsageError(f"{scheme}:// is not read", fix="one of " + ", ".join(f"{name}://" for name in SCHEMES))
    from fsspec.core import url_to_fs

    return url_to_fs(place)[0]
