"""`bifrost plan` and `bifrost doctor`: what a recipe needs, and what is here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bifrost_cli.cli.command import Result, command
from bifrost_cli.cli.options import Recipe, RecipeReference, Sets, Workspace
from bifrost_cli.errors import Findings, UsageError
from bifrost_cli.runtime.ui import Ui

app = typer.Typer()
Gpu = Annotated[
    Literal["b200", "h200", "h100", "a100", "l40s", "rtx4090", "rtx3090"],
    typer.Option("--gpu", help="The device that hours are counted for."),
]


@command(app, "plan")
def plan(
    ui: Ui,
    ref: RecipeReference = None,
    sets: Sets = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="How many devices share the work.")] = 1,
    gpu: Gpu = "h100",
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="24GB", help="Of one device: say what fits, and how it would.")
    ] = None,
    images: Annotated[int, typer.Option("--images", min=1, help="Images of the store.")] = 1_000_000,
) -> Result:
    """Say what a recipe needs: parameters, memory, disk, hours, downloads. Nothing is loaded and nothing fetched.

    Example: bifrost plan bifrost1-7b --memory 80GB
    """
    from bifrost_cli.config.load import load_recipe
    from bifrost_cli.planning.model_configs import require_plannable

    limit = None if memory is None else parse_memory(memory)
    recipe = load_recipe(ref, sets or ())
    require_plannable(recipe)
    from bifrost_cli.planning.plan import plan  # 6 s of model libraries, after whatever can be refused without them

    found = plan(recipe, gpus=gpus, gpu=gpu, memory_limit=limit, images=images)
    return Result(list(_plan_lines(found)), found)


def parse_memory(text: str) -> int:
    """`24GB` in bytes; a GB is 10^9, which leaves a card of 24 GiB some room. UsageError for other text."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*GB?\s*", text, flags=re.IGNORECASE)
    if not match or not float(match[1]):
        raise UsageError(f"{text!r} is not an amount of memory", fix="for example --memory 24GB")
    return round(float(match[1]) * 1e9)


def _plan_lines(found: dict[str, Any]) -> Iterator[str]:
    device, images = found["device"], found["images"]
    yield f"recipe {found['recipe']}"
    yield "parameters"
    for part in found["parts"]:
        state = "trained" if part["trained"] else "frozen"
        yield f"  {part['name']:32}{_count(part['parameters']):>9}  {state:8}  {part['model'] or ''}".rstrip()
    rate = f"{device['utilisation']:.0%} of {device['peak'] / 1e12:.0f} TFLOP/s"
    yield f"peak memory of one device, and time on {device['gpus']} x {device['gpu']} at {rate}"
    for name, stage in found["stages"].items():
        own = {"extract-latents": f"{images:,} images", "generate": "one image"}
        what, peak = own.get(name, f"{stage['times']:,} steps"), _bytes(stage["memory"]["peak"])
        yield f"  {name:18}{peak:>10}  {what:>18}  {_hours(stage['hours']):>9}  {stage['flops_each']:.2g} FLOPs each"
        if "fits" in stage:
            yield f"    {_fits(stage)}"
    yield f"disk for {images:,} images"
    for name, size in found["disk"].items():
        yield f"  {name.replace('_', ' '):32}{_bytes(size):>9}"
    yield "downloads"
    for one in found["downloads"]:
        gate = "; gated: accept it on the hub" if one["gated"] else ""
        yield f"  {one['model']:32}{_bytes(one['bytes']):>9}  {one['licence']}{gate}"
    if not found["downloads"]:
        yield "  none"


def _fits(stage: dict[str, Any]) -> str:
    if stage["fits"]:
        return "fits"
    if stage["fits_with"] is None:
        return "does not fit, with no setting known here"
    return "fits with " + " ".join(f"--set {one}" for one in stage["fits_with"])


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 0.1 else f"{hours * 3600:.1f} s"


def _count(number: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return str(number)


def _bytes(size: int) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size / 1e3:.0f} kB"


@command(app, "doctor")
def doctor(recipe: Recipe, ui: Ui, workspace: Workspace = Path("runs")) -> Result:
    """Check what is here of what a recipe needs: libraries, GPU, disk, models and their licences.

    Exit code 8 when something will not work.

    Example: bifrost doctor --recipe bifrost1-7b
    """
    from dataclasses import asdict

    from bifrost_cli.planning.doctor import doctor

    found = doctor(recipe, workspace=workspace)
    failed = [finding for finding in found if finding.status == "fail"]
    lines = []
    for finding in found:
        lines.append(f"{finding.status:4}  {finding.what}: {finding.message}")
        lines += [f"      fix: {finding.fix}"] if finding.fix else []
    error = Findings(f"{len(failed)} of {len(found)} findings will not work", fix=failed[0].fix) if failed else None
    return Result(lines, {"recipe": recipe.name, "findings": [asdict(finding) for finding in found]}, error=error)
