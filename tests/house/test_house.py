"""The house: quick help, forbidden calls, strict schemas, small files, and the options frozen."""

from __future__ import annotations

import ast
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel

from bifrost_cli.cli.app import app
from bifrost_cli.config.schema import Recipe

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "bifrost_cli"
SOURCES = sorted(PACKAGE.rglob("*.py"))
OPTIONS = Path(__file__).parents[1] / "options.txt"


def relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


# ---- help ------------------------------------------------------------------------------------------------------------

HELP = """
import sys
from bifrost_cli.cli.app import run
assert run(["--help"]) == 0
heavy = {"torch", "transformers", "diffusers", "open_clip", "zarr", "numpy", "pydantic"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_imports_no_torch_and_takes_under_0_8_seconds_of_cpu():
    assert min(_cpu_seconds([sys.executable, "-c", HELP]) for _ in range(3)) < 0.8


def _cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_importing_the_package_costs_nothing_and_offers_the_stages():
    script = (
        "import sys, bifrost_cli; assert not {'torch', 'pydantic', 'typer'} & set(sys.modules); "
        "assert {'extract_latents', 'train_branch', 'train_controlnet', 'generate', 'evaluate', 'load_recipe'} "
        "<= set(dir(bifrost_cli)); print(bifrost_cli.load_recipe().name)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "tiny\n"


# ---- no code runs from data ------------------------------------------------------------------------------------------

FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "os.system"}
FORBIDDEN_METHODS = {"cuda", "extractall", "load_module"}
FORBIDDEN_IMPORTS = {"pickle", "click", "dill", "joblib", "shelve", "marshal"}
FORBIDDEN_KEYWORDS = {("shell", True), ("trust_remote_code", True), ("allow_pickle", True), ("weights_only", False)}


def forbidden(path: Path) -> list[str]:
    """What a file says that could run code out of data, or that the house does without."""
    return [what for node in ast.walk(ast.parse(path.read_text())) for what in _forbidden(path, node)]


def _forbidden(path: Path, node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return sorted({alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_IMPORTS)
    if isinstance(node, ast.ImportFrom):
        names = {f"{node.module}.{alias.name}" for alias in node.names} & FORBIDDEN_CALLS
        return [*names, *({(node.module or "").split(".")[0]} & FORBIDDEN_IMPORTS)]
    if not isinstance(node, ast.Call):
        return []
    name = ast.unparse(node.func)
    method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    found = [name] if name in FORBIDDEN_CALLS and not _reads_published_weights(path, node) else []
    found += {method} & FORBIDDEN_METHODS
    given = {(key.arg, key.value.value) for key in node.keywords if isinstance(key.value, ast.Constant)}
    return [*found, *(f"{word}={value}" for word, value in given & FORBIDDEN_KEYWORDS)]


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_forbidden_calls(path):
    assert forbidden(path) == []


@pytest.mark.parametrize(
    "line",
    ["torch.load(p)", "torch.load(p, weights_only=False)", "from torch import load", "import pickle",
     "import pickle as p", "from pickle import loads", "yaml.load(t)", "from yaml import load",
     "yaml.load(t, Loader=yaml.Loader)", "eval(t)", "exec(t)", "run(c, shell=True)", "os.system(c)",
     "tar.extractall(p)", "m.from_pretrained(p, trust_remote_code=True)",
     "np.load(p, allow_pickle=True)", "import click"],
)  # fmt: skip
def test_the_search_for_forbidden_calls_sees_them(line, tmp_path):
    (tmp_path / "a.py").write_text(f"with open(p) as f:\n    {line}\n")
    assert forbidden(tmp_path / "a.py")


def _reads_published_weights(path, call: ast.Call) -> bool:
    """FID's weights exist as a torch.save file alone: one place reads it, tensors only."""
    safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)
    return path == PACKAGE / "evaluation" / "networks.py" and ast.unparse(call.func) == "torch.load" and safe


# ---- every lasting write through one module -------------------------------------------------------------------------

WRITER = "artifacts/files.py"
WRITES = {
    "write_bytes", "write_text", "touch", "unlink", "rename", "rmdir", "mkdir", "makedirs", "symlink_to", "hardlink_to",
    "rmtree", "copytree", "save", "save_pretrained", "save_file", "savez", "tofile", "save_to_disk", "to_parquet",
    "to_csv", "dump", "fsync", "ftruncate", "truncate", "pwrite", "mkstemp", "mkdtemp",
}  # fmt: skip
WRITES_OF_MODULES = {"os.open", "os.write", "os.replace", "os.link", "os.remove", "shutil.copy", "shutil.move"}
ALLOWED_WRITES = {
    "artifacts/lock.py: os.open": "the lock stays open",
    "artifacts/lock.py: os.ftruncate": "the name of the holder, which outlives nobody",
    "data/png.py: Image.fromarray(np.ascontiguousarray(pixels_HWC)).save": "into memory",
    "training/loop.py: checkpoints.save": "ours",
    "training/checkpoint.py: dcp.save": "PyTorch's own, into a folder that our rename makes a checkpoint",
    "training/loop.py: tempfile.TemporaryDirectory": "what only the first process is to write",
    "runtime/launch.py: tempfile.TemporaryDirectory": "an exit code, gone with the job",
    "planning/bench/paired.py: os.open": "asks the system to measure a peak anew",
    "planning/bench/paired.py: os.write": "likewise",
    "planning/bench/bench_start.py: tempfile.TemporaryDirectory": "pictures that are only timed",
    "planning/bench/bench_extract.py: tempfile.TemporaryDirectory": "stores that are only timed",
    "planning/bench/bench_store.py: tempfile.TemporaryDirectory": "likewise",
    "evaluation/networks.py: torch.save": "into memory",
    "interop/push.py: tempfile.TemporaryDirectory": "a card and a manifest on their way to a hub",
    "toy_system/pretrain.py: *.save_pretrained": "folders that libraries read; synced before the card that counts",
}


