"""Write the page of an artifact, of a training that is still running, or of two artifacts of a kind side by side.

A page is a view: it can be made again at any time, so the default place is simply written again. Computes no new number
of a model. What cannot be shown is refused before any heavy library is imported.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from bifrost_cli.artifacts import Artifact, lineage, resolve
from bifrost_cli.artifacts.files import make_folder, read_json, write_bytes, write_new
from bifrost_cli.artifacts.manifest import DRAFT, MANIFEST, require_new
from bifrost_cli.errors import UsageError
from bifrost_cli.runtime.ui import Ui

TRAININGS = ("branch", "controlnet")
BUILTIN = tuple(f"builtin:{kind}" for kind in TRAININGS)


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
    """Write one page.

    Args:
        ref: an artifact of any kind, `builtin:branch` or `builtin:controlnet`, or the folder of an unfinished training.
        other: another of the same kind, shown beside it.
        output: a new .html file; None writes `workspace/pages/ID.html`, again if it is there.
        force: take differences of numbers that were not measured alike.
        device: where a store's images are decoded.

    Returns:
        The file.

    Raises:
        UsageError (2): kinds that differ, an output that exists or is not .html.
        ArtifactError, StoreError (5): damage.
    """
    ui, workspace = ui or Ui(), Path(workspace)
    if other is not None:
        sides = [resolve(workspace, side) for side in (ref, other)]
        _check_pair(*sides)
    elif is_draft(Path(ref)):
        return _unfinished(Path(ref), output, workspace)
    else:
        sides = [resolve(workspace, ref)]
    file = _file(output, workspace, "-and-".join(side.id for side in sides))
    for side in sides:
        if side.kind != "latents":  # a store checks what it reads; it may be terabytes
            side.check()
    if other is not None:
        from bifrost_cli.reports.compare import compare_page  # torch and zarr, after everything that can be refused

        page = compare_page(sides[0], sides[1], workspace, force, ui)
    elif sides[0].kind == "report":
        return _write(file, sides[0].file("report.html").read_text("utf-8"), output is None)
    else:
        from bifrost_cli.reports.artifact_pages import artifact_page

        page = artifact_page(sides[0], workspace, device, ui)
    page.links = _links(sides, workspace, file)
    return _write(file, page.html(), output is None)


def is_draft(folder: Path) -> bool:
    """Whether a folder is an artifact that is not finished."""
    return (folder / DRAFT).is_file() and not (folder / MANIFEST).exists()


def unfinished_training(folder: Path) -> bool:
    """Whether a folder is a training that is not finished; it has a page already."""
    return is_draft(folder) and read_json(folder / DRAFT).get("kind") in TRAININGS


def _check_pair(first: Artifact, second: Artifact) -> None:
    if first.kind != second.kind:
        raise UsageError(f"{first.id} is a {first.kind} and {second.id} a {second.kind}: they have nothing to compare",
                         fix="give two of a kind: bifrost artifacts ls")  # fmt: skip
    if first.id == second.id:
        raise UsageError(f"{first.id} was given twice", fix="give two of a kind: bifrost artifacts ls")


def _unfinished(folder: Path, output: Path | str | None, workspace: Path) -> Path:
    draft, file = read_json(folder / DRAFT), _file(output, workspace, folder.name)
    if not unfinished_training(folder):
        raise UsageError(f"{folder} is an unfinished {draft.get('kind')}: there is nothing to show yet",
                         fix="run the command that makes it again; it continues")  # fmt: skip
    from bifrost_cli.reports.artifact_pages import unfinished_page

    return _write(file, unfinished_page(folder, draft, workspace).html(), output is None)


def _file(output: Path | str | None, workspace: Path, name: str) -> Path:
    if output is None:
        return workspace / "pages" / f"{name}.html"
    file = Path(output)
    if file.suffix != ".html":
        raise UsageError(f"{file} is not an .html file", fix=f"-o {shlex.quote(f'{file}.html')}")
    require_new(file)
    return file


def _links(artifacts: Sequence[Artifact], workspace: Path, file: Path) -> dict[str, str]:
    """Pages of what the artifacts were made from, by id, as seen from `file`; only those that are there."""
    links = {}
    for line in (line for artifact in artifacts for line in lineage(artifact, workspace)):
        pages = [
            workspace / "pages" / f"{line.id}.html",
            *([line.artifact.path / "report.html"] if line.artifact else []),
        ]
        if page := next(filter(Path.is_file, pages), None):
            links[line.id] = quote(Path(os.path.relpath(page, file.parent)).as_posix())
    return links


def _write(file: Path, html: str, again: bool) -> Path:
    make_folder(file.parent)
    (write_bytes if again else write_new)(file, html.encode("utf-8"))
    return file
