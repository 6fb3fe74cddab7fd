"""`bifrost eval`: any of the measures together, over one set of samples.

In: options. Out: one stage call and its Result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bifrost_cli.cli import preflight
from bifrost_cli.cli.command import Result, command
from bifrost_cli.cli.options import EVALUATE, Device, DryRun, Output, Recipe, Workspace
from bifrost_cli.cli.stage_commands import made
from bifrost_cli.errors import Findings
from bifrost_cli.runtime.ui import Ui

if TYPE_CHECKING:
    from bifrost_cli.artifacts import Artifact
    from bifrost_cli.evaluation.gates import Gate

LARGE = 2**30  # bytes of a report.json

app = typer.Typer()


@command(app, "eval", EVALUATE, check=preflight.evaluate)
def evaluate(
    recipe: Recipe,
    ui: Ui,
    fid: Annotated[bool, typer.Option("--fid", help="Frechet distance to a reference; the default.")] = False,
    sfid: Annotated[bool, typer.Option("--sfid", help="The same of spatial features (Inception only).")] = False,
    kid: Annotated[bool, typer.Option("--kid", help="Kernel distance to a reference.")] = False,
    inception_score: Annotated[bool, typer.Option("--is", help="Inception score (Inception only).")] = False,
    prdc: Annotated[bool, typer.Option("--prdc", help="Precision, recall, density, coverage.")] = False,
    clipscore: Annotated[bool, typer.Option("--clipscore", help="Image against prompt, in a CLIP.")] = False,
    shapes: Annotated[bool, typer.Option("--shapes", help="Accuracy by the built-in world's checker.")] = False,
    reconstruction: Annotated[
        bool, typer.Option("--reconstruction", help="Generate --reference again; PSNR, SSIM, LPIPS, rFID.")
    ] = False,
    geneval: Annotated[bool, typer.Option("--geneval", help="GenEval's rules, by --detector.")] = False,
    dpg: Annotated[bool, typer.Option("--dpg", help="DPG-Bench's --questions, by the MLLM.")] = False,
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
    detector: Annotated[
        str, typer.Option("--detector", metavar="MODEL", help="GenEval's Mask2Former: a folder or hub id.")
    ] = "facebook/mask2former-swin-small-coco-instance",
    metadata: Annotated[
        Path | None, typer.Option("--metadata", metavar="FILE", help="GenEval's file of prompts.")
    ] = None,
    questions: Annotated[Path | None, typer.Option("--questions", metavar="FILE", help="DPG-Bench's CSV.")] = None,
    judge: Annotated[
        str | None, typer.Option("--judge", metavar="MODEL", help="Who answers them.  (default: the recipe's MLLM)")
    ] = None,
    gate: Annotated[
        list[str] | None, typer.Option("--gate", metavar="BAR", help="Exit with 8 unless it holds, as 'fid<12.5'.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say how each measure is taken, and stop.")] = False,
    output: Output = None,
    workspace: Workspace = Path("runs"),
    device: Device = "auto",
    dry_run: DryRun = False,
) -> Result:
    """Measure samples against a reference and write a report.

    Any measures together; without one, the Frechet distance. The report is report.json and report.html.

    Example: bifrost eval --fid --samples runs/samples-0123456789ab --reference photos/
    """
    from bifrost_cli.evaluation.gates import Gate
    from bifrost_cli.evaluation.metrics.protocols import explained

    flags = {"fid": fid, "sfid": sfid, "kid": kid, "is": inception_score, "prdc": prdc, "clipscore": clipscore,
             "shapes": shapes, "geneval": geneval, "dpg": dpg, "reconstruction": reconstruction}  # fmt: skip
    metrics = [name for name, asked in flags.items() if asked] or ([] if fd else ["fid"])
    if explain:
        lines = explained(metrics, fd or [])
        return Result(lines, {"explained": lines})
    from bifrost_cli.evaluation.evaluate import evaluate

    bars = [Gate.of(text) for text in gate or []]
    inputs = {"metrics": metrics, "fd": fd or [], "samples": samples, "prompts": prompts, "n": n,
              "quarters": quarters, "reference": reference, "detector": detector, "metadata": metadata,
              "questions": questions, "judge": judge}  # fmt: skip
    where = {"output": output, "workspace": workspace, "device": device}
    found = evaluate(recipe, **inputs, **where, dry_run=dry_run, ui=ui)
    return made(found) if dry_run else _gated(found, bars, ui)


def _gated(report: Artifact, bars: Sequence[Gate], ui: Ui) -> Result:
    """The report, with an error for the bars that do not hold."""
    from bifrost_cli.artifacts.files import read_json

    judged = [bar.judged(read_json(report.file("report.json"), LARGE)["results"]) for bar in bars]
    for one in judged:
        end = "holds" if one["holds"] else "fails"
        ui.say(f"gate {one['gate']}: {one['value']:.4g}, at worst {one['end']:.4g}: {end}")
    result = made(report)
    failed = [one["gate"] for one in judged if not one["holds"]]
    error = Findings(f"{len(failed)} of {len(judged)} gates do not hold", at=", ".join(failed)) if failed else None
    return replace(result, data={**result.data, **({"gates": judged} if judged else {})}, error=error)
