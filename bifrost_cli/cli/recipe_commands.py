"""`bifrost recipes`: the shipped recipes, every key and its meaning, and whether a recipe can be used."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from bifrost_cli.artifacts.files import make_folder, write_new
from bifrost_cli.artifacts.manifest import require_new
from bifrost_cli.cli.command import Result, command
from bifrost_cli.cli.options import RecipeReference, Sets
from bifrost_cli.errors import UsageError
from bifrost_cli.runtime.ui import Ui

app = typer.Typer(help="List, show, check and copy recipes.")


@app.callback(invoke_without_command=True)
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        for line in ls(Ui()).lines:
            print(line)


@command(app, "ls")
def ls(ui: Ui) -> Result:
    """List the shipped recipes and what each claims.

    Example: bifrost recipes ls
    """
    from bifrost_cli.config.load import load_recipe, recipe_names, recipe_path

    claims = {name: load_recipe(name).claim for name in recipe_names()}
    data = {name: {"claim": claim, "path": str(recipe_path(name))} for name, claim in claims.items()}
    return Result([f"{name:12}  {claim}" for name, claim in claims.items()], data)


@command(app, "show")
def show(
    ui: Ui,
    ref: RecipeReference = None,
    sets: Sets = None,
    keys: Annotated[bool, typer.Option("--keys", help="Every key, its value and its meaning.")] = False,
) -> Result:
    """Show a recipe with every default filled in; an artifact's too.

    Example: bifrost recipes show bifrost1-7b --set branch.train.lr=1e-4
    """
    import yaml

    from bifrost_cli.config.load import all_keys, load_recipe

    recipe = load_recipe(ref, sets or ())
    data = recipe.model_dump(mode="json")
    if not keys:
        return Result(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100).splitlines(), data)
    lines = [f"{key} = {_at(data, key)}  # {info.description}" for key, info in all_keys(type(recipe))]
    return Result(lines, {key: info.description for key, info in all_keys(type(recipe))})


@command(app, "check")
def check(
    ui: Ui,
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
    ui: Ui,
    ref: Annotated[str, typer.Argument(metavar="RECIPE", help="A name, a file or an artifact.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new .yaml file.")],
) -> Result:
    """Copy a recipe into a file of your own, to change it there.

    A shipped recipe and a file keep their comments; an artifact's recipe is written with every key.

    Example: bifrost recipes cp tiny my.yaml
    """
    import yaml

    from bifrost_cli.config.load import load_recipe, recipe_names, recipe_path

    if file.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{file} is not a .yaml file", fix=f"give {file.name or 'my'}.yaml")
    require_new(file)
    recipe, source = load_recipe(ref), recipe_path(ref) if ref in recipe_names() else Path(ref)
    text = (
        source.read_bytes()
        if source.is_file()
        else yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100).encode()
    )
    make_folder(file.parent)
    write_new(file, text)
    return Result([str(file)], {"path": str(file)}, file, f"use it: --recipe {quote(str(file))}")


def _at(data: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        data = data[part]
    return data
