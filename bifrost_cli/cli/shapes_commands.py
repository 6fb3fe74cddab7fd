"""`bifrost shapes`: the built-in world: draw its images, train its models from nothing."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated, Literal

import typer

from bifrost_cli.cli.command import Result, command
from bifrost_cli.cli.options import Device, Output, Recipe, Workspace
from bifrost_cli.runtime.ui import Ui

app = typer.Typer(no_args_is_help=True, help="The built-in world of coloured shapes.")


@command(app, "render")
def render(
    ui: Ui,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to fill.")] = Path("shapes"),
    n: Annotated[int, typer.Option("-n", min=1, help="How many images.")] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which images.")] = 0,
    split: Annotated[Literal["train", "held-out"], typer.Option("--split", help="Which prompts.")] = "train",
) -> Result:
    """Draw images of the built-in world with their captions and plans.

    Example: bifrost shapes render -n 100 -o shapes
    """
    from bifrost_cli.toy_system.render import render_shapes

    folder = render_shapes(output, n=n, seed=seed, split=split, ui=ui)
    return Result(
        [str(folder)], {"path": str(folder), "images": n}, folder, f"next: bifrost extract-latents {quote(str(folder))}"
    )


@command(app, "pretrain", default="shapes")
def pretrain(
    recipe: Recipe,
    ui: Ui,
    parts: Annotated[str | None, typer.Option("--parts", metavar="A,B", help="Only these parts.")] = None,
    output: Output = None,
    workspace: Workspace = Path("runs"),
    device: Device = "auto",
) -> Result:
    """Train the whole built-in system from nothing: bases, branch and ControlNet.

    Parts, in order: vae, mllm, open_clip, flux, latents, branch, controlnet.

    Given again, the command continues where it stopped.

    Example: bifrost shapes pretrain -o system
    """
    from bifrost_cli.toy_system.pretrain import pretrain

    chosen = parts.split(",") if parts is not None else None
    folder = pretrain(recipe, parts=chosen, output=output, workspace=workspace, device=device, ui=ui)
    return Result([str(folder)], {"path": str(folder)}, folder)
