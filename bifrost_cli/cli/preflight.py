"""What can be refused before a model library is imported: outputs, prompts, images, references, sources.

Each function takes a command's parameters and raises what the command would raise later; it imports neither torch,
transformers nor diffusers, so that a wrong command line ends in a second.
"""

from __future__ import annotations

import re
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from bifrost_cli.artifacts import default_path, newest, resolve
from bifrost_cli.artifacts.draft import require_place
from bifrost_cli.artifacts.manifest import require_new
from bifrost_cli.errors import EnvironmentProblem, UsageError
from bifrost_cli.runtime.ui import Ui

if TYPE_CHECKING:
    from bifrost_cli.config.schema import Recipe

_FILES = (".tar", ".parquet", ".jsonl", ".csv", ".tsv")


def extract_latents(recipe: Recipe, source: str | None, output: Path | None, workspace: Path, **_: Any) -> None:
    """An output that cannot be written, or a local source that is not there."""
    if output is not None:
        require_place(output) if not output.is_symlink() else None
    if source is None:
        return
    from bifrost_cli.data.sources.hf_datasets import HUB
    from bifrost_cli.data.sources.listing import list_source
    from bifrost_cli.data.sources.remote import expand, is_remote
    from bifrost_cli.data.sources.scan import SHAPES
    from bifrost_cli.extraction.choose_source import refuse_output

    refuse_output(source, output, workspace)
    if not is_remote(source) and not source.startswith((HUB, SHAPES)):
        places = [Path(place) for place in expand(source)]
        if not all(place.is_dir() or (place.exists() and place.suffix in _FILES) for place in places):
            list_source(source, recipe.latents)  # it says why


def train(latents: str | None, output: Path | None, workspace: Path, **_: Any) -> None:
    """No latents to train on, or an output that cannot be written."""
    resolve(workspace, latents, "latents") if latents is not None else newest(workspace, "latents")
    if output is not None:
        require_place(output)


def generate(
    prompt: str | None,
    prompts: Path | None,
    output: Path | None,
    n: int,
    grid: bool,
    branch: str | None,
    controlnet: str | None,
    workspace: Path,
    **_: Any,
) -> None:
    """Prompts that cannot be used, an output that exists, artifacts that are not there."""
    from bifrost_cli.generation.requests import destination, read_prompts

    if prompt is not None and prompts is not None:
        raise UsageError("a prompt and --prompts were both given", fix="leave one of them out")
    given = prompt if prompts is None else prompts
    count = 1 if given is None else len(read_prompts(given, Ui()))
    file = destination(output, count * n)
    if file and grid:
        raise UsageError("--grid needs several images", fix="give a folder: -o DIR; or leave --grid out")
    if output is not None and file is None:
        require_place(output)
    for kind, ref in (("branch", branch), ("controlnet", controlnet)):
        if ref is not None:
            resolve(workspace, ref, kind)


def reconstruct(recipe: Recipe, image: Path, output: Path, controlnet: str | None, workspace: Path, **_: Any) -> None:
    """An image that cannot be read, an output that exists, a ControlNet that is not there."""
    from bifrost_cli.data.images import read_image
    from bifrost_cli.generation.requests import destination

    if destination(output, 1) is None:
        raise UsageError(f"{output} is not a PNG file", fix=f"-o {quote(f'{output}.png')}")
    read_image(image, recipe.images)
    if controlnet is not None:
        resolve(workspace, controlnet, "controlnet")


def ask(recipe: Recipe, image: Path, question: str, **_: Any) -> None:
    """An empty question, or an image that cannot be read."""
    from bifrost_cli.data.images import read_image

    if not question.strip():
        raise UsageError("the question is empty", fix='bifrost ask IMAGE "what is in the image?"')
    read_image(image, recipe.images)


def evaluate(samples: str | None, prompts: Path | None, gate: list[str] | None, output: Path | None, workspace: Path,
             **_: Any) -> None:  # fmt: skip
    """Gates that are none, samples that are not there, an output that cannot be written."""
    from bifrost_cli.evaluation.gates import Gate
    from bifrost_cli.generation.requests import read_prompts

    for text in gate or []:
        Gate.of(text)
    if samples is not None and not Path(samples).is_dir():
        resolve(workspace, samples, "samples")
    if prompts is not None:
        read_prompts(prompts, Ui())
    if output is not None:
        require_place(output)


def export(ref: str, output: Path | None, workspace: Path, **_: Any) -> None:
    """An artifact that is not there, or a folder that is."""
    artifact = resolve(workspace, ref)
    folder = output or default_path(workspace, "export", artifact.id)
    require_new(folder)


def import_checkpoint(source: str, **_: Any) -> None:
    """A source that is no folder and cannot be a hub id."""
    if not Path(source).expanduser().is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise EnvironmentProblem(f"{source} is neither a folder nor a hub id", fix="check the path", code="BF-ENV-020")
