"""Strict YAML: the part of YAML 1.2 that means what it looks like, with the line and column of every key.

Refused, with a place: duplicate keys, anchors and aliases, tags, several documents, numbers that start with 0,
infinities, more than 32 levels, more than 1 MB. `1e-4` is a number; only `true` and `false` are booleans; `no` and
`12:30:45` are text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bifrost_cli.errors import RecipeError

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|nan)", re.IGNORECASE)

Key = tuple[Any, ...]


@dataclass
class Document:
    """A parsed document.

    Attributes:
        name: the file, or what else errors call it.
        data: plain values.
        places: key path (names and list positions) -> `name:line:column`.
    """

    name: str
    data: Any = None
    places: dict[Key, str] = field(default_factory=dict)

    def place(self, path: Key) -> str:
        """Where a key is, or for an absent one, its nearest parent."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.name)


def parse_file(path: Path) -> Document:
    """`parse` the contents of a file. RecipeError too when it cannot be read."""
    try:
        with path.open("rb") as stream:
            return parse(stream.read(MAX_BYTES + 1), str(path))
    except OSError as error:
        raise _refuse(f"the file cannot be read: {error.strerror}", str(path)) from error


def parse(raw: bytes, name: str) -> Document:
    """Read one YAML document.

    Args:
        raw: UTF-8 text.
        name: what errors call it.

    Raises:
        RecipeError: BF-RECIPE-001 with `name:line:column`, for anything that is refused.
    """
    if len(raw) > MAX_BYTES:
        raise _refuse(f"the file has more than {MAX_BYTES} bytes, which no recipe has", name)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _refuse(f"not UTF-8 at byte {error.start}", name, fix="save the file as UTF-8") from error
    document = Document(name)
    try:
        _Reader(document, yaml.parse(text, Loader=yaml.SafeLoader)).read()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _refuse(f"not valid YAML: {error.problem}", _at(name, mark) if mark else name) from error
    except yaml.YAMLError as error:
        raise _refuse(f"not valid YAML: {error}", name) from error
    return document


def _refuse(message: str, at: str, fix: str | None = None) -> RecipeError:
    return RecipeError(message, at=at, fix=fix, code="BF-RECIPE-001")


def _at(name: str, mark: Any) -> str:
    return f"{name}:{mark.line + 1}:{mark.column + 1}"


class _Reader:
    """Builds values from parser events, so that a bomb is stopped at the level where it begins."""

    def __init__(self, document: Document, events: Iterator[Any]) -> None:
        self.document, self.events = document, events

    def read(self) -> None:
        next(self.events)  # stream start
        if isinstance(next(self.events), yaml.StreamEndEvent):
            raise _refuse("the recipe is empty", self.document.name)
        self.document.data = self._value(next(self.events), ())
        next(self.events)  # document end
        if not isinstance(event := next(self.events), yaml.StreamEndEvent):
            raise self._refuse("a second document begins; a recipe is one", event)

    def _value(self, event: Any, path: Key) -> Any:
        if isinstance(event, yaml.AliasEvent):
            raise self._refuse("aliases (*name) are refused", event)
        if event.anchor is not None:
            raise self._refuse("anchors (&name) are refused", event)
        if event.tag is not None:
            raise self._refuse(f"tags ({event.tag}) are refused", event)
        if len(path) > MAX_DEPTH:
            raise self._refuse(f"more than {MAX_DEPTH} levels", event)
        self.document.places.setdefault(path, _at(self.document.name, event.start_mark))
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(path)
        return self._scalar(event)

    def _mapping(self, path: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent) or event.tag is not None or event.anchor is not None:
                raise self._refuse("a key must be a plain word", event)
            key, place = event.value, _at(self.document.name, event.start_mark)
            if key in values:
                raise self._refuse(f"{key} is given twice; first at {self.document.places[(*path, key)]}", event)
            self.document.places[(*path, key)] = place
            values[key] = self._value(next(self.events), (*path, key))
        return values

    def _sequence(self, path: Key) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            values.append(self._value(event, (*path, len(values))))
        return values

    def _scalar(self, event: yaml.ScalarEvent) -> Any:
        text = event.value
        if not event.implicit[0]:  # quoted
            return text
        if text in ("", "~", "null"):
            return None
        if text in ("true", "false"):
            return text == "true"
        if _LEADING_ZERO.fullmatch(text):
            raise self._refuse(
                f"{text} starts with 0, which other readers take for octal", event, f"write {text.lstrip('0')}"
            )
        if _NOT_FINITE.fullmatch(text):
            raise self._refuse(f"{text} is not a finite number", event)
        if _INTEGER.fullmatch(text):
            return int(text) if len(text) < 20 else float(text)
        return float(text) if _FLOAT.fullmatch(text) else text

    def _refuse(self, message: str, event: Any, fix: str | None = None) -> RecipeError:
        return _refuse(message, _at(self.document.name, event.start_mark), fix)
