"""`bifrost`: the tree of commands, and the one place where an exception becomes a message and an exit code.

Imports no torch: each command imports what it needs.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import io
import json
import logging
import os
import sys
from pathlib import Path

import typer

from bifrost_cli import errors
from bifrost_cli.artifacts.files import disk_errors
from bifrost_cli.cli import (
    artifact_commands,
    edit_commands,
    eval_commands,
    recipe_commands,
    serve_commands,
    stage_commands,
)
from bifrost_cli.cli.options import Version
from bifrost_cli.errors import BifrostError, UsageError
from bifrost_cli.runtime.launch import leave_status
from bifrost_cli.runtime.light_imports import in_own_process

CLOSED_PIPE = 141  # as a shell counts a command that SIGPIPE ended
# What other programs have an option for, and how it is said here.
_THREADS = "nothing needs setting: images are read by as many threads as there are cores"
_INSTEAD = {
    "--num-workers": _THREADS, "--workers": _THREADS, "--num-threads": _THREADS,
    "--resolution": "--set images.input_size=448, or images.output_size for what is generated",
    "--output-dir": "-o FOLDER", "--output_dir": "-o FOLDER", "--num-samples": "-n N", "--num-images": "-n N",
    "--learning-rate": "--lr", "--max-steps": "--steps", "--max-train-steps": "--steps", "--epochs": "--steps",
    "--num-epochs": "--steps", "--resume-from-checkpoint": "--resume FOLDER", "--config": "--recipe FILE",
    "--model": "--set models.mllm=FOLDER_OR_ID", "--num-inference-steps": "--steps", "--height": "the recipe's "
    "images.output_size: --set images.output_size=512", "--width": "the recipe's images.output_size", "--cfg":
    "--guidance-scale", "--text-column": "--caption-column", "--force": "nothing is overwritten: another -o",
    "--overwrite": "nothing is overwritten: another -o", "--split": "name it in the source: hf:NAME:SPLIT",
    "--fp16": "--set models.dtype=bfloat16", "--bf16": "--set models.dtype=bfloat16",
    "--mixed-precision": "--set branch.train.precision=bf16", "--gradient-checkpointing":
    "--set branch.train.gradient_checkpointing=true", "--lora": "--set branch.tune=lora --set branch.lora_rank=16",
    "--verbose": "what is done is said on stderr; --debug shows tracebacks", "--yes": "nothing asks; leave it out",
}  # fmt: skip
_HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(name="bifrost", pretty_exceptions_enable=False, context_settings=_HELP)


@app.callback(invoke_without_command=True)
def root(context: typer.Context, version: Version = False) -> None:
    """A frozen multimodal LLM and a frozen diffusion model, joined by patch-level CLIP latents.

    Everything works with no argument on a tiny system that ships with the package; --recipe leaves it.

    First image: bifrost generate "a red circle above a blue square" -o out.png
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


_GROUPS = (
    (None, stage_commands.app), (None, edit_commands.app), (None, eval_commands.app),
    ("geneval", eval_commands.geneval),
    (None, artifact_commands.interop), (None, eval_commands.ablations), ("data", stage_commands.data),
    (None, recipe_commands.planning), ("artifacts", artifact_commands.app), ("recipes", recipe_commands.app),
    ("shapes", stage_commands.shapes), (None, serve_commands.app),
)  # fmt: skip
for name, group in _GROUPS:
    app.add_typer(group, name=name)


def main() -> None:
    """The console script."""
    gc.set_threshold(100_000, 50, 1000)  # else the collector spends a second on what importing diffusers makes
    in_own_process()
    code = run()
    leave_status(code)
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # everything is written; taking half a million objects apart would cost another second


def run(arguments: list[str] | None = None) -> int:
    """Run one command line and return its exit code; every error has been printed.

    With --json an error is one object on stdout, too, unless the command's own object holds it.
    """
    _prepare_environment()
    streams, given = (sys.stdout, sys.stderr), sys.argv[1:] if arguments is None else arguments
    try:
        code = int(app(arguments, prog_name="bifrost", standalone_mode=False) or 0)
        sys.stdout.flush()
        return code
    except BaseException as error:  # noqa: B036 the last line of defence: nothing reaches the user as a traceback
        if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):  # of Typer, or of rich
            sys.stdout, sys.stderr = streams
        elif not isinstance(error, BrokenPipeError):
            with contextlib.suppress(BrokenPipeError):
                return _tell(error, "--json" in given)
    return CLOSED_PIPE


def _tell(error: BaseException, as_json: bool) -> int:
    """Print an error; its exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if hasattr(error, "format_message") and not error.format_message():
        return 2  # a group without a command: its help has been printed
    problem = explain(error)
    if not problem.elsewhere:
        if as_json and not problem.in_result:
            print(json.dumps(errors.as_json(problem), indent=1, sort_keys=True, default=str), flush=True)
        print(errors.render(problem), file=sys.stderr)
    return problem.exit_code


def _prepare_environment() -> None:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # diffusers imports bitsandbytes where it is installed, which then warns of kernels that nothing here asks for
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if "WORLD_SIZE" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else each process warns that it used all parameters
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show fails no command
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the hub's and the loaders' own bars: only on a terminal


def explain(error: BaseException) -> BifrostError:
    """Any exception as one of ours."""
    line = (str(error).splitlines() or [""])[0]
    if isinstance(error, BifrostError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return errors.Interrupted("interrupted before anything could be saved", fix="give the same command again")
    if hasattr(error, "format_message"):  # Typer's own usage errors; their class lives in a module that moves
        context = getattr(error, "ctx", None)
        place = context.command_path if context is not None else "bifrost"
        said = error.format_message().rstrip(".")
        typed = str(getattr(error, "option_name", ""))
        return UsageError(said, fix=_INSTEAD.get(typed) or f"see {place} --help")
    if errors.is_out_of_memory(error):
        return errors.OutOfMemory("out of memory", at=line or None, fix="smaller batches: --set SECTION.batch_size=1")
    if isinstance(error, OSError):
        try:
            with disk_errors(Path(error.filename or "."), doing="use"):
                raise error
        except BifrostError as problem:
            return problem
        except OSError:
            if error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR):
                what = f"{str(error.filename)[:80]} cannot be a path: {error.strerror}"
                return UsageError(what, fix="choose another -o")
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("bifrost_cli"):
        fix = f"pip install {error.name}"
        return errors.EnvironmentProblem(f"the package {error.name} is not installed", fix=fix, code="BF-ENV-002")
    what = f"{type(error).__name__}: {line}"
    return BifrostError(f"this is a bug: {what}", fix="run it with --debug and report what it prints")
