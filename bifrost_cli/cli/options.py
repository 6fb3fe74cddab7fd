"""Options that several commands share, and the flags that stand for a recipe key.

In: nothing. Out: annotated types for command signatures. Imports neither the schema nor a stage, so that `--help`
stays quick. Does not know what the options do.
"""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_args

import typer

from bifrost_cli import __version__

if TYPE_CHECKING:
    from bifrost_cli.config.schema import Recipe
else:
    Recipe = Any  # signatures are evaluated when commands are registered; the schema costs 0.3 s that help need not pay


class Flag(NamedTuple):
    """A recipe key that has an option of its own: --missing-caption is latents.missing_caption."""

    key: str

    @property
    def parameter(self) -> str:
        """The name that the command's function sees."""
        return "key_" + self.key.replace(".", "_")

    def declare(self) -> inspect.Parameter:
        """The option, with the type, the choices and the description of the schema's field."""
        from bifrost_cli.config.load import all_keys
        from bifrost_cli.config.schema import Recipe

        field = dict(all_keys(Recipe))[self.key]
        kind = next((arm for arm in get_args(field.annotation) if arm is str), field.annotation)  # of str | None
        name = "--" + self.key.rpartition(".")[2].replace("_", "-")
        names = f"{name}/--no-{name[2:]}" if kind is bool else name
        option = typer.Option(names, help=f"{field.description}  ({self.key})", show_default=False)
        return inspect.Parameter(
            self.parameter, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
        )


def complete_recipe(incomplete: str) -> list[str]:
    """The shipped recipes that begin so; a shell adds files itself when there are none."""
    from bifrost_cli.config.load import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


def complete_artifact(context: typer.Context, incomplete: str) -> list[str]:
    """The ids of a workspace's artifacts, and what ships with the package."""
    from bifrost_cli.artifacts.workspace import SHIPPED, survey

    ids = [a.id for a in survey(context.params.get("workspace") or "runs", outside=True).artifacts]
    return [ref for ref in (*ids, *SHIPPED) if ref.startswith(incomplete)]


def artifact_option(name: str, text: str) -> Any:
    """An option that names an artifact of the workspace."""
    return typer.Option(name, metavar="REF", help=text, autocompletion=complete_artifact)


def artifact_arguments(text: str) -> Any:
    """An argument that names artifacts of the workspace."""
    return typer.Argument(metavar="REF...", help=text, autocompletion=complete_artifact)


def recipe_option(default: str) -> Any:
    """--recipe, with the recipe that a command takes when nothing is said."""
    text = f"A shipped name, a YAML file or an artifact folder. (default: {default})"
    return Annotated[
        str,
        typer.Option("--recipe", metavar="REF", help=text, show_default=False, autocompletion=complete_recipe),
    ]


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
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="PATH", help="Where the result goes.  (default: a new place in the workspace)"
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="[auto|cpu|cuda|cuda:N|mps|xpu]",
        callback=_check_device,
        help="auto takes a CUDA GPU where there is one.",
    ),
]
Gpus = Annotated[
    int,
    typer.Option("--gpus", min=1, metavar="N", help="Start N processes here, by torchrun; without a GPU on the CPU."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and touch nothing.")]
Resume = Annotated[
    str,
    typer.Option("--resume", metavar="auto|PATH", help="auto, a run folder, or the newest checkpoint of a run."),
]
Reference = Annotated[
    str | None,
    typer.Argument(metavar="REF", help="A folder or an id.  (default: the newest)", autocompletion=complete_artifact),
]
RecipeReference = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE", help="A name, a file or an artifact.  (default: tiny)", autocompletion=complete_recipe
    ),
]
Version = Annotated[
    bool, typer.Option("--version", "-V", callback=_show_version, is_eager=True, help="Print the version.")
]

# ---- options of every command
AsJson = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only where the result is.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Offline = Annotated[bool, typer.Option("--offline", callback=_go_offline, is_eager=True, help="Never use the network.")]

# ---- flags for recipe keys: their types, choices and help are those of the schema
SOURCE = (
    Flag("latents.missing_caption"),
    Flag("latents.bad_image"),
    Flag("latents.max_bad"),
    Flag("images.animated"),
    Flag("latents.image_column"),
    Flag("latents.caption_column"),
    Flag("latents.captions"),
    Flag("latents.class_names"),
)
EXTRACT = (Flag("latents.encoder"), Flag("images.background"), *SOURCE)
GENERATE = (
    Flag("generate.plan"),
    Flag("generate.decode_steps"),
    Flag("generate.branch_guidance"),
    Flag("generate.steps"),
    Flag("generate.guidance_scale"),
    Flag("generate.control_scale"),
)
RECONSTRUCT = GENERATE[3:]
EVALUATE = (Flag("evaluate.min_samples"), Flag("evaluate.features"))
