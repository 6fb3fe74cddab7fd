"""`bifrost eval`: any metrics together, over one set of images; their flags and options follow from their classes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bifrost_cli.artifacts import Artifact
from bifrost_cli.cli import preflight
from bifrost_cli.cli.command import LazyCommand, Result, command, typer_params
from bifrost_cli.cli.options import EVALUATE, Device, DryRun, Output, Recipe, Workspace
from bifrost_cli.cli.stage_commands import as_result
from bifrost_cli.errors import Findings
from bifrost_cli.runtime.ui import Ui

if TYPE_CHECKING:
    from bifrost_cli.evaluation.gates import Gate

LARGE = 2**30  # bytes of a report.json
_METRIC, _OPTION = "metric_", "option_"  # prefixes of the parameters that follow from the metrics

app = typer.Typer()


class EvalCommand(LazyCommand):
    """`bifrost eval`, whose metrics are looked up when it is used, too."""

    def first_params(self, others: Sequence[Any]) -> list[Any]:
        """The metrics' parameters."""
        return _metric_params(others)

    def invoke(self, ctx: Any) -> Any:
        """Run the function; the metrics' parameters, which its signature does not have, are `ctx.obj`."""
        ctx.obj = {name: ctx.params.pop(name) for name in list(ctx.params) if name.startswith((_METRIC, _OPTION))}
        return super().invoke(ctx)


def _metric_params(declared: Sequence[Any]) -> list[Any]:
    """A flag for each metric, then their options; names that `declared` has taken are left out."""
    from bifrost_cli.evaluation.registry import metric_flags

    taken = {name for param in declared for name in (*param.opts, *param.secondary_opts)}
    flags, options = [], []
    for name, text, metric_options in metric_flags():
        if f"--{name}" not in taken and re.fullmatch("[a-z][a-z0-9_-]*", name):
            taken.add(f"--{name}")
            flags.append(_parameter(_METRIC + name, bool, False, typer.Option(f"--{name}", help=text)))
        for option in metric_options:
            if f"--{option.name}" not in taken:
                taken.add(f"--{option.name}")
                text = option.help + (f"  (default: {option.default})" if option.default else "")
                shown = typer.Option(f"--{option.name}", metavar=option.metavar, help=text)
                options.append(_parameter(_OPTION + option.name, str | None, None, shown))
    return typer_params([*flags, *options])


def _parameter(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
    name = name.replace("-", "_")
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


@command(app, "eval", EVALUATE, check=preflight.evaluate, cls=EvalCommand)
def evaluate(
    context: typer.Context,
    recipe: Recipe,
    ui: Ui,
    fd: Annotated[
        list[str] | None, typer.Option("--fd", metavar="FEATURES", help="Frechet distance in another network too.")
    ] = None,
    samples: Annotated[
        str | None, typer.Option("--samples", metavar="REF", help="Samples, or a folder.  (default: the newest)")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Generate these prompts first, one a line.")
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Images of each of --prompts.")] = 1,
    quarters: Annotated[bool, typer.Option("--quarters", help="Each of --samples is a grid of 2x2; cut it.")] = False,
    reference: Annotated[
        str | None, typer.Option("--reference", metavar="REF", help="A folder, samples, latents, or saved statistics.")
    ] = None,
    gate: Annotated[
        list[str] | None, typer.Option("--gate", metavar="GATE", help="Exit with 8 unless it holds, as 'fid<12.5'.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say how each metric is computed, and stop.")] = False,
    output: Output = None,
    workspace: Workspace = Path("runs"),
    device: Device = "auto",
    dry_run: DryRun = False,
) -> Result:
    """Measure samples against a reference and write a report.

    Any metrics together; without one, the Frechet distance. The report is report.json and report.html.

    Example: bifrost eval --fid --samples runs/samples-0123456789ab --reference photos/
    """
    from bifrost_cli.evaluation.registry import explained, metric_flags

    named = {_METRIC + name.replace("-", "_"): name for name, _, _ in metric_flags()}
    metrics = [name for key, name in named.items() if context.obj.get(key)] or ([] if fd else ["fid"])
    if explain:
        lines = explained(metrics, fd or [])
        return Result(lines, {"explained": lines})
    from bifrost_cli.evaluation.evaluate import evaluate
    from bifrost_cli.evaluation.gates import Gate

    gates = [Gate.of(text) for text in gate or []]
    options = {key.removeprefix(_OPTION): value for key, value in context.obj.items() if key.startswith(_OPTION)}
    found = evaluate(
        recipe, metrics=metrics, fd=fd or [], samples=samples, prompts=prompts, n=n, quarters=quarters,
        reference=reference, output=output, workspace=workspace, device=device, dry_run=dry_run, ui=ui, **options,
    )  # fmt: skip
    return _gated(found, gates, ui) if isinstance(found, Artifact) else as_result(found)


def _gated(report: Artifact, gates: Sequence[Gate], ui: Ui) -> Result:
    """The report, with an error for the gates that do not hold."""
    from bifrost_cli.artifacts.files import read_json

    checked = [gate.check(read_json(report.file("report.json"), LARGE)["results"]) for gate in gates]
    for gate in checked:
        end = "holds" if gate["holds"] else "fails"
        ui.say(f"gate {gate['gate']}: {gate['value']:.4g}, at worst {gate['end']:.4g}: {end}")
    result = as_result(report)
    failed = [gate["gate"] for gate in checked if not gate["holds"]]
    error = Findings(f"{len(failed)} of {len(checked)} gates do not hold", at=", ".join(failed)) if failed else None
    return replace(result, data={**result.data, **({"gates": checked} if checked else {})}, error=error)
