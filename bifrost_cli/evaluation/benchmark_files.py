"""`bifrost fetch`: the published files that metrics need, into the places where `eval` looks for them.

What arrives is checked (a sha256, or that it is the whole benchmark) before it gets its name.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bifrost_cli.artifacts.files import finish_file, growing_file, make_folder, remove, sha256_file, write_bytes
from bifrost_cli.errors import ArtifactError, DataError, EnvironmentProblem, UsageError
from bifrost_cli.runtime.ui import Ui

SECONDS = 30.0  # a server may be silent
LARGEST = 2**28  # bytes of a file
DPG_PROMPTS = 1065
_AGAIN = "give the same command again in a few minutes"


@dataclass(frozen=True)
class BenchmarkFile:
    """One published file: where it is from, where it goes, and how it is known to be whole."""

    name: str
    url: str
    about: str  # whose it is, and its licence
    folder: Callable[[], Path]
    check: Callable[[Path], None]  # raises for a file that is not the published one
    sha256: str = ""  # its first digits, where the project knows them: such a file is resumed

    @property
    def path(self) -> Path:
        """Where `eval` looks for it."""
        return self.folder() / self.name


def cached(name: str) -> Path | None:
    """The file of a benchmark that was fetched, or None."""
    path = BENCHMARKS[name].path
    return path if path.is_file() else None


def fetch(name: str, *, dry_run: bool = False, ui: Ui | None = None) -> dict[str, Any]:
    """Download a benchmark's file unless it is here.

    Args:
        name: one of `BENCHMARKS`.
        dry_run: only ask the server for the size.
        ui: hears the size before the first byte is kept, and progress.

    Returns:
        `path`, `url`, `bytes`, `sha256` and whether it was `there` already; of a dry run no `sha256`.

    Raises:
        UsageError: no such benchmark.
        EnvironmentProblem: BF-ENV-023 offline or no network, 024 the server failed; what has arrived of a file with a
            known sha256 is kept, and the next call goes on with it.
        ArtifactError, DataError: what arrived is not the published file; it is removed.
    """
    if name not in BENCHMARKS:
        raise UsageError(f"there is no benchmark {name}", fix=f"one of {', '.join(BENCHMARKS)}")
    ui, file = ui or Ui(), BENCHMARKS[name]
    told: dict[str, Any] = {"path": str(file.path), "url": file.url, "about": file.about, "there": file.path.is_file()}
    if told["there"]:
        ui.say(f"{file.path} is here already")
    elif dry_run:
        with _answer(file, "HEAD") as response:
            return {**told, "bytes": _length(response)}
    else:
        make_folder(file.path.parent)
        partial = file.path.with_name(f"{file.name}.partial")
        _download(file, partial, ui)
        try:
            file.check(partial)
        except (ArtifactError, DataError):
            remove(partial)
            raise
        finish_file(partial, file.path)
    if name == "dpg":
        told["prompts"] = str(_dpg_prompts(file.path))
    size = {"bytes": file.path.stat().st_size}
    return {**told, **size} if dry_run else {**told, **size, "sha256": sha256_file(file.path)}


def _download(file: BenchmarkFile, partial: Path, ui: Ui) -> None:
    """All bytes into `partial`; where a part is there and the sha256 is known, only the rest is asked for."""
    with growing_file(partial) as growing:
        have = growing.size if file.sha256 else 0
        with _answer(file, "GET", {"Range": f"bytes={have}-"} if have else {}) as response:
            if response.status_code != 206:  # the whole file: no part was there, or the server gives none
                have = 0
            growing.keep(have)
            length = _length(response)
            size = f"{(length + have) / 1e6:.1f} MB" if length else "a size that the server does not say"
            ui.say(f"{file.name}: {size}{f', of which {have / 1e6:.1f} MB are here' if have else ''}, from {file.url}")
            with ui.progress(length or 0, "bytes") as bar:
                for block in response.iter_bytes():
                    have += len(block)
                    if have > LARGEST:
                        raise DataError(f"{file.url} sends more than {LARGEST} bytes", code="BF-DATA-005")
                    growing.write(block)
                    bar.advance(len(block))


@contextmanager
def _answer(file: BenchmarkFile, method: str, headers: dict[str, str] | None = None) -> Iterator[Any]:
    """The server's answer, its body not yet read; its troubles as ours."""
    from huggingface_hub import get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    from bifrost_cli.loading.resolve import HUB_ERRORS

    # Bytes as they are: a compressed answer has another length, and no part of it can be asked for.
    sent = {"Accept-Encoding": "identity", **(headers or {})}
    try:
        with get_session().stream(method, file.url, headers=sent, timeout=SECONDS, follow_redirects=True) as response:
            if response.status_code == 416:
                raise EnvironmentProblem(f"what is here of {file.name} is longer than the file of {file.url}",
                                         fix=f"rm {file.path}.partial", code="BF-ENV-024")  # fmt: skip
            if response.status_code >= 400:
                raise EnvironmentProblem(f"{file.url} answers {response.status_code}", fix=_by_hand(file),
                                         code="BF-ENV-024")  # fmt: skip
            yield response
    except OfflineModeIsEnabled as error:
        raise EnvironmentProblem(f"{file.name} is not here, and this run is offline", fix=_by_hand(file),
                                 code="BF-ENV-023") from error  # fmt: skip
    except HUB_ERRORS as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EnvironmentProblem(f"the download of {file.url} broke off", at=said,
                                 fix=f"{_AGAIN}, or {_by_hand(file)}", code="BF-ENV-024") from error  # fmt: skip


