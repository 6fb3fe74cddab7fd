"""`bifrost eval`, whose options of metrics follow from their classes; `report`, `geneval` and `ablate`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from bifrost_cli.artifacts import Artifact, resolve
from bifrost_cli.artifacts.files import read_json
from bifrost_cli.artifacts.manifest import require_place
from bifrost_cli.cli.command import FIRST_PROMPT, Result, command, refusals, start_processes
from bifrost_cli.cli.options import RUNS, Device, DryRun, Gpus, NewFolder, Output, Recipe, Workspace, parameter
from bifrost_cli.cli.stage_commands import require_shareable
from bifrost_cli.errors import Findings, UsageError
from bifrost_cli.runtime.ui import Ui

EVALUATE = ("evaluate.min_samples", "evaluate.features")
LARGE = 2**30  # bytes of a report.json
_METRIC, _OPTION = "metric_", "option_"  # prefixes of the parameters that follow from the metrics

app = typer.Typer()
geneval = typer.Typer(help="GenEval's own scorer: its folder layout out, its results in.")
ablations = typer.Typer()


def _metric_options(declared: Sequence[Any]) -> list[inspect.Parameter]:
    """A flag for each metric, then their options; names that `declared` has taken are left out."""
    from bifrost_cli.evaluation.registry import metric_flags

    taken = {name for param in declared for name in (*param.opts, *param.secondary_opts)}
    flags, options = [], []
    for name, text, metric_options in metric_flags():
        if f"--{name}" not in taken and re.fullmatch("[a-z][a-z0-9_-]*", name):
            taken.add(f"--{name}")
            hint = Annotated[bool, typer.Option(f"--{name}", help=text)]
            flags.append(parameter(_METRIC + name.replace("-", "_"), hint, False))
        for option in metric_options:
            if (flag := f"--{option.name}") not in taken:
                taken.add(flag)
                text = option.help + (f"  (default: {option.default})" if option.default else "")
                own = Annotated[str | None, typer.Option(flag, metavar=option.metavar, help=text)]
                options.append(parameter(_OPTION + option.name.replace("-", "_"), own, None))
    return [*flags, *options]


@command(app, "eval", EVALUATE, default=None, first=_metric_options)
def evaluate(
    recipe: Recipe, ui: Ui, settings: list[str] | None, late: dict[str, Any],
    fd: Annotated[list[str] | None,
        typer.Option("--fd", metavar="FEATURES", help="Frechet distance in another network too.")] = None,
    samples: Annotated[str | None,
        typer.Option("--samples", metavar="REF", help="Samples, or a folder.  (default: the newest)")] = None,
    prompts: Annotated[Path | None,
        typer.Option("--prompts", metavar="FILE", help="Generate these prompts first, one a line.")] = None,
    n: Annotated[int, typer.Option("-n", help="Images of each of --prompts.")] = 1,
    quarters: Annotated[bool, typer.Option("--quarters", help="Each of --samples is a grid of 2x2; cut it.")] = False,
    reference: Annotated[str | None,
        typer.Option("--reference", metavar="REF", help="A folder, samples, latents, or saved statistics.")] = None,
    gate: Annotated[list[str] | None,
        typer.Option("--gate", metavar="GATE", help="Exit with 8 unless it holds, as 'fid<12.5'.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say how each metric is computed, and stop.")] = False,
    output: Output = None, workspace: Workspace = RUNS, device: Device = "auto", gpus: Gpus = 1,
    dry_run: DryRun = False,
) -> Result:  # fmt: skip
    """Measure samples against a reference and write a report.

    Any metrics together; without one, the Frechet distance. The report is report.json and report.html.

    Example: bifrost eval --fid --samples runs/samples-0123456789ab --reference photos/
    """
    from bifrost_cli.evaluation.registry import Gate, explained, metric_class, metric_flags
    from bifrost_cli.generation.requests import read_prompts

    with refusals():
        gates = [Gate.of(text) for text in gate or []]
        if samples is not None and not Path(samples).is_dir():
            resolve(workspace, samples, "samples")
        if prompts is not None:
            read_prompts(prompts, Ui())
            require_shareable(prompts, gpus)
        if output is not None:
            require_place(output)
    chosen = [name for name, _, _ in metric_flags() if late.get(_METRIC + name.replace("-", "_"))]
    metrics = chosen or ([] if fd else ["fid"])
    if explain:
        lines = explained(metrics, fd or [])
        return Result(lines, {"explained": lines})
    start_processes(gpus, device, dry_run)
    with refusals():
        for wanted in gates:
            wanted.require_measured([metric_class(name) for name in [*metrics, *["fid"] * bool(fd)]])
    from bifrost_cli.evaluation.evaluate import evaluate

    options = {key.removeprefix(_OPTION): value for key, value in late.items() if key.startswith(_OPTION)}
    found = evaluate(
        recipe, metrics=metrics, fd=fd or [], samples=samples, prompts=prompts, n=n, quarters=quarters,
        reference=reference, output=output, workspace=workspace, device=device, dry_run=dry_run, ui=ui, sets=settings,
        **options,
    )  # fmt: skip
    result = Result.of(found)
    if not gates or not isinstance(found, Artifact):
        return result
    checked = [gate.check(read_json(found.file("report.json"), LARGE)["results"]) for gate in gates]
    for one in checked:
        end = "holds" if one["holds"] else "fails"
        ui.say(f"gate {one['gate']}: {one['value']:.4g}, at worst {one['end']:.4g}: {end}")
    failed = [one["gate"] for one in checked if not one["holds"]]
    error = Findings(f"{len(failed)} of {len(checked)} gates do not hold", at=", ".join(failed)) if failed else None
    return replace(result, data={**result.data, "gates": checked}, error=error)


@command(app, "report")
def report(
    ui: Ui,
    ref: Annotated[str | None,
        typer.Argument(metavar="REF", help="An artifact, or a running training.  (default: the newest)")] = None,
    other: Annotated[str | None, typer.Argument(metavar="OTHER", help="Another of the same kind, beside it.")] = None,
    output: Annotated[Path | None,
        typer.Option("--output", "-o", metavar="FILE.html", help="A new file.  (default: WORKSPACE/pages)")] = None,
    workspace: Workspace = RUNS,
    force_compare: Annotated[bool,
        typer.Option("--force-compare", help="Subtract numbers that were not measured alike, too.")] = False,
    device: Device = "auto",
) -> Result:  # fmt: skip
    """Write the page of an artifact of any kind, or of two side by side; it opens from disk.

    A training shows its sample grids, curves and health, also while it runs; a latents store its images beside their
    latents; two reports what was measured differently, first. The default place is written again each time.

    Example: bifrost report runs/branch-0123456789ab runs/branch-ba9876543210
    """
    from bifrost_cli.artifacts.workspace import survey
    from bifrost_cli.reports.report import BUILTIN, report, unfinished_training

    if ref is None:
        there = survey(workspace)
        newest = [artifact.path for artifact in there.artifacts[:1]] or [*filter(unfinished_training, there.drafts)]
        if not newest:
            lines = [
                f"{workspace} holds no finished artifact yet",
                *(f"unfinished: {path} (run its command again; it continues)" for path in there.drafts),
                f"built-in: {', '.join(BUILTIN)}; their pages: bifrost report {BUILTIN[0]}",
            ]
            data = {"path": None, "builtin": list(BUILTIN), "unfinished": [str(path) for path in there.drafts]}
            return Result(lines, data, hint=f'make images: bifrost generate "{FIRST_PROMPT}" -n 4 -o runs/samples')
        ref = str(newest[0])
        ui.say(f"{ref}, the newest in {workspace}")
    page = report(ref, other, output=output, workspace=workspace, force=force_compare, device=device, ui=ui)
    return Result.of(page, "open it in a browser")


@command(geneval, "export")
def export_geneval(
    ui: Ui,
    samples: Annotated[str, typer.Argument(metavar="SAMPLES", help="A samples artifact of the benchmark's prompts.")],
    metadata: Annotated[Path, typer.Option("--metadata", metavar="FILE", help="The benchmark's file of prompts.")],
    output: NewFolder, workspace: Workspace = RUNS,
) -> Result:  # fmt: skip
    """Write the folder that GenEval's evaluate_images.py reads.

    Example: bifrost geneval export runs/samples-0123456789ab --metadata evaluation_metadata.jsonl -o geneval
    """
    from bifrost_cli.evaluation.geneval_export import export_geneval

    folder = export_geneval(samples, metadata, output, workspace=workspace, ui=ui)
    return Result.of(folder, "score it, then: bifrost geneval import results.jsonl")


@command(geneval, "import")
def import_geneval(
    ui: Ui,
    results: Annotated[Path, typer.Argument(metavar="FILE", help="The results.jsonl of evaluate_images.py.")],
    output: Output = None, workspace: Workspace = RUNS,
) -> Result:  # fmt: skip
    """Make a report of the original scorer's results, with intervals.

    Example: bifrost geneval import results.jsonl
    """
    from bifrost_cli.evaluation.geneval_export import import_geneval

    return Result.of(import_geneval(results, output=output, workspace=workspace, ui=ui))


@command(app, "fetch")
def fetch(
    ui: Ui,
    names: Annotated[list[str], typer.Argument(metavar="geneval|dpg|inception...", help="Which of them.")],
    dry_run: DryRun = False,
) -> Result:  # fmt: skip
    """Download the published files that metrics need, to where eval looks for them.

    geneval: its prompts; dpg: DPG-Bench's questions; inception: FID's network (95.7 MB, resumed).

    What arrives is checked: Inception by its sha256, the others for being whole. Not tried by us: the addresses
    themselves, only a stand-in for their servers. With --dry-run a server is asked for the size alone.

    Example: bifrost fetch geneval --dry-run
    """
    from bifrost_cli.evaluation.benchmark_files import BENCHMARKS, fetch

    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise UsageError(f"there is no benchmark {unknown[0]}", fix=f"one of {', '.join(BENCHMARKS)}")
    found = {name: fetch(name, dry_run=dry_run, ui=ui) for name in dict.fromkeys(names)}
    lines, hints = [], []
    for name, told in found.items():
        size = "size not said" if told["bytes"] is None else f"{told['bytes']:,} bytes"
        checked = f", sha256 {told['sha256'][:12]}" if "sha256" in told else ""
        lines.append(f"{told['path']}  {size}{checked}  {told['about']}")
        lines += [f"would fetch {told['url']}"] if dry_run and not told["there"] else []
        if name != "inception" and not dry_run:
            prompts = quote(told.get("prompts", told["path"]))
            hints.append(
                f"next: bifrost generate --prompts {prompts} -n 4 -o {name}; bifrost eval --{name} --samples {name}"
            )
    return Result(lines, found, "\n".join(told["path"] for told in found.values()), "\n".join(hints) or None)


@command(ablations, "ablate")
def ablate(
    ui: Ui,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A shipped ablation, or a YAML file.")] = None,
    output: Output = None, workspace: Workspace = RUNS, device: Device = "auto", dry_run: DryRun = False,
    tables: Annotated[bool, typer.Option("--tables", help="Print what was measured, as the README has it.")] = False,
) -> Result:  # fmt: skip
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
