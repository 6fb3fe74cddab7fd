"""Options that several commands share, and those that stand for a recipe key. Imports no schema and no stage."""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from bifrost_cli import __version__

if TYPE_CHECKING:
    from bifrost_cli.config.schema import Recipe
else:
    Recipe = Any  # signatures are evaluated when commands are registered; the schema costs 0.3 s that help need not pay

RUNS = Path("runs")


def parameter(name: str, hint: Any, default: Any) -> inspect.Parameter:
    """A keyword of a command's function, as Typer reads it."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def key_name(key: str) -> str:
    """The name of the parameter that stands for a recipe key."""
    return "key_" + key.replace(".", "_")


def key_option(key: str) -> inspect.Parameter:
    """--missing-caption for latents.missing_caption, with the type, the choices and the words of the schema's field."""
    from bifrost_cli.config.load import all_keys
    from bifrost_cli.config.schema import Recipe

    field = dict(all_keys(Recipe))[key]
    kind = next((arm for arm in get_args(field.annotation) if arm is str), field.annotation)  # of str | None
    name = key.rpartition(".")[2].replace("_", "-")
    names = f"--{name}/--no-{name}" if kind is bool else f"--{name}"
    option = typer.Option(names, help=f"{field.description}  ({key})", show_default=False)
    return parameter(key_name(key), Annotated[kind | None, option], None)


def _recipes(incomplete: str) -> list[str]:
    """The shipped recipes that begin so; a shell adds files itself when there are none."""
    from bifrost_cli.config.load import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


def _artifacts(context: typer.Context, incomplete: str) -> list[str]:
    from bifrost_cli.artifacts.workspace import SHIPPED, survey

    ids = [a.id for a in survey(context.params.get("workspace") or "runs", outside=True).artifacts]
    return [ref for ref in (*ids, *SHIPPED) if ref.startswith(incomplete)]


def artifact_option(name: str, text: str) -> Any:
    """An option that names an artifact of the workspace."""
    return typer.Option(name, metavar="REF", help=text, autocompletion=_artifacts)


def artifact_argument(metavar: str, text: str) -> Any:
    """An argument that names an artifact of the workspace, or several."""
    return typer.Argument(metavar=metavar, help=text, autocompletion=_artifacts)


def recipe_option(default: str | None) -> inspect.Parameter:
    """--recipe, with the recipe that a command takes when nothing is said; None is the branch's own to generate by."""
    usual = default or "the branch's own"
    text = f"A shipped name, a YAML file or an artifact folder. (default: {usual})"
    option = typer.Option("--recipe", metavar="REF", help=text, show_default=False, autocompletion=_recipes)
    return parameter("recipe", Annotated[str | None, option], default)


def _go_offline(value: bool) -> None:
    if value:
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1")


def _check_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d{1,3})?", value):
        raise typer.BadParameter(f"{value!r} is not a device; they are auto, cpu, cuda, cuda:1, mps, xpu")
    return value


def _show_version(value: bool) -> None:
    if value:
        print(f"bifrost {__version__}")
        raise typer.Exit()


Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one recipe key; can be repeated.")
]
Workspace = Annotated[
    Path, typer.Option("--workspace", "-w", metavar="DIR", help="Where artifacts are found and made.")
]
_NEW_PLACE = "Where the result goes.  (default: a new place in the workspace)"
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="PATH", help=_NEW_PLACE)]
NewFolder = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A new folder.")]
_DEVICES = "[auto|cpu|cuda|cuda:N|mps|xpu]"
_AUTO = "auto takes a CUDA GPU where there is one."
Device = Annotated[str, typer.Option("--device", metavar=_DEVICES, callback=_check_device, help=_AUTO)]
Gpus = Annotated[
    int,
    typer.Option("--gpus", min=1, metavar="N", help="Start N processes here, by torchrun; without a GPU on the CPU."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and touch nothing.")]
Resume = Annotated[
    str,
    typer.Option(
        "--resume",
        metavar="auto|PATH",
        help="auto; a run's folder, or its newest checkpoint. A finished run goes on with more steps.",
    ),
]
Init = Annotated[str | None, artifact_option("--init", "Begin with the weights of this artifact.")]
Reference = Annotated[str | None, artifact_argument("REF", "A folder or an id.  (default: the newest)")]
_ANY_RECIPE = "A name, a file or an artifact.  (default: tiny)"
RecipeReference = Annotated[str | None, typer.Argument(metavar="RECIPE", help=_ANY_RECIPE, autocompletion=_recipes)]
Version = Annotated[
    bool, typer.Option("--version", "-V", callback=_show_version, is_eager=True, help="Print the version.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only where the result is.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Offline = Annotated[bool, typer.Option("--offline", callback=_go_offline, is_eager=True, help="Never use the network.")]