def _length(response: Any) -> int | None:
    length = response.headers.get("content-length", "")
    return int(length) if length.isdecimal() else None


def _by_hand(file: BenchmarkFile) -> str:
    return f"put {file.url} at {file.path}"


def _benchmarks_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bifrost" / "benchmarks"


def _torch_folder() -> Path:
    from bifrost_cli.evaluation.networks import torch_checkpoints

    return torch_checkpoints()


def _is_inception(path: Path) -> None:
    known = BENCHMARKS["inception"].sha256
    if not (found := sha256_file(path)).startswith(known):
        raise ArtifactError(f"what arrived has the sha256 {found[:8]}..., not {known}...", fix=_AGAIN,
                            code="BF-ART-005")  # fmt: skip


def _is_geneval(path: Path) -> None:
    from bifrost_cli.evaluation.metrics.geneval import PROMPTS, read_asked

    if (found := Counter(line["tag"] for line in read_asked(path))) != PROMPTS:
        counts = ", ".join(f"{tag} {count}" for tag, count in sorted(found.items()))
        raise DataError("what arrived is not all of GenEval's prompts", at=counts, fix=_AGAIN, code="BF-DATA-005")


def _is_dpg(path: Path) -> None:
    from bifrost_cli.evaluation.metrics.dpg import read_questions

    if (found := len(read_questions(path))) != DPG_PROMPTS:
        raise DataError(f"what arrived has {found} prompts; DPG-Bench has {DPG_PROMPTS}", fix=_AGAIN,
                        code="BF-DATA-005")  # fmt: skip


def _dpg_prompts(questions: Path) -> Path:
    """The prompts of the questions in their order, as `generate --prompts` reads them, beside their file."""
    from bifrost_cli.evaluation.metrics.dpg import read_questions

    path = questions.with_name("dpg_prompts.jsonl")
    if not path.is_file():
        lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in read_questions(questions))
        write_bytes(path, "".join(lines).encode())
    return path


BENCHMARKS = {
    "geneval": BenchmarkFile(
        "evaluation_metadata.jsonl",
        "https://raw.githubusercontent.com/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl",
        "GenEval's 553 prompts (Ghosh et al. 2023), MIT, from the repository of its authors",
        _benchmarks_folder,
        _is_geneval,
    ),
    "dpg": BenchmarkFile(
        "dpg_bench.csv",
        "https://raw.githubusercontent.com/TencentQQGYLab/ELLA/main/dpg_bench/dpg_bench.csv",
        "DPG-Bench's questions (Hu et al. 2024), Apache-2.0, from the repository of its authors",
        _benchmarks_folder,
        _is_dpg,
    ),
    "inception": BenchmarkFile(
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "FID's Inception network, Apache-2.0, converted and released by torch-fidelity",
        _torch_folder,
        _is_inception,
        sha256="6726825d",
    ),
}
