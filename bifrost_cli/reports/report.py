"""report: one artifact, or a training that is still running, as a page to look at; two of a kind, side by side.

In: a reference to an artifact of any kind, or the folder of an unfinished training. Out: one HTML file. A page is a
view: it can be made again at any time, so the default place is simply written again. Computes no new number of a
model.
"""

from __future__ import annotations

from pathlib import Path

from bifrost_cli.artifacts import Artifact, resolve
from bifrost_cli.artifacts.files import make_folder, read_json, write_bytes
from bifrost_cli.artifacts.manifest import DRAFT, MANIFEST
from bifrost_cli.errors import UsageError
from bifrost_cli.reports import page
from bifrost_cli.reports.artifact_pages import (
    TRAININGS,
    latents_sections,
    origin_sections,
    samples_sections,
    training_sections,
)
from bifrost_cli.reports.compare import compare_page
from bifrost_cli.runtime.ui import Ui


def report(
    ref: Path | str,
    other: Path | str | None = None,
    *,
    output: Path | str | None = None,
    workspace: Path | str = "runs",
    force: bool = False,
    device: str = "auto",
    ui: Ui | None = None,
) -> Path:
    """Write the page of `ref`, or of `ref` beside `other` of the same kind, and return its file.

    `output` is a new .html file; None writes `workspace/pages/ID.html`, again if it is there. `force` takes differences
    of numbers that were not measured alike. UsageError (2): kinds that differ, an output that exists or is no .html.
    ArtifactError, StoreError (5): damage.
    """
    ui, workspace = ui or Ui(), Path(workspace)
    if other is not None:
        sides = [resolve(workspace, one) for one in (ref, other)]
        name, html = f"{sides[0].id}-and-{sides[1].id}", compare_page(*sides, workspace, force, ui)
    else:
        name, html = _one(ref, workspace, device, ui)
    file = _file(output, workspace, name)
    make_folder(file.parent)
    write_bytes(file, html.encode("utf-8"))
    return file


def _file(output: Path | str | None, workspace: Path, name: str) -> Path:
    if output is None:
        return workspace / "pages" / f"{name}.html"
    file = Path(output)
    if file.suffix != ".html":
        raise UsageError(f"{file} is no .html file", fix=f"-o {file}.html")
    if file.exists():
        raise UsageError(f"{file} exists already", fix="choose another name with -o", code="BF-USE-002")
    return file


def _one(ref: Path | str, workspace: Path, device: str, ui: Ui) -> tuple[str, str]:
    folder = Path(ref)
    if (folder / DRAFT).is_file() and not (folder / MANIFEST).exists():
        return folder.name, _unfinished(folder)
    artifact = resolve(workspace, ref)
    if artifact.kind == "latents":  # the store checks what it reads; it may be terabytes
        sections = latents_sections(artifact, device, ui)
    else:
        artifact.check()
    if artifact.kind == "report":
        return artifact.id, artifact.file("report.html").read_text("utf-8")
    if artifact.kind in TRAININGS:
        sections = training_sections(artifact.path, artifact.path / "samples", artifact.info)
    if artifact.kind == "samples":
        sections = samples_sections(artifact, workspace)
    sections += origin_sections(artifact, workspace)
    return artifact.id, page.page(f"{artifact.kind.capitalize()} {artifact.id}", _summary(artifact), sections)


def _unfinished(folder: Path) -> str:
    kind = read_json(folder / DRAFT).get("kind")
    if kind not in TRAININGS:
        raise UsageError(f"{folder} is an unfinished {kind}; there is nothing to look at yet",
                         fix="give the command that makes it again; it continues")  # fmt: skip
    sections = training_sections(folder / "work", folder / "work" / "samples", {})
    return page.page(f"Training of a {kind}", f"unfinished, in {folder.name}", sections)


def _summary(artifact: Artifact) -> str:
    made = artifact.manifest["made"]
    return f"made {made['when'][:16].replace('T', ' ')} UTC, recipe {artifact.info.get('recipe', {}).get('name', '?')}"
