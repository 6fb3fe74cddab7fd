"""`bifrost report`: an artifact as a page to look at, or two side by side.

In: options. Out: one stage call and its Result.
"""

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
    """Make a page of an artifact of any kind, or of two side by side; it opens from disk.

    A training shows its curves, health and sample grids, also while it runs; a latents store its images beside their
    latents; two reports what was measured differently, first. The default place is written again each time.

    Example: bifrost report runs/branch-0123456789ab runs/branch-ba9876543210
    """
    from bifrost_cli.artifacts import find
    from bifrost_cli.artifacts.workspace import newest
    from bifrost_cli.reports.report import report

    if ref is None:
        found = find(workspace)
        ref = str((found[0] if found else newest(workspace, "latents")).path)
        ui.say(f"{ref}, the newest in {workspace}")
    made = report(ref, other, output=output, workspace=workspace, force=force_compare, device=device, ui=ui)
    return Result([str(made)], {"path": str(made)}, made, "open it in a browser")
