"""serve: load a pipeline once and answer for it until a signal comes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bifrost_cli.config.schema import Recipe
from bifrost_cli.generation.choose_models import choose_models
from bifrost_cli.generation.pipeline import BifrostPipeline
from bifrost_cli.loading.compatibility import require_one_step
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.serve.access import read_token
from bifrost_cli.serve.answers import Limits
from bifrost_cli.serve.app import create_app
from bifrost_cli.serve.connections import Server, listen
from bifrost_cli.serve.engine import Engine


def serve(
    recipe: Recipe,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_file: Path | None = None,
    limits: Limits | None = None,
    branch: Path | str | None = None,
    controlnet: Path | str | None = None,
    workspace: Path | str = "runs",
    device: str = "auto",
    ui: Ui | None = None,
    sets: Sequence[str] | None = None,
) -> int:
    """Answer HTTP requests for images until SIGINT or SIGTERM; the answers under way are finished first.

    Args:
        recipe: models and settings; see `sets`.
        host: the address to listen at.
        port: 0 takes any that is free.
        token_file: a file with the token that requests have to show; needed for any host but this machine's own.
        limits: of requests; None is `Limits()`.
        branch: a branch artifact; None chooses (`choose_models`).
        controlnet: a ControlNet artifact likewise.
        workspace: where artifacts are looked up.
        device: where to compute.
        ui: told what was chosen, and the address.
        sets: not None: by the recipe that trained the branch, with these `section.key=value` settings, instead.

    Returns:
        How many requests were answered.

    Raises:
        UsageError: a host that others reach, without a token.
        EnvironmentProblem: BF-SERVE-008, the address cannot be listened at.
        ArtifactError: parts that do not fit.
    """
    ui, limits, token = ui or Ui(), limits or Limits(), read_token(token_file, host)
    with listen(host, port) as sock:
        models = choose_models(branch, controlnet, workspace)
        recipe = recipe if sets is None else models.own_recipe(sets)
        require_one_step(models.branch, recipe.generate.decode_steps)
        ui.say(models.why)
        # Nobody hears this pipeline: what its users ask for is written to no log.
        pipe = BifrostPipeline(recipe, models.branch, models.controlnet, device=device, in_memory=True)
        app = create_app(Engine(pipe, "bifrost", limits), limits, token)
        server = Server(app, limits, on_stop=app.state.worker.close)
        shown, at = f"[{host}]" if ":" in host else host, sock.getsockname()[1]
        url = f"http://{shown}:{at}"
        ui.say(f"serving at {url}/ (a page) and {url}/v1 (OpenAI's clients); Ctrl-C ends it")
        server.run(sockets=[sock])
        return server.server_state.total_requests
