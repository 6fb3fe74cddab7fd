"""What leaves the machine with a file: commands without the names of folders, and what a file would tell to others."""

from __future__ import annotations

import getpass
import json
import re
import shlex
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import IFD, Base
from safetensors import SafetensorError, safe_open

from bifrost_cli.artifacts.identity import KINDS
from bifrost_cli.config.load import recipe_names
from bifrost_cli.data.png import XMP_CHUNK
from bifrost_cli.data.xmp import is_ours, xmp_facts
from bifrost_cli.errors import public
from bifrost_cli.interop.published_names import public_name

HIDDEN = "..."  # in a shown command, in the place of a file's or a folder's name
_GROUPS = {"train", "data", "artifacts", "recipes", "shapes", "geneval", "bench"}  # commands of two words
_WORDS = {"generate", "ablate"}  # commands whose argument is no place
_VALUES = (  # options whose value is no place
    "--set -n --seed --gpus --device --prompt --gate --batch --min-samples --features --parts --decode-steps --steps "
    "--guidance-scale --branch-guidance --control-scale --missing-caption --bad-image --max-bad --animated "
    "--image-column --caption-column --captions --background"
).split()
_MODELS = ("--fd", "--judge", "--detector", "--encoder")
_SWITCHES = (
    "-q --quiet --json --debug --offline --dry-run --grid --timings --plan --no-plan --save-latents --quarters "
    "--explain --force-compare --fid --sfid --kid --is --prdc --shapes --clipscore --reconstruction"
).split()
_PUBLIC = re.compile(rf"(shapes|hf|builtin):[^/]*|(?:{'|'.join(KINDS)})-[0-9a-f]{{12}}|auto|-?[\d.,]+")
_EVERYBODY = {"root", "user", "admin", "ubuntu", "runner", "localhost", "home", "jovyan"}  # names that tell nothing
_TEXTS = {".json", ".jsonl", ".csv", ".tsv", ".txt", ".md", ".html", ".yaml", ".yml", ".log", ".jinja", ""}
_LONGEST = 64 * 2**20  # bytes of a text file that are looked at
_PATH = re.compile(
    r"(?<![\w.:/<>+=~%-])(?:~(?=/)|file://|[A-Za-z]:(?=[\\/]))?(?:\.\.)?[\\/](?:[\w.@+-]+[\\/])+[\w.@+-]*"
    r"|(?<![\w/])(?:\.\./)+[\w.@+/-]+"
)
_SECRET = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{20,})\b"
    r"|\b[a-z][a-z0-9+.-]*://[^\s/\"'@]+:[^\s/\"'@]+@\S+|https?://[^\s\"'<>]+[?&](?:sig|signature|token|key|X-Amz-\w+)=\S+"
)
_MAIL = re.compile(r"\b[\w.+-]+@[\w-]+\.[\w.-]*[a-z]\b", re.IGNORECASE)
_TOLD = {"prompt", "plan", "caption", "captions", "question", "answer", "text"}  # keys of what people wrote
_EXIF = {Base.Artist: "user", Base.Copyright: "user", Base.Make: "camera", Base.Model: "camera",
         Base.DateTime: "time", Base.HostComputer: "host"}  # fmt: skip


class Told(NamedTuple):
    """One thing that a file tells: where in the folder, of which kind, and the thing itself."""

    file: str
    kind: str
    value: str


def shared_command(command: str) -> str:
    """A command as a page may show it: options, prompts, ids and public names as typed, places hidden."""
    return shlex.join(shown for shown, _ in _words(command))


def without_places(text: str, commands: Iterable[str]) -> str:
    """A text without the places that these commands name (see `shared_command`), and without paths of the machine."""
    places = {typed for command in commands for shown, typed in _words(command) if shown == HIDDEN != typed}
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(f"folder {place}", "a folder")
        text = text.replace(place, "the folder") if re.search(r"[\\/]", place) else re.sub(
            rf"\b(of|statistics|from) {re.escape(place)}(?![\w-])", r"\1 the folder", text
        )  # fmt: skip
    return _PATH.sub(HIDDEN, text)


def _words(command: str) -> list[tuple[str, str]]:
    """Each word of a command as it may be shown, and as it was typed."""
    try:
        words = shlex.split(public(command))
    except ValueError:  # cut in the middle of a quoted text
        return [(HIDDEN, HIDDEN)]
    if not words:
        return []
    shown, before, names = [("bifrost", words[0])], "", 2 if words[1:2] and words[1] in _GROUPS else 1
    for number, word in enumerate(words[1:], start=1):
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", "")
        if equals:
            shown.append((f"{option}={_value(option, value)}", value))
        elif word.startswith("-") and word != "-" and not re.fullmatch(r"-[\d.]+", word):
            shown.append((word, word))
        else:
            typed = number <= names or (not before and words[1] in _WORDS)
            shown.append((word if typed else _value(before, word), word))
        before = word if word.startswith("-") and not equals and word not in _SWITCHES else ""
    return shown


