"""`bifrost data`: look at a source before anything is computed from it."""

from __future__ import annotations

from typing import Annotated

import typer

from bifrost_cli.cli.command import Result, command
from bifrost_cli.cli.options import SOURCE, Recipe
from bifrost_cli.errors import Findings
from bifrost_cli.runtime.ui import Ui

app = typer.Typer(no_args_is_help=True, help="Check images and captions before they are encoded.")


@command(app, "check", SOURCE)
def check(
    recipe: Recipe, ui: Ui, source: Annotated[str, typer.Argument(metavar="SOURCE", help="As for extract-latents.")]
) -> Result:
    """Read every image and caption of a source as extract-latents would. Exit code 8 when that would stop.

    Example: bifrost data check photos/
    """
    from bifrost_cli.extraction.check_source import check_source
    from bifrost_cli.extraction.choose_source import listed

    found = check_source(recipe, source, ui=ui)
    lines = [f"{problem.event}  {problem.where}: {problem.reason}" for problem in found.problems]
    lines += [f"counted: {listed(found.counts)}"] if found.counts else []
    lines += [f"funnel: {listed(found.funnel)}"] if found.funnel else []
    data = {
        "source": source,
        "funnel": dict(found.funnel),
        "counts": dict(found.counts),
        "problems": [problem.as_json() for problem in found.problems],
        "stops": {"code": found.stops.code, "message": found.stops.message} if found.stops else None,
    }
    if not found.stops:
        return Result([*lines, "extract-latents would not stop"], data, source)
    at = None if found.problems else found.stops.at
    message = f"extract-latents would stop: {found.stops.message} ({found.stops.code})"
    return Result(lines, data, error=Findings(message, at=at, fix=found.stops.fix))
