"""`bifrost eval`: any of the measures together, over one set of samples.

In: options. Out: one stage call and its Result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bifrost_cli.cli.command import Result, command
from bifrost_cli.cli.options import EVALUATE, Device, DryRun, Output, Recipe, Workspace
from bifrost_cli.cli.stages import made
from bifrost_cli.stages.ui import Ui

app = typer.Typer()


@command(app, "eval", EVALUATE)
def evaluate(
    recipe: Recipe,
    ui: Ui,
    fid: Annotated[bool, typer.Option("--fid", help="Frechet distance to a reference; the default.")] = False,
    sfid: Annotated[bool, typer.Option("--sfid", help="The same of spatial features (Inception only).")] = False,
    kid: Annotated[bool, typer.Option("--kid", help="Kernel distance to a reference.")] = False,
    inception_score: Annotated[bool, typer.Option("--is", help="Inception score (Inception only).")] = False,
    prdc: Annotated[bool, typer.Option("--prdc", help="Precision, recall, density, coverage.")] = False,
    clipscore: Annotated[bool, typer.Option("--clipscore", help="Picture against prompt, in a CLIP.")] = False,
    shapes: Annotated[bool, typer.Option("--shapes", help="Accuracy by the built-in world's checker.")] = False,
    fd: Annotated[
        list[str] | None, typer.Option("--fd", metavar="FEATURES", help="Frechet distance in another network too.")
    ] = None,
    samples: Annotated[
        str | None, typer.Option("--samples", metavar="REF", help="Samples, or a folder.  (default: the newest)")
    ] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", metavar="REF", help="A folder, samples, or saved statistics.")
    ] = None,
    output: Output = None,
    workspace: Workspace = Path("runs"),
    device: Device = "auto",
    dry_run: DryRun = False,
) -> Result:
    """Measure samples against a reference and write a report.

    Any measures together; without one, the Frechet distance. The report is report.json and report.html.

    Example: bifrost eval --fid --samples runs/samples-0123456789ab --reference photos/
    """
    from bifrost_cli.stages.evaluate import evaluate

    flags = {"fid": fid, "sfid": sfid, "kid": kid, "is": inception_score, "prdc": prdc, "clipscore": clipscore,
             "shapes": shapes}  # fmt: skip
    measures = [name for name, asked in flags.items() if asked] or ([] if fd else ["fid"])
    inputs = {"measures": measures, "fd": fd or [], "samples": samples, "reference": reference}
    where = {"output": output, "workspace": workspace, "device": device}
    return made(evaluate(recipe, **inputs, **where, dry_run=dry_run, ui=ui))