def _value(option: str, value: str) -> str:
    if option == "--set" and "=" in value:
        key, _, given = value.partition("=")
        return f"{key}={public_name(given) if re.search(r'[/~]|[A-Za-z]:', given) else given}"
    if option in _MODELS:
        return public_name(value)
    place = option not in _VALUES and not _PUBLIC.fullmatch(value) and value not in recipe_names()
    return HIDDEN if place else value


def private_facts(path: Path) -> list[Told]:
    """What a file, or the files of a folder, would tell to whoever is given them.

    Args:
        path: an image, a page, any file of ours, or a folder (an artifact, an export), read to its last file.

    Returns:
        Paths, names of this user and host, secrets, mail addresses, prompts and captions, commands, and what a camera
        wrote, each once a file.
    """
    files = [path] if path.is_file() else sorted(inner for inner in path.rglob("*") if inner.is_file())
    found: dict[Told, None] = {}
    for file in files:
        name = file.name if file == path else file.relative_to(path).as_posix()
        for kind, value in _of_file(file):
            found[Told(name, kind, value)] = None
    return list(found)


def file_facts(path: Path) -> dict[str, str]:
    """The texts that an image holds, by their keys; none for what is no image."""
    try:
        with Image.open(path) as image:
            image.load()
            return _texts(image) | xmp_facts(image.info.get("xmp", b""))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return {}


def _of_file(file: Path) -> Iterator[tuple[str, str]]:
    suffix = file.suffix.lower()
    if suffix == ".safetensors":
        with suppress(SafetensorError, OSError), safe_open(file, "np") as tensors:
            yield from _of_value(tensors.metadata() or {})
    elif suffix in (".json", ".jsonl"):
        with file.open("rb") as stream:
            text = stream.read(_LONGEST).decode("utf-8", "replace")
        for part in [text] if suffix == ".json" else text.splitlines():
            try:
                yield from _of_value(json.loads(part))
            except (ValueError, RecursionError):
                yield from _of_text(part)
    elif suffix in _TEXTS:
        with file.open("rb") as stream:
            yield from _of_text(stream.read(_LONGEST).decode("utf-8", "replace"))
    else:
        try:
            with Image.open(file) as image:
                yield from _of_image(image)
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return  # not an image: bytes without text


def _of_image(image: Any) -> Iterator[tuple[str, str]]:
    image.load()
    exif = image.getexif()
    for tag, kind in _EXIF.items():
        if value := exif.get(tag):
            yield kind, str(value)
    if exif.get_ifd(IFD.GPSInfo):
        yield "place", "GPS coordinates"
    texts, packet = _texts(image), image.info.get("xmp", b"")
    if is_ours(packet):
        texts |= xmp_facts(packet)
    for key, value in image.info.items():
        if key == "comment" or (key == "xmp" and not is_ours(packet)):
            yield key, "metadata of another program"
            texts[key] = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    for key, text in texts.items():
        try:
            yield from _of_value(json.loads(text), key)
        except ValueError:
            yield from _of_value(text, key)


def _texts(image: Any) -> dict[str, str]:
    """An image's own texts, by key; its XMP is read apart."""
    return {str(key): value for key, value in image.info.items() if isinstance(value, str) and key != XMP_CHUNK}


def _of_value(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _of_value(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _of_value(inner, key)
    elif isinstance(value, str):
        if key.lower() in _TOLD and value.strip():
            yield "prompt" if key != "answer" else "answer", value
        elif key == "command":
            yield "command", value
        elif key == "path" and value and not _PATH.search(value):
            yield "path", value
        yield from _of_text(value)


def _of_text(text: str) -> Iterator[tuple[str, str]]:
    for kind, pattern in (("secret", _SECRET), ("mail", _MAIL), ("path", _PATH)):
        for match in pattern.finditer(text):
            yield kind, match[0].strip()
    for kind, name in _own_names():
        if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text):
            yield kind, name


def _own_names() -> Iterator[tuple[str, str]]:
    """The names of this user and this host, where they tell anything."""
    try:
        names = [("user", getpass.getuser())]
    except (KeyError, OSError, ImportError):
        names = []
    for kind, name in [*names, ("user", Path.home().name), ("host", socket.gethostname().partition(".")[0])]:
        if len(name) > 2 and name.lower() not in _EVERYBODY:
            yield kind, name
