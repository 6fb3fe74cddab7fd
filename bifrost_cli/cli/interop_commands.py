"""`bifrost import`, `bifrost export`, `bifrost export-mllm`: other programs' layouts in, and out.

In: options. Out: one stage call and its Result. Each imports its stage inside.
"""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from bifrost_cli.cli import preflight
from bifrost_cli.cli.command import Result, command
from bifrost_cli.cli.options import DryRun, Output, Recipe, Workspace
from bifrost_cli.runtime.ui import Ui

RUNS = Path("runs")
app = typer.Typer()


@command(app, "import", check=preflight.import_checkpoint)
def import_checkpoint(
    recipe: Recipe,
    ui: Ui,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A folder or a hub id in the published layout.")],
    output: Output = None,
    workspace: Workspace = RUNS,
    dry_run: DryRun = False,
) -> Result:
    """Turn a published checkpoint into a branch and a ControlNet artifact.

    The recipe names the frozen bases, which are loaded and compared; with --dry-run they are not, and every key is
    listed.

    Example: bifrost import hanlincs/Bifrost-1 --recipe bifrost1-7b -o runs/published
    """
    from bifrost_cli.interop.import_checkpoint import import_checkpoint

    artifacts = import_checkpoint(recipe, source, output=output, workspace=workspace, dry_run=dry_run, ui=ui)
    if isinstance(artifacts, dict):
        return Result([f"{group:12} {name}" for group, names in artifacts.items() for name in names], artifacts)
    data = {part.kind: {"id": part.id, "path": str(part.path)} for part in artifacts}
    parts = " ".join(f"--{part.kind} {quote(str(part.path))}" for part in artifacts)
    recipe_of = quote(str(artifacts[0].path))
    hint = f'next: bifrost generate "a red circle above a blue square" -o out.png --recipe {recipe_of} {parts}'
    paths = [part.path for part in artifacts]
    lines = [f"{part.id}  {part.path}" for part in artifacts]
    return Result(lines, data, "\n".join(map(str, paths)), hint, artifacts=paths)


@command(app, "export", check=preflight.export)
def export(
    ui: Ui,
    ref: Annotated[str, typer.Argument(metavar="REF", help="A branch or ControlNet artifact, or builtin:branch.")],
    output: Output = None,
    workspace: Workspace = RUNS,
) -> Result:
    """Write a branch or a ControlNet for others to use: plain safetensors, a configuration and a model card.

    A ControlNet beside its branch, in FOLDER/flux_controlnet, makes the published layout, which import reads.

    Example: bifrost export builtin:controlnet -o exported/flux_controlnet
    """
    from bifrost_cli.interop.export import export

    folder = export(ref, output=output, workspace=workspace, ui=ui)
    return Result([str(folder)], {"path": str(folder), "files": sorted(path.name for path in folder.iterdir())}, folder)


@command(app, "export-mllm")
def export_mllm(
    recipe: Recipe,
    ui: Ui,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A new folder.")] = Path("mllm"),
) -> Result:
    """Write the frozen MLLM as a folder of its own, for lmms-eval to measure its understanding.

    The same bytes and the same hash of weights as generation uses; its README has the command.

    Example: bifrost export-mllm --recipe bifrost1-7b -o mllm
    """
    from bifrost_cli.interop.export import export_mllm

    folder = export_mllm(recipe, output, ui=ui)
    return Result([str(folder)], {"path": str(folder), "files": sorted(path.name for path in folder.iterdir())}, folder)
