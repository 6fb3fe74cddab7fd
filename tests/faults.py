"""A failing disk: stands in for `os` in the one module through which everything lasting is written.

In: which call fails, and how. Out: the error at that call, or a record of all calls from which the state of the disk
after a power cut at any of them is made. Knows only files, folders and what was synced; nothing of Bifrost's formats.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bifrost_cli.artifacts import files, lock

KINDS = ("open", "write", "fsync", "rename", "unlink", "mkdir")
_KIND_OF = {"replace": "rename", "rmdir": "unlink"}
CALLS = (*KINDS, *_KIND_OF)


class Watched:
    """`os`, with `hook(kind, name, arguments)` before each call that touches the disk; it may raise. Nothing waits for
    the disk: harms by the hundred need no real fsync."""

    def __init__(self, hook: Callable[[str, str, tuple[Any, ...]], None] = lambda kind, name, arguments: None) -> None:
        self._hook = hook

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*arguments: Any, **options: Any) -> Any:
            self._hook(_KIND_OF.get(name, name), name, arguments)
            return None if name == "fsync" else real(*arguments, **options)

        return call


@contextlib.contextmanager
def disk(layer: Any) -> Iterator[Any]:
    """Put `layer` in the place of `os` where Bifrost writes."""
    with contextlib.ExitStack() as stack:
        for module in (files, lock):
            stack.callback(setattr, module, "os", module.os)
            module.os = layer
        yield layer


class FailsAt:
    """The hook of a disk whose `number`-th call of `kind` fails with `code`; `for_good`: all later ones too.

    A failing write has written half. `made` counts the calls of that kind; `failed` is True once one has failed.
    """

    def __init__(self, kind: str, number: int, code: int, for_good: bool = False) -> None:
        self.kind, self.number, self.code, self.for_good = kind, number, code, for_good
        self.made, self.failed = 0, False

    def __call__(self, kind: str, name: str, arguments: tuple[Any, ...]) -> None:
        if kind != self.kind:
            return
        self.made += 1
        if self.made == self.number or self.for_good and self.failed:
            if name == "write" and len(arguments[1]) > 1:
                os.write(arguments[0], arguments[1][: len(arguments[1]) // 2])
            self.failed = True
            raise OSError(self.code, os.strerror(self.code), str(arguments[0]))


# ---- a power cut -----------------------------------------------------------------------------------------------------


@dataclass
class _File:
    data: bytes = b""
    safe: bytes = b""


@dataclass
class _Folder:
    """`safe` holds the names that are on the disk, `pending` the changes since, in their order."""

    names: dict[str, Any] = field(default_factory=dict)
    safe: dict[str, Any] = field(default_factory=dict)
    pending: list[dict[str, Any]] = field(default_factory=list)

    def change(self, changes: dict[str, Any]) -> None:
        self.pending.append(changes)
        self.names = _changed(self.names, changes)

    def sync(self) -> None:
        self.safe, self.pending = dict(self.names), []


def _changed(names: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {name: node for name, node in {**names, **changes}.items() if node is not None}


class Recorder:
    """`os`, that keeps every change below `root`, so that `cut` can make the disk after a power cut at any of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._events: list[Callable[[dict[int, Any], _Folder], None]] = []
        self._paths: dict[int, Path] = {}

    def __len__(self) -> int:
        return len(self._events)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        new = bool(flags & os.O_CREAT) and not os.path.exists(path)
        descriptor = os.open(path, flags, mode)
        self._paths[descriptor] = Path(path)
        if new:
            self._add(lambda top: _parent(top, self._parts(path)).change({Path(path).name: _File()}))
        return descriptor

    def close(self, descriptor: int) -> None:
        self._paths.pop(descriptor, None)
        os.close(descriptor)

    def write(self, descriptor: int, data: Any) -> int:
        parts, data = self._parts(self._paths[descriptor]), bytes(data)

        def apply(top: _Folder) -> None:
            node = _find(top, parts)
            node.data += data

        self._add(apply)
        return os.write(descriptor, data)

    def ftruncate(self, descriptor: int, length: int) -> None:
        parts = self._parts(self._paths[descriptor])

        def apply(top: _Folder) -> None:
            node = _find(top, parts)
            node.data = node.data[:length]

        self._add(apply)
        os.ftruncate(descriptor, length)

    def fsync(self, descriptor: int) -> None:
        parts = self._parts(self._paths[descriptor])

        def apply(top: _Folder) -> None:
            node = _find(top, parts)
            if isinstance(node, _Folder):
                node.sync()
            else:
                node.safe = node.data

        self._add(apply)

    def rename(self, old: Any, new: Any) -> None:
        assert Path(old).parent == Path(new).parent, "a rename that is atomic stays in its folder"

        def apply(top: _Folder) -> None:
            folder = _parent(top, self._parts(old))
            folder.change({Path(old).name: None, Path(new).name: folder.names[Path(old).name]})

        self._add(apply)
        os.replace(old, new)

    replace = rename

    def unlink(self, path: Any) -> None:
        os.unlink(path)
        self._add(lambda top: _parent(top, self._parts(path)).change({Path(path).name: None}))

    def rmdir(self, path: Any) -> None:
        os.rmdir(path)
        self._add(lambda top: _parent(top, self._parts(path)).change({Path(path).name: None}))

    def mkdir(self, path: Any, mode: int = 0o777) -> None:
        os.mkdir(path, mode)
        self._add(lambda top: _parent(top, self._parts(path)).change({Path(path).name: _Folder()}))

    def _add(self, event: Callable[[_Folder], None]) -> None:
        self._events.append(event)

    def _parts(self, path: Any) -> tuple[str, ...]:
        return Path(path).relative_to(self.root).parts

    # ---- the disk afterwards

    def cut(self, after: int, how: str, seed: int = 0) -> None:
        """Make `root` what it is when the power fails after that many changes.

        `how`: "least" (only what was synced), "most" (every name, unsynced contents empty), "zeros" (every name, and
        contents of the right length that were never written), "some" (of each folder's unsynced changes the first few,
        contents cut anywhere; `seed` decides).
        """
        top = _Folder()
        for event in self._events[:after]:
            event(top)
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()
        _write_out(top, self.root, how, random.Random(seed))


def _find(top: _Folder, parts: tuple[str, ...]) -> Any:
    node: Any = top
    for part in parts:
        node = node.names[part]
    return node


def _parent(top: _Folder, parts: tuple[str, ...]) -> _Folder:
    return _find(top, parts[:-1])


def _write_out(folder: _Folder, place: Path, how: str, chance: random.Random) -> None:
    happened = {"least": 0, "some": chance.randint(0, len(folder.pending))}.get(how, len(folder.pending))
    names = folder.safe
    for changes in folder.pending[:happened]:
        names = _changed(names, changes)
    for name, node in names.items():
        if isinstance(node, _Folder):
            (place / name).mkdir()
            _write_out(node, place / name, how, chance)
        else:
            (place / name).write_bytes(_contents(node, how, chance))


def _contents(node: _File, how: str, chance: random.Random) -> bytes:
    if node.data == node.safe or how in ("least", "most"):
        return node.safe
    sure = len(node.safe) if node.data.startswith(node.safe) else 0
    if how == "zeros":
        return node.safe[:sure] + bytes(len(node.data) - sure)
    return node.data[: chance.randint(sure, len(node.data))]


def no_room(kind: str, number: int, **options: Any) -> FailsAt:
    return FailsAt(kind, number, errno.ENOSPC, **options)


def broken(kind: str, number: int, **options: Any) -> FailsAt:
    return FailsAt(kind, number, errno.EIO, **options)
