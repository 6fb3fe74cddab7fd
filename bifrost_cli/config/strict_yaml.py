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
    """A parsed document."""

    name: str  # the file, or what else errors call it
    data: Any = None  # plain values
    places: dict[Key, str] = field(default_factory=dict)  # key path (names, list positions) -> `name:line:column`

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
    """One YAML document of UTF-8 text. RecipeError BF-RECIPE-001 with `name:line:column`, for what is refused."""
    if len(raw) > MAX_BYTES:
        raise _refuse(f"the file has more than {MAX_BYTES} bytes, which no recipe has", name)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _refuse(f"not UTF-8 at byte {error.start}", name, fix="save the file as UTF-8") from error
    document = Document(name)
    events = yaml.parse(text, Loader=yaml.SafeLoader)
    try:
        next(events)  # stream start
        if isinstance(next(events), yaml.StreamEndEvent):
            raise _refuse("the recipe is empty", name)
        document.data = _value(document, events, next(events), ())
        next(events)  # document end
        if not isinstance(event := next(events), yaml.StreamEndEvent):
            raise _refuse("a second document begins; a recipe is one", _at(name, event.start_mark))
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


def _value(document: Document, events: Iterator[Any], event: Any, path: Key) -> Any:
    """The value that begins with `event`; a bomb is stopped at the level where it begins."""
    place = _at(document.name, event.start_mark)
    if isinstance(event, yaml.AliasEvent):
        raise _refuse("aliases (*name) are refused", place)
    if event.anchor is not None:
        raise _refuse("anchors (&name) are refused", place)
    if event.tag is not None:
        raise _refuse(f"tags ({event.tag}) are refused", place)
    if len(path) > MAX_DEPTH:
        raise _refuse(f"more than {MAX_DEPTH} levels", place)
    document.places.setdefault(path, place)
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event.value, place) if event.implicit[0] else event.value  # else it is quoted
    if isinstance(event, yaml.SequenceStartEvent):
        items: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(_value(document, events, event, (*path, len(items))))
        return items
    values: dict[str, Any] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        place = _at(document.name, event.start_mark)
        if not isinstance(event, yaml.ScalarEvent) or event.tag is not None or event.anchor is not None:
            raise _refuse("a key must be a plain word", place)
        key = (*path, event.value)
        if event.value in values:
            raise _refuse(f"{event.value} is given twice; first at {document.places[key]}", place)
        document.places[key] = place
        values[event.value] = _value(document, events, next(events), key)
    return values


def _scalar(text: str, place: str) -> Any:
    if text in ("", "~", "null"):
        return None
    if text in ("true", "false"):
        return text == "true"
    if _LEADING_ZERO.fullmatch(text):
        fix = f"write {text.lstrip('0')}"
        raise _refuse(f"{text} starts with 0, which other readers take for octal", place, fix)
    if _NOT_FINITE.fullmatch(text):
        raise _refuse(f"{text} is not a finite number", place)
    if _INTEGER.fullmatch(text):
        return int(text) if len(text) < 20 else float(text)
    return float(text) if _FLOAT.fullmatch(text) else text
