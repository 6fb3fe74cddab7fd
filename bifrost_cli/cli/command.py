"""What every command shares, written once: recipe, `--set`, `--json`, `-q`, `--debug`, `--offline`, and the printing.

In: a function that takes a `recipe` and a `ui` (when it names them) and its own options, and returns a `Result`. Out:
a Typer command. Results go to stdout, everything else to stderr. Does not know any stage.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from bifrost_cli.artifacts.workspace import remember_outside
from bifrost_cli.cli.options import AsJson, Debug, Flag, Offline, Quiet, Sets, recipe_option
from bifrost_cli.errors import BifrostError, Interrupted, printable
from bifrost_cli.errors import as_json as error_json
from bifrost_cli.runtime.launch import distributed_env
from bifrost_cli.runtime.ui import TerminalUi, Ui

_COMMON = {"as_json": AsJson, "quiet": Quiet, "debug": Debug, "offline": Offline}


@dataclass(frozen=True)
class Result:
    """What a command prints: `lines` for people, `data` for --json, `path` for -q, then the `hint` on stderr.

    `error` is raised after the printing: a command that finished, with findings. `artifacts` are the folders that were
    made, which the workspace remembers where they lie outside.
    """

    lines: Sequence[str] = ()
    data: dict[str, Any] = field(default_factory=dict)
    path: Path | str | None = None
    hint: str | None = None
    error: BifrostError | None = None
    artifacts: Sequence[Path] = ()


Body = Callable[..., Result]


def command(
    app: typer.Typer,
    name: str,
    flags: Sequence[Flag] = (),
    default: str = "tiny",
    check: Callable[..., None] | None = None,
    cls: type[LazyCommand] | None = None,
) -> Callable[[Body], Body]:
    """Register a function as a command.

    Args:
        app: the group that it belongs to.
        name: what people type.
        flags: recipe keys that have a flag of their own.
        default: the recipe when none is named.
        check: takes the command's parameters and raises what can be refused before a model library is imported.
        cls: the command's class; None is `LazyCommand`.

    Returns:
        The decorator; it leaves the function as it is. A `recipe` parameter becomes --recipe, --set and `flags`, and
        `ui` is supplied.
    """

    def register(body: Body) -> Body:
        own = inspect.signature(body, eval_str=True).parameters
        values: dict[str, Any] = {}

        @functools.wraps(body)
        def run(*, as_json: bool, quiet: bool, debug: bool, offline: bool, **given: Any) -> None:
            try:
                if "recipe" in own:
                    given["recipe"] = _load(given, flags, values)
                if "ui" in own:
                    given["ui"] = Ui() if quiet or distributed_env().rank else TerminalUi()
                if check is not None:
                    _check(check, given)
                result = body(**given)
                if distributed_env().rank == 0:  # of several processes the first one speaks
                    for path in result.artifacts:
                        remember_outside(given["workspace"], path)
                    _show(result, as_json, quiet)
            except KeyboardInterrupt as error:
                again = "give the same command again; finished work is kept"
                raise Interrupted("interrupted before anything could be saved", fix=again) from error
            except Exception as error:
                if debug:
                    traceback.print_exc()
                if isinstance(error, EOFError):  # Typer would take it for a person who closed the input
                    raise RuntimeError("a file ended early") from error
                raise

        _declare(run, own, default)
        app.command(name, cls=type("Command", (cls or LazyCommand,), {"flags": flags, "values": values}))(run)
        return body

    return register


class LazyCommand(TyperCommand):
    """A command whose flags for recipe keys are looked up when it is used, and not when any command starts: the schema
    that describes them costs more than all of `bifrost --help`."""

    flags: Sequence[Flag] = ()
    values: dict[str, Any]  # of the flags; Typer hands a function only what its signature has
    _params: list[Any] | None = None

    @property
    def params(self) -> list[Any]:
        """Typer's parameters: those of the function, with the flags before what every command has."""
        if self._params is None:
            place = next((n for n, param in enumerate(self._declared) if param.name == "as_json"), 0)
            flags = typer_params([flag.declare() for flag in self.flags])
            params = [*self._declared[:place], *flags, *self._declared[place:]]
            self._params = [*self.first_params(params), *params]
        return self._params

    @params.setter
    def params(self, params: list[Any]) -> None:
        self._declared = params

    def invoke(self, ctx: Any) -> Any:
        """Run the function, the flags in `values`."""
        self.values.update((flag.parameter, ctx.params.pop(flag.parameter)) for flag in self.flags)
        return super().invoke(ctx)

    def first_params(self, others: Sequence[Any]) -> list[Any]:
        """Parameters of a subclass, before `others`."""
        return []


def typer_params(parameters: list[inspect.Parameter]) -> list[Any]:
    """Typer's own parameters for a function of these."""

    def nothing(**given: Any) -> None: ...

    nothing.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    nothing.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    scratch = typer.Typer(add_completion=False)
    scratch.command()(nothing)
    return typer.main.get_command(scratch).params


def _check(check: Callable[..., None], given: dict[str, Any]) -> None:
    """Refuse in every process of a job, and say it in the first one."""
    try:
        check(**given)
    except BifrostError as error:
        error.elsewhere = distributed_env().rank > 0
        raise


def _declare(run: Callable[..., None], own: Any, default: str) -> None:
    """Give `run` the signature that Typer reads."""
    wanted = [parameter for name, parameter in own.items() if name not in ("recipe", "ui")]
    if "recipe" in own:
        wanted += [_option("recipe", recipe_option(default), default), _option("sets", Sets, None)]
    wanted += [_option(name, hint, False) for name, hint in _COMMON.items()]
    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in wanted]
    run.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in wanted}


def _option(name: str, hint: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _load(given: dict[str, Any], flags: Sequence[Flag], values: dict[str, Any]) -> Any:
    from bifrost_cli.config.load import load_recipe

    sets = list(given.pop("sets") or ())
    for flag in flags:
        value = values[flag.parameter]
        if value is not None:
            sets.append(f"{flag.key}={json.dumps(value)}")
    return load_recipe(given.pop("recipe"), sets)


def _show(result: Result, as_json: bool, quiet: bool) -> None:
    if as_json:
        data = dict(result.data)
        if result.error:
            data["error"], result.error.in_result = error_json(result.error), True
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