def writes(path: Path) -> list[str]:
    """The calls of a file that change the disk, or can: writing modes, and names of functions that write."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        mode = next((k.value for k in node.keywords if k.arg == "mode"), None)
        opener = name.split(".")[-1] in ("open", "fdopen") or name.startswith("zarr.")
        modes = [*node.args[:2], *([mode] if mode else [])] if opener else []
        texts = [value.value for value in modes if isinstance(value, ast.Constant) and isinstance(value.value, str)]
        opens = any(set(text) <= set("rwabxt+") and set(text) & set("wax+") for text in texts)
        method = isinstance(node.func, ast.Attribute) and node.func.attr in WRITES
        if opens or method or name in WRITES_OF_MODULES or "tempfile" in name:
            found.append(f"{relative(path)}: {name}")
    return found


def allowed(call: str) -> bool:
    file, name = call.split(": ", 1)
    return call in ALLOWED_WRITES or f"{file}: *.{name.split('.')[-1]}" in ALLOWED_WRITES


def test_every_lasting_write_goes_through_one_module():
    found = [call for path in SOURCES if relative(path) != WRITER for call in writes(path)]
    assert not [call for call in found if not allowed(call)]
    used = {call for call in found} | {f"{c.split(': ')[0]}: *.{c.split('.')[-1]}" for c in found}
    assert not set(ALLOWED_WRITES) - used, "no longer needed"


@pytest.mark.parametrize(
    "line",
    ["open(p, 'w')", "open(p, mode='ab')", "p.open('x')", "p.write_text('')", "os.replace(a, b)", "shutil.rmtree(p)",
     "m.save_pretrained(p)", "json.dump(v, f)", "os.open(p, flags)", "np.save(p, a)", "p.unlink()",
     "tempfile.NamedTemporaryFile()", "zarr.open_group(p, 'w')", "os.remove(p)", "image.save(p)"],
)  # fmt: skip
def test_the_search_for_writes_sees_them(line, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "a.py").write_text(f"with open(p) as f, open(p, 'rb') as g, p.open() as h:\n    {line}\n")
    assert len(writes(tmp_path / "a.py")) == 1


# ---- schemas ---------------------------------------------------------------------------------------------------------


def sections(schema: type[BaseModel]) -> list[type[BaseModel]]:
    inner = [info.annotation for info in schema.model_fields.values()]
    nested = [kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return [schema, *(found for kind in nested for found in sections(kind))]


def test_no_section_takes_unknown_keys_or_changes():
    found = sections(Recipe)
    assert len(found) > 8
    for schema in found:
        config = schema.model_config
        assert (config.get("extra"), config.get("frozen"), config.get("strict")) == ("forbid", True, True), schema
        with pytest.raises(ValueError, match="extra_forbidden"):
            schema.model_validate({"no such key": 1})


# ---- style -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_file_says_what_it_is_and_stays_small(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "no module docstring"
    assert len(text.splitlines()) <= 400
    assert path.stem not in ("utils", "common", "helpers")
    if len(tree.body) > 1:
        assert "from __future__ import annotations" in text


def test_nine_functions_in_ten_are_short():
    lengths = sorted(
        (node.end_lineno or 0) - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    assert lengths[len(lengths) * 9 // 10] < 45


# ---- options ---------------------------------------------------------------------------------------------------------


def options(command, name: str = "bifrost") -> list[str]:
    """Every command with its arguments and options, one a line."""
    parameters = [
        "/".join([*parameter.opts, *parameter.secondary_opts])
        for parameter in command.params
        if parameter.name != "help"
    ]
    lines = [f"{name}: {' '.join(parameters)}".rstrip()]
    for inner, sub in sorted(getattr(command, "commands", {}).items()):
        lines += options(sub, f"{name} {inner}")
    return lines


def test_the_options_are_frozen():
    """A changed option is a changed promise: change options.txt with it, and say so in the CHANGELOG."""
    assert "\n".join(options(typer.main.get_command(app))) + "\n" == OPTIONS.read_text()


def test_every_command_has_help_with_an_example():
    for line in options(typer.main.get_command(app)):
        words = line.split(":")[0].split()[1:]
        command = typer.main.get_command(app)
        for word in words:
            command = command.commands[word]
        if not getattr(command, "commands", None):
            assert "Example: bifrost " in (command.help or ""), line
