"""`bifrost recipes`, `plan` and `doctor`: the shipped recipes, every key, what a recipe needs, and what is here."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

import typer

from bifrost_cli.artifacts.files import make_folder, write_new
from bifrost_cli.artifacts.manifest import require_new
from bifrost_cli.cli.command import Result, command
from bifrost_cli.cli.options import RUNS, Recipe, RecipeReference, Sets, Workspace
from bifrost_cli.errors import Findings, UsageError
from bifrost_cli.runtime.light_imports import lightly

app = typer.Typer(help="List, show, check and copy recipes.")
planning = typer.Typer()
Gpu = Literal["b200", "h200", "h100", "a100", "l40s", "rtx4090", "rtx3090"]


@app.callback(invoke_without_command=True)
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print("\n".join(ls().lines))


@command(app, "ls")
def ls() -> Result:
    """List the shipped recipes and what each claims.

    Example: bifrost recipes ls
    """
    from bifrost_cli.config.load import load_recipe, recipe_names, recipe_path

    claims = {name: load_recipe(name).claim for name in recipe_names()}
    data = {name: {"claim": claim, "path": str(recipe_path(name))} for name, claim in claims.items()}
    return Result([f"{name:12}  {claim}" for name, claim in claims.items()], data)


@command(app, "show")
def show(
    ref: RecipeReference = None,
    sets: Sets = None,
    keys: Annotated[bool, typer.Option("--keys", help="Every key, its value and its meaning.")] = False,
) -> Result:
    """Show a recipe with every default filled in; an artifact's too.

    Example: bifrost recipes show bifrost1-7b --set branch.train.lr=1e-4
    """
    from bifrost_cli.config.load import all_keys, load_recipe

    recipe = load_recipe(ref, sets or ())
    data = recipe.model_dump(mode="json")
    if not keys:
        return Result(_yaml(data).splitlines(), data)
    meanings = {key: info.description for key, info in all_keys(type(recipe))}
    values = {key: functools.reduce(dict.__getitem__, key.split("."), data) for key in meanings}
    return Result([f"{key} = {values[key]}  # {meaning}" for key, meaning in meanings.items()], meanings)


@command(app, "check")
def check(
    refs: Annotated[list[str] | None, typer.Argument(metavar="RECIPE...", help="(default: all shipped)")] = None,
) -> Result:
    """Check that recipes can be used; the first problem stops, with file, line and column.

    Example: bifrost recipes check my.yaml
    """
    from bifrost_cli.config.load import load_recipe, recipe_names

    names = refs or recipe_names()
    for name in names:
        load_recipe(name)
    return Result([f"ok  {name}" for name in names], {"ok": names})


@command(app, "cp")
def cp(
    ref: Annotated[str, typer.Argument(metavar="RECIPE", help="A name, a file or an artifact.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new .yaml file.")],
) -> Result:
    """Copy a recipe into a file of your own, to change it there.

    A shipped recipe and a file keep their comments; an artifact's recipe is written with every key.

    Example: bifrost recipes cp tiny my.yaml
    """
    from bifrost_cli.config.load import load_recipe, recipe_names, recipe_path

    if file.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{file} is not a .yaml file", fix=f"give {file.name or 'my'}.yaml")
    require_new(file)
    recipe, source = load_recipe(ref), recipe_path(ref) if ref in recipe_names() else Path(ref)
    text = source.read_bytes() if source.is_file() else _yaml(recipe.model_dump(mode="json")).encode()
    make_folder(file.parent)
    write_new(file, text)
    return Result([str(file)], {"path": str(file)}, file, f"use it: --recipe {quote(str(file))}")


def _yaml(data: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


@command(planning, "plan")
def plan(
    ref: RecipeReference = None,
    sets: Sets = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="How many devices share the work.")] = 1,
    gpu: Annotated[Gpu, typer.Option("--gpu", help="The device that hours are counted for.")] = "h100",
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
    with lightly():  # model libraries, after whatever can be refused without them
        from bifrost_cli.planning.plan import plan

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
        state, number = "trained" if part["trained"] else "frozen", part["parameters"]
        units = ((1e9, "B"), (1e6, "M"), (1e3, "k"))
        count = next((f"{number / unit:.2f} {name}" for unit, name in units if number >= unit), str(number))
        yield f"  {part['name']:32}{count:>9}  {state:8}  {part['model'] or ''}".rstrip()
    rate = f"{device['utilisation']:.0%} of {device['peak'] / 1e12:.0f} TFLOP/s"
    yield f"peak memory of one device, and time on {device['gpus']} x {device['gpu']} at {rate}"
    for name, stage in found["stages"].items():
        own = {"extract-latents": f"{images:,} images", "generate": "one image"}
        what, peak = own.get(name, f"{stage['times']:,} steps"), _bytes(stage["memory"]["peak"])
        time = f"{stage['hours']:.1f} h" if stage["hours"] >= 0.1 else f"{stage['hours'] * 3600:.1f} s"
        yield f"  {name:18}{peak:>10}  {what:>18}  {time:>9}  {stage['flops_each']:.2g} FLOPs each"
        if "fits" in stage:
            ways = " ".join(f"--set {one}" for one in stage.get("fits_with") or ())
            how = f"fits with {ways}" if ways else "does not fit, with no setting known here"
            yield "    fits" if stage["fits"] else f"    {how}"
    yield f"disk for {images:,} images"
    for name, size in found["disk"].items():
        yield f"  {name.replace('_', ' '):32}{_bytes(size):>9}"
    yield "downloads"
    for one in found["downloads"]:
        gate = "; gated: accept it on the hub" if one["gated"] else ""
        yield f"  {one['model']:32}{_bytes(one['bytes']):>9}  {one['licence']}{gate}"
    if not found["downloads"]:
        yield "  none"


def _bytes(size: int) -> str:
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"))
    return next((f"{size / unit:.2f} {name}" for unit, name in units if size >= unit), f"{size / 1e3:.0f} kB")


@command(planning, "doctor")
def doctor(recipe: Recipe, workspace: Workspace = RUNS) -> Result:
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
