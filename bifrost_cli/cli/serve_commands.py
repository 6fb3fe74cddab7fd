"""`bifrost serve`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from bifrost_cli.artifacts import resolve
from bifrost_cli.cli.command import Result, command
from bifrost_cli.cli.options import RUNS, Device, Recipe, Workspace, artifact_option
from bifrost_cli.errors import EnvironmentProblem
from bifrost_cli.runtime.light_imports import import_generation
from bifrost_cli.runtime.ui import Ui, counted

app = typer.Typer()

Host = Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to listen.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes any that is free.")]
Token = Annotated[
    Path | None,
    typer.Option("--token-file", metavar="FILE", help="Requests have to show the token that this file holds."),
]
Branch = Annotated[str | None, artifact_option("--branch", "A branch artifact.")]
ControlNet = Annotated[str | None, artifact_option("--controlnet", "A ControlNet artifact.")]


@command(app, "serve", default=None)
def serve(
    recipe: Recipe,
    ui: Ui,
    settings: list[str] | None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    token_file: Token = None,
    queue: Annotated[int, typer.Option("--queue", min=0, help="How many requests may wait.")] = 32,
    max_images: Annotated[int, typer.Option("--max-images", min=1, help="Of one request.")] = 10,
    max_steps: Annotated[int, typer.Option("--max-steps", min=1, help="Of the branch, and of diffusion.")] = 100,
    max_body: Annotated[int, typer.Option("--max-body", min=1, metavar="MB", help="Of one request.")] = 10,
    branch: Branch = None,
    controlnet: ControlNet = None,
    workspace: Workspace = RUNS,
    device: Device = "auto",
) -> Result:
    """Serve images over HTTP, as OpenAI's clients ask for them, and a page to make them in a browser.

    One pipeline is loaded once, and requests wait in a queue. An address that others reach needs --token-file.

    Example: bifrost serve --port 8000
    """
    from bifrost_cli.serve.access import read_token
    from bifrost_cli.serve.answers import Limits

    read_token(token_file, host)
    for kind, ref in (("branch", branch), ("controlnet", controlnet)):
        if ref is not None:
            resolve(workspace, ref, kind)
    try:
        for name in ("fastapi", "prometheus_client", "python_multipart", "uvicorn"):
            importlib.import_module(name)
    except ImportError as error:
        raise EnvironmentProblem(
            f"serve needs the package {error.name}", fix="pip install 'bifrost-cli[serve]'", code="BF-ENV-002"
        ) from error
    import_generation(recipe.models.weights)
    from bifrost_cli.serve.serve import serve

    limits = Limits(waiting=queue, images=max_images, steps=max_steps, body_bytes=max_body * 1_000_000)
    answered = serve(
        recipe,
        host=host,
        port=port,
        token_file=token_file,
        limits=limits,
        branch=branch,
        controlnet=controlnet,
        workspace=workspace,
        device=device,
        ui=ui,
        sets=settings,
    )
    return Result([counted(answered, "request") + " answered"], {"requests": answered})
