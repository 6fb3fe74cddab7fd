"""`bifrost ablate`: the paper's questions, answered on the built-in system.

In: the name of an ablation. Out: one stage call and its Result. Without a name it lists what there is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bifrost_cli.artifacts import Artifact
from bifrost_cli.cli.command import Result, command
from bifrost_cli.cli.options import Device, DryRun, Output, Workspace
from bifrost_cli.runtime.ui import Ui

app = typer.Typer()


@command(app, "ablate")
def ablate(
    ui: Ui,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A shipped ablation, or a YAML file.")] = None,
    output: Output = None,
    workspace: Workspace = Path("runs"),
    device: Device = "auto",
    dry_run: DryRun = False,
    tables: Annotated[bool, typer.Option("--tables", help="Print what was measured, as the README has it.")] = False,
) -> Result:
    """Train and judge the variants of one question under several seeds; one table.

    Without NAME: the list. Given again, an interrupted ablation goes on, and a finished one prints its table.

    Example: bifrost ablate plan
    """
    from bifrost_cli.ablations.schema import ablation_names, load_ablation, measured_values

    if tables:
        from bifrost_cli.ablations.run_ablation import table

        found = {values["name"]: table(values) for values in measured_values() if name in (None, values["name"])}
        return Result("\n".join(found.values()).splitlines(), found)
    if name is None:
        questions = {found: load_ablation(found).question for found in ablation_names()}
        return Result([f"{found:12}  {question}" for found, question in questions.items()], questions)
    ablation = load_ablation(name)
    from bifrost_cli.ablations.run_ablation import ablate as run

    result = run(Path(name).stem, ablation, output=output, workspace=workspace, device=device, dry_run=dry_run, ui=ui)
    if not isinstance(result, Artifact):
        return Result([f"{key}: {value}" for key, value in result.items()], result)
    lines = result.file("table.md").read_text(encoding="utf-8").splitlines()
    return Result(lines, {"id": result.id, "path": str(result.path), **result.info}, result.path,
                  f"report: {result.path / 'report.html'}")  # fmt: skip
