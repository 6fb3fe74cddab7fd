"""`bifrost recipes`: the shipped recipes, every key and its meaning, and whether a recipe can be used."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bifrost_cli.cli.command import Result, command
from bifrost_cli.cli.options import Sets
from bifrost_cli.runtime.ui import Ui

app = typer.Typer(help="List, show and check recipes.")


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
    ref: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A name, a file or an artifact.  (default: tiny)")
    ] = None,
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
        return Result([yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100).rstrip()], data)
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


def _at(data: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        data = data[part]
    return data
