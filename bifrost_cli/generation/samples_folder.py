"""A folder of images that an interrupted run left half-done is completed, image by image, and becomes an artifact.

`work/pictures.jsonl` has a line for each finished image, written after its files: an image counts only when every file
still has the sha256 of its line. `work/sketches` keeps latents that are predicted first, in the same way.
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
from bifrost_cli.runtime.launch import StopFlag
from bifrost_cli.runtime.ui import Ui

Facts = dict[str, Any]


def fill_folder(
    path: Path, identity: Mapping[str, Any], parents: Sequence[Artifact], requests: Sequence[ImageRequest],
    predict: Callable[[ImageRequest], PredictedLatents],
    render: Callable[[ImageRequest, PredictedLatents], tuple[dict[str, bytes], Facts]],
    commit: Callable[[Draft, Mapping[int, Facts]], Artifact], ui: Ui, *, latents_first: bool,
) -> Artifact:  # fmt: skip
    """Make the images that a samples folder lacks, and the artifact of all.

    `render` gives an image's files by name, and what to note with it; `commit` writes what is about all images, given
    what was noted, by index. `latents_first`: the latents of all images are predicted before one is rendered, so that
    the two need not be loaded at once. Stopped (75): a signal came; the next call goes on after the last whole image.
    """
    with StopFlag() as stop, Draft.open(path, "samples", identity, parents) as draft:
        if artifact := draft.complete:
            artifact.check()
            ui.say(f"{path} holds these images already; they were verified")
        else:
            log, total = ResumeLog(draft.path), len(requests)
            sketches = ResumeLog(draft.path, "sketches") if latents_first else None
            if there := sum(log.there(request) for request in requests):
                ui.say(f"{there} of {total} images are there already")

            def check(done: int) -> None:
                if stop.requested:
                    raise Stopped(f"stopped after {done} of {total} images; they are kept", at=str(path),
                                  fix="give the same command again; it continues")  # fmt: skip

            for finished in (log.there, log.done):  # first what is missing, then what is damaged
                missing = [request for request in requests if not finished(request)]
                if not missing:
                    continue
                with ui.progress(len(missing), "images") as bar:
                    for request in missing if sketches else ():
                        if sketches and not sketches.done(request):
                            check(total - len(missing))
                            sketches.add_latents(request, predict(request))
                    for done, request in enumerate(missing, start=total - len(missing)):
                        check(done)
                        predicted = sketches.latents(request) if sketches else predict(request)
                        log.add(request, *render(request, predicted))
                        bar.advance(1)
            artifact = commit(draft, log.facts)
    remove(path / "work")  # also if the last run was killed before it could
    sweep(path)
    return artifact


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

    def add_latents(self, request: ImageRequest, predicted: PredictedLatents) -> None:
        """Keep what was predicted until its image is rendered."""
        name = f"work/sketches/{request.index:05d}.safetensors"
        self.add(request, {name: latents_bytes(predicted)}, {"plan": predicted.plan, "cut": predicted.cut})

    def latents(self, request: ImageRequest) -> PredictedLatents:
        """What `add_latents` kept."""
        (name,) = self._files[request.index]
        latents_PC = load((self.folder / name).read_bytes())["latents"]
        return PredictedLatents(request.prompt, **self.facts[request.index], latents_PC=latents_PC)


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
