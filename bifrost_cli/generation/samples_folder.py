"""A folder of images that an interrupted run left half-done is completed, image by image, and becomes an artifact.

`work/pictures.jsonl` has a line for each finished image, written after its files: an image counts only when every file
still has the sha256 of its line. Where latents are predicted first, `work/sketches` keeps them in the same way. The
next attempt looks only whether files are there; they are read once, when all are.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from bifrost_cli.artifacts import Artifact, Draft
from bifrost_cli.artifacts.files import append, make_folder, remove, sha256_file, sweep, sync, write_bytes
from bifrost_cli.artifacts.identity import digest_of
from bifrost_cli.errors import Stopped
from bifrost_cli.generation.requests import ImageRequest
from bifrost_cli.generation.stages import PredictedLatents
from bifrost_cli.runtime.signals import StopFlag
from bifrost_cli.runtime.ui import Ui

Facts = dict[str, Any]
Predict = Callable[[ImageRequest], PredictedLatents]
Render = Callable[[ImageRequest, PredictedLatents], tuple[dict[str, bytes], Facts]]


def fill_folder(
    path: Path,
    identity: Mapping[str, Any],
    parents: Sequence[Artifact],
    requests: Sequence[ImageRequest],
    predict: Predict,
    render: Render,
    commit: Callable[[Draft, Mapping[int, Facts]], Artifact],
    ui: Ui,
    *,
    latents_first: bool,
) -> Artifact:
    """Make the images that a samples folder lacks, and the artifact of all.

    Args:
        path: the folder.
        identity: what decides its images.
        parents: the artifacts that they are made with.
        requests: one for each image.
        predict: patch latents of a request.
        render: an image's files by name, and what to note with it, from its request and patch latents.
        commit: writes what is about all images; given the draft and what was noted, by index.
        ui: hears how many there are already.
        latents_first: predict the latents of all images before rendering one: the two need not be loaded at once.

    Raises:
        Stopped: a signal came; the next call goes on after the last whole image.
        ArtifactError: the folder holds something else, or finished images that were damaged since.
    """
    with StopFlag() as stop, Draft.open(path, "samples", identity, parents) as draft:
        if artifact := draft.complete:
            artifact.check()
            ui.say(f"{path} holds these images already; they were verified")
        else:
            log = ResumeLog(draft.path)
            if there := sum(log.there(request) for request in requests):
                ui.say(f"{there} of {len(requests)} images are there already")
            for finished in (log.there, log.done):  # first what is missing, then what is damaged
                missing = [request for request in requests if not finished(request)]
                if missing:
                    _make(missing, len(requests), log, stop, predict, render, ui, latents_first)
            artifact = commit(draft, log.facts)
    remove(path / "work")  # also if the last run was killed before it could
    sweep(path)
    return artifact


def _make(
    missing: Sequence[ImageRequest],
    total: int,
    log: ResumeLog,
    stop: StopFlag,
    predict: Predict,
    render: Render,
    ui: Ui,
    latents_first: bool,
) -> None:
    def check(rendered: int = 0) -> None:
        if stop.requested:
            raise Stopped(f"stopped after {total - len(missing) + rendered} of {total} images; they are kept",
                          at=str(log.folder), fix="give the same command again; it continues")  # fmt: skip

    with ui.progress(len(missing), "images") as bar:
        if latents_first:
            sketches = ResumeLog(log.folder, "sketches")
            for request in missing:
                if not sketches.done(request):
                    check()
                    predicted = predict(request)
                    noted = {"plan": predicted.plan, "cut": predicted.cut}
                    sketches.add(request, {_sketch(request): latents_bytes(predicted)}, noted)

            def kept(request: ImageRequest) -> PredictedLatents:
                latents_PC = load((log.folder / _sketch(request)).read_bytes())["latents"]
                return PredictedLatents(request.prompt, **sketches.facts[request.index], latents_PC=latents_PC)

            predict = kept
        for done, request in enumerate(missing):
            check(done)
            log.add(request, *render(request, predict(request)))
            bar.advance(1)


class ResumeLog:
    """The log of an unfinished folder. `facts[index]` is what was noted with a finished image."""

    def __init__(self, folder: Path, name: str = "pictures") -> None:
        self.folder, self._path = folder, folder / "work" / f"{name}.jsonl"
        make_folder(self._path.parent)
        data = self._path.read_bytes() if self._path.exists() else b""
        lines = [line for line in itertools.takewhile(bool, map(_line, data.splitlines(keepends=True))) if line]
        whole = data[: sum(length for _, length in lines)]
        if whole != data:  # what a kill or a power cut left after the whole lines
            write_bytes(self._path, whole)
        self.facts: dict[int, Facts] = {value["index"]: value["facts"] for value, _ in lines}
        self._files: dict[int, dict[str, str]] = {value["index"]: value["files"] for value, _ in lines}

    def there(self, request: ImageRequest) -> bool:
        """True when the image was finished and its files are there; nothing of them is read."""
        files = self._files.get(request.index)
        return files is not None and all((self.folder / name).is_file() for name in files)

    def done(self, request: ImageRequest) -> bool:
        """True when the image's files are there and unchanged."""
        files = self._files.get(request.index, {})
        return self.there(request) and all(sha256_file(self.folder / name) == files[name] for name in files)

    def add(self, request: ImageRequest, files: Mapping[str, bytes], facts: Mapping[str, Any]) -> None:
        """Write an image's files, then its line. DiskFull when there is no room; earlier images are kept."""
        for name, data in files.items():
            make_folder((self.folder / name).parent)
            write_bytes(self.folder / name, data)
        digests = {name: sha256_file(self.folder / name) for name in files}
        value = {"index": request.index, "files": digests, "facts": dict(facts)}
        append(self._path, json.dumps({**value, "digest": digest_of(value)}, ensure_ascii=False) + "\n")
        sync(self._path)
        sync(self._path.parent)
        self._files[request.index], self.facts[request.index] = digests, dict(facts)


def latents_bytes(predicted: PredictedLatents) -> bytes:
    """The patch latents as a safetensors file, exactly."""
    return save({"latents": predicted.latents_PC.contiguous()})


def _sketch(request: ImageRequest) -> str:
    return f"work/sketches/{request.index:05d}.safetensors"


def _line(text: bytes) -> tuple[dict[str, Any], int] | None:
    """The value of one line and its length; None unless it is the line that was written."""
    try:
        value = json.loads(text)
        digest = value.pop("digest")
    except (ValueError, AttributeError, KeyError, TypeError):
        return None
    return (value, len(text)) if text.endswith(b"\n") and digest == digest_of(value) else None
