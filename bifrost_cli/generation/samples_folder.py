"""A folder of images that an interrupted run left half-done is completed, image by image, and becomes an artifact.

`work/pictures.jsonl` has a line for each finished image, written after its files: an image counts only when every file
still has the sha256 of its line. `work/sketches` keeps latents that are predicted first, in the same way. Of several
processes each has logs of its own, with its number.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load, save

from bifrost_cli.artifacts import Artifact, Draft
from bifrost_cli.artifacts.files import append, make_folder, remove, sha256_file, sweep, sync, write_bytes
from bifrost_cli.artifacts.identity import digest_of
from bifrost_cli.errors import Stopped
from bifrost_cli.generation.requests import ImageRequest
from bifrost_cli.generation.stages import PredictedLatents
from bifrost_cli.runtime import distributed
from bifrost_cli.runtime.launch import StopFlag
from bifrost_cli.runtime.ui import Ui, counted

Facts = dict[str, Any]


class Work(NamedTuple):
    """How the images of a folder are made, some requests at a time.

    Attributes:
        predict: their patch latents.
        render: of each its files by name, and what to note with it.
        commit: writes what is about all images, given what was noted, by index, and commits.
        latents_first: the latents of all images are predicted before one is rendered, so that the two need not be
            loaded at once.
        batch: how many at a time.
    """

    predict: Callable[[Sequence[ImageRequest]], Sequence[PredictedLatents]]
    render: Callable[[Sequence[ImageRequest], Sequence[PredictedLatents]], Sequence[tuple[dict[str, bytes], Facts]]]
    commit: Callable[[Draft, Mapping[int, Facts]], Artifact]
    latents_first: bool = False
    batch: int = 1


def fill_folder(
    path: Path, identity: Mapping[str, Any], parents: Sequence[Artifact], requests: Sequence[ImageRequest], work: Work,
    ui: Ui,
) -> Artifact:  # fmt: skip
    """Make the images that a samples folder lacks, and the artifact of all; several processes each make their part.

    Stopped (75): a signal came; the next call, of any number of processes, goes on after the last whole images.
    """
    with StopFlag() as stop, distributed.main_context(lambda: Draft.open(path, "samples", identity, parents)) as draft:
        if distributed.run_on_main(lambda: draft is not None and draft.complete is not None):
            artifact = Artifact.open(path)
            distributed.run_on_main(artifact.check)
            ui.say(f"{path} holds these images already; they were verified")
        else:
            _make_all(path, requests, work, stop, ui)
            distributed.run_on_main(lambda: bool(draft and work.commit(draft, ResumeLog(path).facts)))
            artifact = Artifact.open(path)
    distributed.run_on_main(lambda: _clear(path))  # also if the last run was killed before it could
    return artifact


def _clear(path: Path) -> None:
    remove(path / "work")
    sweep(path)


def _make_all(path: Path, requests: Sequence[ImageRequest], work: Work, stop: StopFlag, ui: Ui) -> None:
    """First what is missing, then what is damaged."""
    distributed.run_on_main(lambda: ResumeLog.mend(path))
    log, total, processes = ResumeLog(path), len(requests), distributed.world()
    missing = [request for request in requests if not log.there(request)]
    if len(missing) < total:
        ui.say(f"{total - len(missing)} of {total} images are there already")
    if processes > len(missing) > 0:
        idle = f"{processes - len(missing)} of the {processes} processes have nothing to do"
        ui.say(f"{counted(len(missing), 'image')} to be made: {idle}")
    distributed.raise_if_any_failed()  # all have looked before one writes
    with distributed.raise_together():
        _make(path, distributed.part(missing), total, work, stop, ui)
    log.read()
    damaged = [request for request in distributed.part(requests) if not log.done(request)]
    with distributed.raise_together():
        _make(path, damaged, total, work, stop, ui)


def _make(path: Path, requests: Sequence[ImageRequest], total: int, work: Work, stop: StopFlag, ui: Ui) -> None:
    """The images of this process, in turn, until another process fails."""
    if not requests:
        return
    log, sketches = ResumeLog(path), ResumeLog(path, "sketches")
    chunks = [requests[start : start + work.batch] for start in range(0, len(requests), work.batch)]
    before = total - len(requests) if distributed.world() == 1 else 0

    def goes_on(done: int) -> bool:
        if stop.requested:
            raise Stopped(f"stopped after {before + done} of {total} images; they are kept", at=str(path),
                          fix="give the same command again; it continues")  # fmt: skip
        return not distributed.other_process_failed()

    with ui.progress(len(requests), "images") as bar:
        for chunk in chunks if work.latents_first else ():
            lacking = [request for request in chunk if not sketches.done(request)]
            if lacking and goes_on(0):
                for request, predicted in zip(lacking, work.predict(lacking), strict=True):
                    sketches.add_latents(request, predicted)
        done = 0
        for chunk in chunks:
            if not goes_on(done):
                return
            latents = [sketches.latents(request) for request in chunk] if work.latents_first else work.predict(chunk)
            for request, (files, facts) in zip(chunk, work.render(chunk, latents), strict=True):
                log.add(request, files, facts)
            done += len(chunk)
            bar.advance(len(chunk))


class ResumeLog:
    """The log of an unfinished folder. `facts[index]` is what was noted with a finished image.

    Each process of a job appends to a file of its own, and reads all: another number of processes can go on.
    """

    def __init__(self, folder: Path, name: str = "pictures") -> None:
        own = f"{name}-{distributed.rank()}" if distributed.rank() else name
        self.folder, self._name, self._path = folder, name, folder / "work" / f"{own}.jsonl"
        make_folder(self._path.parent)
        self.read()

    def read(self) -> None:
        """What all processes have noted so far."""
        self.facts: dict[int, Facts] = {}
        self._files: dict[int, dict[str, str]] = {}
        for path in _logs(self._path.parent, self._name):
            for value, _ in _whole_lines(path.read_bytes()):
                self.facts[value["index"]], self._files[value["index"]] = value["facts"], value["files"]

    @staticmethod
    def mend(folder: Path) -> None:
        """Cut off what a kill or a power cut left after the whole lines, before any process appends."""
        for path in _logs(folder / "work"):
            data = path.read_bytes()
            whole = data[: sum(length for _, length in _whole_lines(data))]
            if whole != data:
                write_bytes(path, whole)

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

    def add_latents(self, request: ImageRequest, predicted: PredictedLatents) -> None:
        """Keep what was predicted until its image is rendered."""
        name = f"work/sketches/{request.index:05d}.safetensors"
        self.add(request, {name: latents_bytes(predicted)}, {"plan": predicted.plan, "cut": predicted.cut})

    def latents(self, request: ImageRequest) -> PredictedLatents:
        """What `add_latents` kept."""
        (name,) = self._files[request.index]
        latents_PC = load((self.folder / name).read_bytes())["latents"]
        return PredictedLatents(request.prompt, **self.facts[request.index], latents_PC=latents_PC)


def _logs(folder: Path, name: str = "*") -> list[Path]:
    """The log of the first process, then those of others; a later line of one image counts."""
    return sorted({*folder.glob(f"{name}.jsonl"), *folder.glob(f"{name}-*.jsonl")}) if folder.is_dir() else []


def _whole_lines(data: bytes) -> list[tuple[dict[str, Any], int]]:
    """The values of the whole lines that a log begins with, and their lengths."""
    return [line for line in itertools.takewhile(bool, map(_line, data.splitlines(keepends=True))) if line]


def latents_bytes(predicted: PredictedLatents) -> bytes:
    """The patch latents as a safetensors file, exactly."""
    return save({"latents": predicted.latents_PC.contiguous()})


def _line(text: bytes) -> tuple[dict[str, Any], int] | None:
    """The value of one line and its length; None unless it is the line that was written."""
    try:
        value = json.loads(text)
        digest = value.pop("digest")
    except (ValueError, AttributeError, KeyError, TypeError):
        return None
    return (value, len(text)) if text.endswith(b"\n") and digest == digest_of(value) else None
