"""Write the page of an artifact, of a training that is still running, or of two artifacts of a kind side by side.

A page is a view: it can be made again at any time, so the default place is simply written again. Computes no new number
of a model. What cannot be shown is refused before any heavy library is imported.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from urllib.parse import quote

from bifrost_cli.artifacts import lineage, resolve
from bifrost_cli.artifacts.files import make_folder, read_json, write_bytes, write_new
from bifrost_cli.artifacts.manifest import DRAFT, MANIFEST, require_new
from bifrost_cli.errors import UsageError
from bifrost_cli.runtime.ui import Ui

TRAININGS = ("branch", "controlnet")
BUILTIN = tuple(f"builtin:{kind}" for kind in TRAININGS)


def report(
    ref: Path | str, other: Path | str | None = None, *, output: Path | str | None = None,
    workspace: Path | str = "runs", force: bool = False, device: str = "auto", ui: Ui | None = None,
) -> Path:  # fmt: skip
    """Write one page.

    Args:
        ref: an artifact of any kind, `builtin:branch` or `builtin:controlnet`, or the folder of an unfinished training.
        other: another of the same kind, shown beside it.
        output: a new .html file; None writes `workspace/pages/ID.html`, again if it is there.
        force: take differences of numbers that were not measured alike.
        device: where a store's images are decoded.

    Raises:
        UsageError (2): kinds that differ, an output that exists or is not .html.
        ArtifactError, StoreError (5): damage.
    """
    ui, workspace, folder = ui or Ui(), Path(workspace), Path(ref)
    if other is None and is_draft(folder):
        draft, file = read_json(folder / DRAFT), _file(output, workspace, folder.name)
        if not unfinished_training(folder):
            raise UsageError(f"{folder} is an unfinished {draft.get('kind')}: there is nothing to show yet",
                             fix="run the command that makes it again; it continues")  # fmt: skip
        from bifrost_cli.reports.artifact_pages import unfinished_page

        return _write(file, unfinished_page(folder, draft, workspace).html(), output is None)
    sides = [resolve(workspace, side) for side in (ref, other) if side is not None]
    first, second = sides[0], sides[-1]
    if other is not None and (first.kind != second.kind or first.id == second.id):
        unlike = f"{first.id} is a {first.kind} and {second.id} a {second.kind}: they have nothing to compare"
        raise UsageError(unlike if first.kind != second.kind else f"{first.id} was given twice",
                         fix="give two of a kind: bifrost artifacts ls")  # fmt: skip
    file = _file(output, workspace, "-and-".join(side.id for side in sides))
    for side in sides:
        if side.kind != "latents":  # a store checks what it reads; it may be terabytes
            side.check()
    if other is None and first.kind == "report":
        return _write(file, first.file("report.html").read_text("utf-8"), output is None)
    if other is None:
        from bifrost_cli.reports.artifact_pages import artifact_page  # torch and zarr, after what can be refused

        page = artifact_page(first, workspace, device, ui)
    else:
        from bifrost_cli.reports.compare import compare_page

        page = compare_page(first, second, workspace, force, ui)
    for line in (line for side in sides for line in lineage(side, workspace)):
        own = [line.artifact.path / "report.html"] if line.artifact else []
        if made := next(filter(Path.is_file, [workspace / "pages" / f"{line.id}.html", *own]), None):
            page.links[line.id] = quote(Path(os.path.relpath(made, file.parent)).as_posix())
    return _write(file, page.html(), output is None)


def is_draft(folder: Path) -> bool:
    """Whether a folder is an artifact that is not finished."""
    return (folder / DRAFT).is_file() and not (folder / MANIFEST).exists()


def unfinished_training(folder: Path) -> bool:
    """Whether a folder is a training that is not finished; it has a page already."""
    return is_draft(folder) and read_json(folder / DRAFT).get("kind") in TRAININGS


def _file(output: Path | str | None, workspace: Path, name: str) -> Path:
    if output is None:
        return workspace / "pages" / f"{name}.html"
    file = Path(output)
    if file.suffix != ".html":
        raise UsageError(f"{file} is not an .html file", fix=f"-o {shlex.quote(f'{file}.html')}")
    require_new(file)
    return file


def _write(file: Path, html: str, again: bool) -> Path:
    make_folder(file.parent)
    (write_bytes if again else write_new)(file, html.encode("utf-8"))
    return file
