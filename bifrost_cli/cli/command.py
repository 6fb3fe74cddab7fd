"""What every command shares: recipe, `--set`, `--json`, `-q`, `--debug`, `--offline`, and printing its result."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

import typer
from typer.core import TyperCommand

import bifrost_cli
from bifrost_cli import errors
from bifrost_cli.artifacts import Artifact, find, lineage
from bifrost_cli.artifacts.workspace import remember_outside, survey
from bifrost_cli.cli import options
from bifrost_cli.cli.options import RUNS, AsJson, Debug, Offline, Quiet, Sets, parameter
from bifrost_cli.errors import BifrostError, Interrupted, printable, public
from bifrost_cli.runtime import launch
from bifrost_cli.runtime.ui import TerminalUi, Ui

FIRST_PROMPT = "a red circle above a blue square"
_COMMON = {"as_json": AsJson, "quiet": Quiet, "debug": Debug, "offline": Offline}
_SUPPLIED = ("recipe", "ui", "late", "settings")
_GENERATE = f'next: bifrost generate "{FIRST_PROMPT}" -o out.png'


@dataclass(frozen=True)
class Result:
    """What a command prints: `lines` for people, `data` for --json, `path` for -q, then the `hint` on stderr.

    `error` is raised after the printing. `artifacts` are folders that the workspace remembers where they lie outside.
    """

    lines: Sequence[str] = ()
    data: dict[str, Any] = field(default_factory=dict)
    path: Path | str | None = None
    hint: str | None = None
    error: BifrostError | None = None
    artifacts: Sequence[Path] = ()

    @classmethod
    def of(cls, made: Artifact | Path | dict[str, Any], hint: str | None = None) -> Result:
        """A stage's return value: an artifact, a file or folder, or the plan of a dry run."""
        if isinstance(made, dict):
            return cls([f"{name}: {value}" for name, value in made.items()], made)
        if isinstance(made, Path):
            return cls([str(made)], {"path": str(made)}, made, hint)
        info = {key: value for key, value in made.info.items() if key != "recipe"}
        data = {"kind": made.kind, "id": made.id, "path": str(made.path), "info": info}
        return cls([f"{made.id}  {made.path}"], data, made.path, _next(made), artifacts=[made.path])


def _next(made: Artifact) -> str | None:
    """What to type next: what was made, or came before, is named where the next command would take another."""
    from bifrost_cli.loading.compatibility import SHARED, has_own_conditioner

    if made.kind == "latents":
        return "next: bifrost train branch" + _given(made, find(RUNS, "latents"))
    if has_own_conditioner(made):
        return _GENERATE + _given(made, find(RUNS, "branch"))
    if made.kind == "branch":
        stores = [line.artifact for line in lineage(made, RUNS) if line.kind == "latents" and line.artifact]
        return "next: bifrost train controlnet" + "".join(_given(one, find(RUNS, "latents")) for one in stores[:1])
    if made.kind != "controlnet":
        return None
    places = [survey(place, outside=True).artifacts for place in (RUNS, made.path.parent)]
    shared, latents = (lambda one: [one.identity.get(key) for key in SHARED]), [parent["id"] for parent in made.parents]
    branches = [one for found in places for one in found
                if one.kind == "branch" and [parent["id"] for parent in one.parents] == latents]  # fmt: skip
    fitting = [one for one in find(RUNS, "branch") if shared(one) == shared(made)]
    branch = "".join(_given(one, fitting) for one in branches[:1])
    return _GENERATE + branch + _given(made, find(RUNS, "controlnet"))


def _given(artifact: Artifact, found: Sequence[Artifact]) -> str:
    """The option that names an artifact, unless it is the newest of those that would be found."""
    path = os.path.relpath(artifact.path.resolve()) if ".." in artifact.path.parts else str(artifact.path)
    return "" if found and found[0].id == artifact.id else f" --{artifact.kind} {quote(path)}"


class LazyCommand(TyperCommand):
    """A command that looks up the options of recipe keys and of metrics when it is used, and not when any command
    starts: the schema that describes them costs more than all of `bifrost --help`."""

    flags: Sequence[str] = ()
    first: Callable[[Sequence[Any]], list[inspect.Parameter]] | None = None
    late: dict[str, Any]  # their values; Typer hands a function only what its signature has
    _params: list[Any] | None = None

    @property
    def params(self) -> list[Any]:
        """Typer's parameters: `first`, those of the function, and `flags` before what every command has."""
        if self._params is None:
            place = next((n for n, param in enumerate(self._declared) if param.name == "as_json"), 0)
            flags = _typer_params([options.key_option(key) for key in self.flags])
            params = [*self._declared[:place], *flags, *self._declared[place:]]
            self._params = [*(_typer_params(self.first(params)) if self.first else ()), *params]
        return self._params

    @params.setter
    def params(self, params: list[Any]) -> None:
        self._declared = params

    def invoke(self, ctx: Any) -> Any:
        """Run the function, the options that it does not declare in `late`."""
        others = ctx.params.keys() - {param.name for param in self._declared}
        self.late.update({name: ctx.params.pop(name) for name in others})
        return super().invoke(ctx)


