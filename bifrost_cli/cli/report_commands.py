"""`bifrost report`: the page of an artifact, or of two side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bifrost_cli.cli.command import Result, command
from bifrost_cli.cli.options import Device, Workspace
from bifrost_cli.runtime.ui import Ui

app = typer.Typer()


@command(app, "report")
def report(
    ui: Ui,
    ref: Annotated[
        str | None, typer.Argument(metavar="REF", help="An artifact, or a running training.  (default: the newest)")
    ] = None,
    other: Annotated[str | None, typer.Argument(metavar="OTHER", help="Another of the same kind, beside it.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.html", help="A new file.  (default: WORKSPACE/pages)"),
    ] = None,
    workspace: Workspace = Path("runs"),
    force_compare: Annotated[
        bool, typer.Option("--force-compare", help="Subtract numbers that were not measured alike, too.")
    ] = False,
    device: Device = "auto",
) -> Result:
    """Write the page of an artifact of any kind, or of two side by side; it opens from disk.

    A training shows its sample grids, curves and health, also while it runs; a latents store its images beside their
    latents; two reports what was measured differently, first. The default place is written again each time.

    Example: bifrost report runs/branch-0123456789ab runs/branch-ba9876543210
    """
    from bifrost_cli.artifacts.workspace import survey
    from bifrost_cli.reports.report import report, unfinished_training

    if ref is None:
        there = survey(workspace)
        trainings = filter(unfinished_training, there.drafts)
        ref = str(there.artifacts[0].path) if there.artifacts else next(map(str, trainings), None)
        if ref is None:
            return _empty(workspace, there.drafts)
        ui.say(f"{ref}, the newest in {workspace}")
    page = report(ref, other, output=output, workspace=workspace, force=force_compare, device=device, ui=ui)
    return Result([str(page)], {"path": str(page)}, page, "open it in a browser")


def _empty(workspace: Path, drafts: list[Path]) -> Result:
    """What there is to look at when nothing was made yet."""
    from bifrost_cli.reports.report import BUILTIN

    lines = [
        f"{workspace} holds no finished artifact yet",
        *(f"unfinished: {path} (run its command again; it continues)" for path in drafts),
        f"built-in: {', '.join(BUILTIN)}; their pages: bifrost report {BUILTIN[0]}",
    ]
    data = {"path": None, "builtin": list(BUILTIN), "unfinished": [str(path) for path in drafts]}
    hint = 'make images: bifrost generate "a red circle above a blue square" -n 4 -o runs/samples'
    return Result(lines, data, None, hint)
