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
from bifrost_cli.generation.prior import PredictedLatents
from bifrost_cli.generation.requests import ImageRequest
from bifrost_cli.runtime.signals import StopFlag
from bifrost_cli.runtime.ui import Ui

Facts = dict[str, Any]


class SamplesFolder:
    """A samples artifact in the making.

    Args:
        path: its folder.
        identity: what decides its images.
        parents: the artifacts that they are made with.
        requests: one for each image.
        ui: hears how many there are already.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        parents: Sequence[Artifact],
        requests: Sequence[ImageRequest],
        ui: Ui,
    ) -> None:
        self.path, self.identity, self.parents, self.requests, self.ui = path, identity, parents, requests, ui

    def fill(
        self,
        predict: Callable[[ImageRequest], PredictedLatents],
        render: Callable[[ImageRequest, PredictedLatents], tuple[dict[str, bytes], Facts]],
        commit: Callable[[Draft, Mapping[int, Facts]], Artifact],
        *,
        latents_first: bool,
    ) -> Artifact:
        """Make the images that are missing, and the artifact of all.

        Args:
            predict: patch latents of a request.
            render: an image's files by name, and what to note with it, from its request and patch latents.
            commit: writes what is about all images; given the draft and what was noted, by index.
            latents_first: predict the latents of all images before rendering one: the two need not be loaded at once.

        Raises:
            Stopped: a signal came; the next call goes on after the last whole image.
            ArtifactError: the folder holds something else, or finished images that were damaged since.
        """
        with StopFlag() as stop, Draft.open(self.path, "samples", self.identity, self.parents) as draft:
            if draft.complete:
                draft.complete.check()
                tidy(self.path)
                self.ui.say(f"{self.path} holds these images already; they were verified")
                return draft.complete
            log = ResumeLog(draft.path)
            if there := sum(log.there(request.index) for request in self.requests):
                self.ui.say(f"{there} of {len(self.requests)} images are there already")
            for finished in (log.there, log.done):  # first what is missing, then what is damaged
                missing = [request for request in self.requests if not finished(request.index)]
                self._make(missing, log, stop, predict, render, latents_first)
            artifact = commit(draft, log.facts)
        tidy(self.path)
        return artifact

    def _make(
        self,
        missing: list[ImageRequest],
        log: ResumeLog,
        stop: StopFlag,
        predict: Callable[[ImageRequest], PredictedLatents],
        render: Callable[[ImageRequest, PredictedLatents], tuple[dict[str, bytes], Facts]],
        latents_first: bool,
    ) -> None:
        total = len(self.requests)

        def check(rendered: int = 0) -> None:
            if stop.requested:
                done = total - len(missing) + rendered
                raise Stopped(f"stopped after {done} of {total} images; they are kept", at=str(self.path),
                              fix="give the same command again; it continues")  # fmt: skip

        if not missing:
            return
        with self.ui.progress(len(missing), "images") as bar:
            if latents_first:
                cache = LatentsCache(self.path)
                for request in missing:
                    if not cache.done(request):
                        check()
                        cache.add(request, predict(request))
                predict = cache.read
            for done, request in enumerate(missing):
                check(done)
                log.add(request.index, *render(request, predict(request)))
                bar.advance(1)


class ResumeLog:
    """The log of an unfinished folder. `facts[index]` is what was noted with a finished image."""

    def __init__(self, folder: Path, name: str = "pictures") -> None:
        self.folder, self._path = folder, folder / "work" / f"{name}.jsonl"
        make_folder(self._path.parent)
        lines = self._lines()
        self.facts: dict[int, Facts] = {line["index"]: line["facts"] for line in lines}
        self._files: dict[int, dict[str, str]] = {line["index"]: line["files"] for line in lines}

    def there(self, index: int) -> bool:
        """True when the image was finished and its files are there; nothing of them is read."""
        files = self._files.get(index)
        return files is not None and all((self.folder / name).is_file() for name in files)

    def done(self, index: int) -> bool:
        """True when the image's files are there and unchanged."""
        files = self._files.get(index)
        return files is not None and all(self._same(name, digest) for name, digest in files.items())

    def add(self, index: int, files: Mapping[str, bytes], facts: Mapping[str, Any]) -> None:
        """Write an image's files, then its line. DiskFull when there is no room; earlier images are kept."""
        for name, data in files.items():
            make_folder((self.folder / name).parent)
            write_bytes(self.folder / name, data)
        digests = {name: sha256_file(self.folder / name) for name in files}
        value = {"index": index, "files": digests, "facts": dict(facts)}
        line = json.dumps({**value, "digest": digest_of(value)}, ensure_ascii=False)
        append(self._path, line + "\n")
        sync(self._path)
        sync(self._path.parent)
        self._files[index], self.facts[index] = digests, dict(facts)

    def _same(self, name: str, digest: str) -> bool:
        path = self.folder / name
        return path.is_file() and sha256_file(path) == digest

    def _lines(self) -> list[dict[str, Any]]:
        """Every whole line; what a kill or a power cut left after them is cut off."""
        if not self._path.exists():
            return []
        data = self._path.read_bytes()
        lines = [line for line in itertools.takewhile(bool, map(_line, data.splitlines(keepends=True))) if line]
        whole = data[: sum(length for _, length in lines)]
        if whole != data:
            write_bytes(self._path, whole)
        return [line for line, _ in lines]


class LatentsCache:
    """Predicted latents of an unfinished folder, until their images are rendered."""

    def __init__(self, folder: Path) -> None:
        self._log, self._folder = ResumeLog(folder, "sketches"), folder

    def done(self, request: ImageRequest) -> bool:
        """True when the request's latents are there and unchanged."""
        return self._log.done(request.index)

    def add(self, request: ImageRequest, predicted: PredictedLatents) -> None:
        """Keep a request's latents."""
        files = {self._name(request): latents_bytes(predicted)}
        self._log.add(request.index, files, {"plan": predicted.plan, "cut": predicted.cut})

    def read(self, request: ImageRequest) -> PredictedLatents:
        """The latents of a request that was added."""
        latents_PC = load((self._folder / self._name(request)).read_bytes())["latents"]
        facts = self._log.facts[request.index]
        return PredictedLatents(request.prompt, facts["plan"], facts["cut"], latents_PC)

    def _name(self, request: ImageRequest) -> str:
        return f"work/sketches/{request.index:05d}.safetensors"


def latents_bytes(predicted: PredictedLatents) -> bytes:
    """The patch latents as a safetensors file, exactly."""
    return save({"latents": predicted.latents_PC.contiguous()})


def tidy(folder: Path) -> None:
    """The images are an artifact: the log of which are done goes, also if the last run was killed before it could."""
    remove(folder / "work")
    sweep(folder)


def _line(text: bytes) -> tuple[dict[str, Any], int] | None:
    """The value of one line and its length; None unless it is the line that was written."""
    try:
        value = json.loads(text)
        digest = value.pop("digest")
    except (ValueError, AttributeError, KeyError, TypeError):
        return None
    return (value, len(text)) if text.endswith(b"\n") and digest == digest_of(value) else None