def command(
    app: typer.Typer,
    name: str,
    flags: Sequence[str] = (),
    default: str | None = "tiny",
    stage: str | None = None,
    first: Callable[[Sequence[Any]], list[inspect.Parameter]] | None = None,
    text: str | None = None,  # the help, where it is not the docstring
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as a command; the decorator leaves the function as it is.

    Its `recipe` (by default `default`) becomes --recipe, --set and the options of the recipe keys `flags`. Supplied are
    `ui`; in `settings` what --set and these say, where no recipe was named and `default` is None; and in `late` the
    values of options that `first` gives when the command is used, from Typer's parameters that are there. It returns a
    `Result`; or `stage` names what `bifrost_cli` exports and takes the same options, and the function only refuses what
    can be refused before a model library is imported.
    """

    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        own = inspect.signature(body, eval_str=True).parameters
        late: dict[str, Any] = {}

        @functools.wraps(body)
        def run(*, as_json: bool, quiet: bool, debug: bool, offline: bool, **given: Any) -> None:
            try:
                settings: list[str] | None = None
                main = launch.distributed_env().rank == 0  # of several processes the first one speaks
                if "recipe" in own:
                    values = {key: late[options.key_name(key)] for key in flags}
                    sets = [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]
                    sets = [*(given.pop("sets") or ()), *sets]
                    settings = sets if given["recipe"] is None else None
                    given["recipe"] = bifrost_cli.load_recipe(given["recipe"], sets)
                supplied = {"ui": TerminalUi() if main and not quiet else Ui(), "late": late, "settings": settings}
                given |= {name: value for name, value in supplied.items() if name in own}
                result = _run_stage(stage, body, given) if stage else body(**given)
                if main:
                    for path in result.artifacts:
                        remember_outside(given["workspace"], path)
                    _show(result, as_json, quiet)
            except KeyboardInterrupt as error:
                again = "give the same command again; finished work is kept"
                raise Interrupted("interrupted before anything could be saved", fix=again) from error
            except Exception as error:
                if debug:
                    print(public(traceback.format_exc()), end="", file=sys.stderr)
                if isinstance(error, EOFError):  # Typer would take it for a person who closed the input
                    raise RuntimeError("a file ended early") from error
                raise

        wanted = [own[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in own if name not in _SUPPLIED]
        wanted += [options.recipe_option(default), parameter("sets", Sets, None)] if "recipe" in own else []
        _sign(run, [*wanted, *(parameter(name, hint, False) for name, hint in _COMMON.items())])
        made = type("Command", (LazyCommand,), {"flags": flags, "first": first and staticmethod(first), "late": late})
        app.command(name, cls=made, help=text)(run)
        return body

    return register


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Around what is refused before a model library is imported: in every process of a job, said by the first one."""
    try:
        yield
    except BifrostError as error:
        error.elsewhere = launch.distributed_env().rank > 0
        raise


def _run_stage(stage: str, check: Callable[..., None], given: dict[str, Any]) -> Result:
    """With --gpus N this command line goes to N processes, and this one ends as they do; a plan needs only one."""
    with refusals():
        check(**given)
    start_processes(given.pop("gpus", 1), given["device"], given.get("dry_run", False))
    return Result.of(getattr(bifrost_cli, stage)(**given))


def start_processes(gpus: int, device: str, dry_run: bool) -> None:
    """With --gpus N from 2 on this command line goes to N processes, and this one ends as they do."""
    if gpus > 1:
        launch.require_shared_device(device, gpus)
        if not dry_run:
            launch.start(gpus, sys.argv[1:])


def _sign(function: Callable[..., Any], parameters: list[inspect.Parameter]) -> None:
    """Give a function the signature that Typer reads."""
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def _typer_params(parameters: list[inspect.Parameter]) -> list[Any]:
    """Typer's own parameters for a function of these."""

    def nothing(**given: Any) -> None: ...

    _sign(nothing, parameters)
    scratch = typer.Typer(add_completion=False)
    scratch.command()(nothing)
    return typer.main.get_command(scratch).params


def _show(result: Result, as_json: bool, quiet: bool) -> None:
    if as_json:
        data = dict(result.data)
        if result.error:
            data["error"], result.error.in_result = errors.as_json(result.error), True
        print(json.dumps(data, indent=1, sort_keys=True, default=str))
    elif quiet and result.path is not None:
        print(result.path)
    else:
        for line in result.lines:
            print(printable(line))
    sys.stdout.flush()
    if result.hint and not quiet:
        print(result.hint, file=sys.stderr)
    if result.error:
        raise result.error
