"""`bifrost geneval`: images for the benchmark's own scorer, and its results.

In: options. Out: one stage call and its Result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bifrost_cli.cli.command import Result, command
from bifrost_cli.cli.options import Output, Workspace
from bifrost_cli.cli.stage_commands import as_result
from bifrost_cli.runtime.ui import Ui

app = typer.Typer(help="GenEval's own scorer: its folder layout out, its results in.")


@command(app, "export")
def export(
    ui: Ui,
    samples: Annotated[str, typer.Argument(metavar="SAMPLES", help="A samples artifact of the benchmark's prompts.")],
    metadata: Annotated[Path, typer.Option("--metadata", metavar="FILE", help="The benchmark's file of prompts.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A new folder.")],
    workspace: Workspace = Path("runs"),
) -> Result:
    """Write the folder that GenEval's evaluate_images.py reads.

    Example: bifrost geneval export runs/samples-0123456789ab --metadata evaluation_metadata.jsonl -o geneval
    """
    from bifrost_cli.evaluation.benchmarks.geneval_export import export_geneval

    folder = export_geneval(samples, metadata, output, workspace=workspace, ui=ui)
    return Result([str(folder)], {"path": str(folder)}, folder, "score it, then: bifrost geneval import results.jsonl")


@command(app, "import")
def import_(
    ui: Ui,
    results: Annotated[Path, typer.Argument(metavar="FILE", help="The results.jsonl of evaluate_images.py.")],
    output: Output = None,
    workspace: Workspace = Path("runs"),
) -> Result:
    """Make a report of the original scorer's results, with intervals.

    Example: bifrost geneval import results.jsonl
    """
    from bifrost_cli.evaluation.benchmarks.geneval_export import import_geneval

    return as_result(import_geneval(results, output=output, workspace=workspace, ui=ui))
