"""The command line: what a command hands to its stage, what it prints where, and how every error leaves."""

from __future__ import annotations

import ast
import errno
import inspect
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image

import bifrost_cli.cli.stage_commands as stage_commands
from bifrost_cli import errors
from bifrost_cli.artifacts import Artifact, Draft
from bifrost_cli.cli.app import run
from bifrost_cli.cli.command import FIRST_PROMPT, Result
from bifrost_cli.cli.eval_commands import EVALUATE
from bifrost_cli.cli.options import key_option
from bifrost_cli.cli.stage_commands import EXTRACT, GENERATE
from bifrost_cli.config.load import all_keys
from bifrost_cli.config.schema import Recipe
from bifrost_cli.evaluation.registry import metric_flags
from bifrost_cli.models.mllm.frozen_mllm import Completion

ROOT = Path(__file__).parents[2]
STAGES = {
    "extract_latents": ("extraction.extract", ["extract-latents"]),
    "train_branch": ("training.train_branch", ["train", "branch"]),
    "train_controlnet": ("training.train_controlnet", ["train", "controlnet"]),
    "generate": ("generation.generate", ["generate", "a red circle"]),
    "evaluate": ("evaluation.evaluate", ["eval"]),
    "reconstruct": ("generation.reconstruct", ["reconstruct", "a.png"]),
    "answer": ("generation.ask", ["ask", "a.png", "what?"]),
    "run_bench": ("planning.bench.paired", ["bench", "decode"]),
    "import_checkpoint": ("interop.import_checkpoint", ["import", "folder"]),
    "export": ("interop.export", ["export", "builtin:branch"]),
    "render_shapes": ("toy_system.render", ["shapes", "render"]),
    "pretrain": ("toy_system.pretrain", ["shapes", "pretrain"]),
}


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "")  # so that whatever the command sets is undone


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """Put a stand-in where a stage is; it records its call and returns, or raises, what it is told to."""

    Image.new("RGB", (64, 64)).save("a.png")
    Path("list.txt").write_text("a star\na circle\n")
    Path("folder").mkdir()

    def replace(name: str, result=None):
        calls: list[dict] = []
        if name.startswith("train"):
            made(tmp_path / "runs" / "latents")

        def stand_in(*args, **options):
            calls.append({"args": args, **options})
            if isinstance(result, BaseException):
                raise result
            return result if result is not None else made(tmp_path / "made")

        module = types.ModuleType(f"bifrost_cli.{STAGES[name][0]}")
        setattr(module, name, stand_in)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return calls

    return replace


def made(path: Path, kind: str = "latents") -> Artifact:
    with Draft.open(path, kind, {"x": 1}) as draft:
        return draft.complete or draft.commit({"rows": 3, "recipe": {"name": "tiny"}})


# ---- results ---------------------------------------------------------------------------------------------------------


def test_a_result_goes_to_stdout_and_the_hint_to_stderr(stage, capsys):
    stage("extract_latents")
    assert run(["extract-latents"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("latents-") and out.count("\n") == 1
    assert err == f"next: bifrost train branch --latents {out.split()[1]}\n", "which lies outside ./runs"


def test_the_hint_means_what_was_made_wherever_it_is(tmp_path, monkeypatch):
    """What the next command would not find, or not take, is named, quoted; the newest of ./runs is not."""
    monkeypatch.chdir(tmp_path)

    def new(path, kind, *parents, **identity):
        with Draft.open(Path(path), kind, {"encoder": {}, "grid": [1], "channels": 2, **identity}, parents) as draft:
            return draft.commit()

    def hint(artifact):
        return Result.of(artifact).hint

    generate = f'next: bifrost generate "{FIRST_PROMPT}" -o out.png'
    assert hint(away := new("data/my latents", "latents")) == "next: bifrost train branch --latents 'data/my latents'"
    assert hint(old := new("runs/a", "latents", x=1)) == hint(away).partition(" --")[0] == "next: bifrost train branch"
    assert hint(away).endswith(" --latents 'data/my latents'")
    assert hint(new("other/a", "latents", x=2)).endswith(" --latents other/a"), "of another workspace"
    assert hint(new("runs/b", "latents", x=3)) == "next: bifrost train branch"
    assert hint(old).endswith(" --latents runs/a"), "the newest is another"
    branch = new("my b", "branch", away)
    assert hint(branch) == "next: bifrost train controlnet --latents 'data/my latents'"
    controlnet = new("my c", "controlnet", away)
    assert hint(controlnet) == f"{generate} --branch 'my b' --controlnet 'my c'"
    other = new("runs/c", "branch", old)
    assert hint(other) == "next: bifrost train controlnet --latents runs/a"
    assert hint(controlnet) == f"{generate} --branch 'my b' --controlnet 'my c'", "runs/c would fit, and is another"
    assert hint(new("runs/d", "controlnet", old)) == generate
    assert hint(new("alone", "branch", away, painter="x")) == f"{generate} --branch alone", "its own control"
    assert hint(new("runs/e", "samples", other)) is None


def test_json_is_exactly_one_object_and_quiet_is_the_path_alone(stage, capsys, tmp_path):
    stage("extract_latents")
    assert run(["extract-latents", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "latents" and found["info"] == {"rows": 3} and found["path"] == str(tmp_path / "made")
    assert run(["extract-latents", "-q"]) == 0
    assert capsys.readouterr() == (f"{tmp_path / 'made'}\n", "")


def test_a_picture_and_a_plan_are_results_too(stage, capsys):
    stage("generate", Path("out.png"))
    assert run(["generate", "a red circle", "-o", "out.png"]) == 0
    assert capsys.readouterr().out == "out.png\n"
    stage("train_branch", {"steps": 3})
    assert run(["train", "branch", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"steps": 3}


def test_flags_set_recipe_keys_and_only_when_given(stage):
    calls = stage("generate", Path("x"))
    assert (
        run(
            ["generate", "p", "--no-plan", "--decode-steps", "3", "--branch-guidance", "2", "--set", "generate.steps=5"]
        )
        == 0
    )
    settings = calls[0]["args"][0].generate
    assert (settings.plan, settings.decode_steps, settings.branch_guidance, settings.steps) == (False, 3, 2.0, 5)
    assert run(["generate", "p", "--recipe", "bifrost1-7b"]) == 0
    assert calls[1]["args"][0].name == "bifrost1-7b" and calls[1]["args"][1] == "p"


def test_flags_have_the_types_the_choices_and_the_words_of_the_schema(capsys):
    fields = dict(all_keys(Recipe))
    for key in {*EXTRACT, *GENERATE, *EVALUATE}:
        kind, option = get_args(key_option(key).annotation)
        assert option.help == f"{fields[key].description}  ({key})"
        assert kind == fields[key].annotation | None
    assert run(["extract-latents", "--missing-caption", "maybe"]) == 2
    assert "'stop', 'skip', 'empty'" in capsys.readouterr().err


def test_generate_takes_one_prompt_or_a_file_and_has_a_default(stage, capsys):
    calls = stage("generate", Path("x"))
    assert run(["generate", "--prompts", "list.txt", "-o", "d", "-n", "2", "--seed", "7", "--grid"]) == 0
    assert calls[0]["args"][1] == Path("list.txt")
    assert (calls[0]["output"], calls[0]["n"], calls[0]["seed"], calls[0]["grid"]) == (Path("d"), 2, 7, True)
    assert run(["generate", "p", "--prompts", "list.txt"]) == 2
    assert run(["generate"]) == 0
    assert "a red circle above a blue square" in capsys.readouterr().err
    assert len(calls) == 2 and run(["generate", ""]) == 2 and len(calls) == 2


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [([], (["fid"], [])), (["--shapes"], (["shapes"], [])), (["--kid", "--fid", "--is"], (["fid", "kid", "is"], [])),
     (["--fd", "dinov2:x"], ([], ["dinov2:x"]))],
)  # fmt: skip
def test_eval_measures_the_distance_unless_told_otherwise(stage, flags, wanted):
    calls = stage("evaluate")
    assert run(["eval", *flags]) == 0
    assert (calls[0]["metrics"], calls[0]["fd"]) == wanted


def test_offline_is_set_before_the_stage_is_imported(stage, monkeypatch):
    stage("answer", Completion("an answer", False))
    assert run(["ask", "a.png", "what?", "--offline"]) == 0
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_the_answer_and_nothing_else(stage, capsys):
    stage("answer", Completion("a blue square", True))
    assert run(["ask", "a.png", "what?"]) == 0
    assert capsys.readouterr().out == "a blue square\n"
    assert run(["ask", "a.png", "what?", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cut"] is True


@pytest.mark.parametrize("name", STAGES)
def test_every_option_a_command_hands_over_exists_in_the_stage(stage, name):
    results = {"answer": Completion("x", False), "run_bench": [], "render_shapes": Path("x"), "pretrain": Path("x"),
               "import_checkpoint": {}, "export": Path(".")}  # fmt: skip
    calls = stage(name, results.get(name))
    assert run(STAGES[name][1]) == 0
    path = ROOT.joinpath("bifrost_cli", *STAGES[name][0].split(".")).with_suffix(".py")
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    arguments = next(node for node in functions if node.name == name).args
    known = {argument.arg for argument in (*arguments.args, *arguments.kwonlyargs)}
    if arguments.kwarg:  # the options of the metrics
        known |= {option.name.replace("-", "_") for _, _, options in metric_flags() for option in options}
    assert set(calls[0]) - {"args"} <= known
    assert len(calls[0]["args"]) <= len(arguments.args)


# ---- errors ----------------------------------------------------------------------------------------------------------

LEAVE = [
    (errors.UsageError("u"), 2, "BF-USE-001"),
    (errors.EnvironmentProblem("e", code="BF-ENV-021"), 3, "BF-ENV-021"),
    (errors.DataError("d"), 4, "BF-DATA-001"),
    (errors.StoreError("s", code="BF-STORE-005"), 5, "BF-STORE-005"),
    (errors.OutOfMemory("m"), 6, "BF-MEM-001"),
    (errors.Diverged("n"), 7, "BF-NAN-001"),
    (errors.Findings("f"), 8, "BF-FIND-001"),
    (errors.Stopped("s", fix="again"), 75, "BF-STOP-001"),
    (errors.Interrupted("i"), 130, "BF-STOP-002"),
    (KeyboardInterrupt(), 130, "BF-STOP-002"),
    (MemoryError(), 6, "BF-MEM-001"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 6, "BF-MEM-001"),
    (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), 6, "BF-MEM-001"),
    (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 3, "BF-ENV-010"),
    (OSError(errno.EROFS, "Read-only file system", "runs/x"), 3, "BF-ENV-011"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), 2, "BF-USE-001"),
    (ModuleNotFoundError("No module named 'tensorboard'", name="tensorboard"), 3, "BF-ENV-002"),
    (RuntimeError("a surprise\nin two lines"), 1, "BF-BUG-001"),
    (EOFError(), 1, "BF-BUG-001"),
]


@pytest.mark.parametrize(("error", "code", "name"), LEAVE, ids=lambda value: type(value).__name__)
def test_every_error_leaves_as_one_message_and_its_exit_code(stage, capsys, error, code, name):
    stage("extract_latents", error)
    assert run(["extract-latents"]) == code
    out, err = capsys.readouterr()
    assert out == "" and f"error[{name}]: " in err and "Traceback" not in err


def test_debug_shows_the_traceback_and_a_bug_asks_for_it(stage, capsys):
    stage("extract_latents", RuntimeError("a surprise"))
    assert run(["extract-latents"]) == 1
    assert "run it with --debug" in capsys.readouterr().err
    assert run(["extract-latents", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["paint"], ["generate", "--stesp", "3"], ["generate", "p", "-n", "0"], ["generate", "p", "--seed", "x"],
     ["extract-latents", "--device", "tpu"], ["ask"], ["generate", "a", "b"], ["eval", "--samples"]],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_is_2_in_our_form(capsys, arguments):
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error[BF-USE-001]: ") and "--help" in err


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1", "mps", "xpu", "xpu:2"])
def test_devices_reach_the_stage_as_they_are_given(stage, device):
    calls = stage("generate", Path("x"))
    assert run(["generate", "p", "--device", device]) == 0
    assert calls[0]["device"] == device


@pytest.mark.parametrize("device", ["cuda:", "cuda:x", "cpu:1", "CUDA", "", "cuda:1,2"])
def test_what_is_no_device_is_refused_with_the_list(capsys, device):
    assert run(["generate", "p", "--device", device]) == 2
    assert "auto, cpu, cuda, cuda:1, mps, xpu" in capsys.readouterr().err


def test_one_device_for_several_processes_is_refused_before_they_start(capsys):
    made(Path("runs", "latents"))
    assert run(["train", "branch", "--device", "cuda:0", "--gpus", "8"]) == 2
    assert "--device cuda:0 is one device, and there are 8 processes" in capsys.readouterr().err


def test_a_recipe_error_has_file_line_column_and_a_hint(capsys, tmp_path):
    (tmp_path / "my.yaml").write_text("branch:\n  train:\n    stesp: 3\n")
    assert run(["train", "branch", "--recipe", "my.yaml"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error[BF-RECIPE-002]: unknown key branch.train.stesp; did you mean branch.train.steps?\n")
    assert "  at:  my.yaml:3:5\n" in err


def test_groups_print_their_help(capsys):
    assert run([]) == 0
    assert "generate" in capsys.readouterr().out
    assert run(["train"]) == 2
    assert "controlnet" in capsys.readouterr().out


def test_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == "bifrost 0.2.0\n"


def test_python_m(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bifrost_cli", "recipes", "ls"], env=_env(), capture_output=True, text=True
    )
    assert done.returncode == 0 and "\nbifrost1-7b " in done.stdout


def test_ctrl_c_in_a_real_process(tmp_path):
    script = (
        "import signal, sys, time, types\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "module = types.ModuleType('bifrost_cli.extraction.extract')\n"
        "def wait(*args, **options):\n    print('ready', file=sys.stderr, flush=True)\n    time.sleep(30)\n"
        "module.extract_latents = wait\n"
        "sys.modules[module.__name__] = module\n"
        "from bifrost_cli.cli.app import main\n"
        "sys.argv = ['bifrost', 'extract-latents']\n"
        "main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], env=_env(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None and process.stderr.readline() == "ready\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130 and time.monotonic() - began < 10
    assert "BF-STOP-002" in process.stderr.read()


def _env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


# ---- artifacts and recipes -------------------------------------------------------------------------------------------


def test_artifacts_of_an_empty_place(capsys):
    assert run(["artifacts"]) == 0
    assert "bifrost extract-latents" in capsys.readouterr().out
    assert run(["artifacts", "show"]) == 5
    assert run(["artifacts", "lineage", "nothing"]) == 5
    assert run(["artifacts", "verify"]) == 0


def test_artifacts_ls_show_and_lineage(capsys, tmp_path):
    latents = made(tmp_path / "runs" / "l")
    with Draft.open(tmp_path / "runs" / "b", "branch", {"y": 1}, [latents]) as draft:
        branch = draft.commit()
    assert run(["artifacts", "ls"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [branch.id, latents.id]
    assert run(["artifacts", "show", latents.id]) == 0
    assert "x: 1" in capsys.readouterr().out
    assert run(["artifacts", "lineage", "--json"]) == 0
    assert [line["id"] for line in json.loads(capsys.readouterr().out)["lineage"]] == [branch.id, latents.id]


def test_verify_finds_damage_and_leaves_with_8(capsys, tmp_path):
    found = made(tmp_path / "runs" / "a")
    (tmp_path / "runs" / "a" / "stray.txt").write_text("x")
    assert run(["artifacts", "verify"]) == 0
    assert "stray.txt" in capsys.readouterr().err
    manifest = found.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"rows": 3', '"rows": 4'))
    for arguments in (["verify"], ["verify", str(found.path)]):
        assert run(["artifacts", *arguments, "--json"]) == 8
        out, err = capsys.readouterr()
        assert list(json.loads(out)["damaged"]) and "BF-FIND-001" in err
    assert run(["artifacts", "ls"]) == 0
    assert "(damaged)" in capsys.readouterr().out
    assert run(["artifacts", "show", str(found.path)]) == 5


def test_recipes_ls_show_and_check(capsys, tmp_path):
    assert run(["recipes"]) == 0
    assert "tiny" in capsys.readouterr().out
    assert run(["recipes", "show", "--set", "branch.train.lr=1e-4"]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    assert run(["recipes", "check", "shown.yaml"]) == 0
    assert run(["recipes", "show", "--keys"]) == 0
    assert "branch.head = " in capsys.readouterr().out
    assert run(["recipes", "check"]) == 0
    assert run(["recipes", "check", "none.yaml"]) == 2


def test_commands_are_short():
    for name, body in inspect.getmembers(stage_commands, inspect.isfunction):
        if body.__module__ == stage_commands.__name__:
            assert len(inspect.getsource(body).splitlines()) < 50, name


def test_lineage_of_an_empty_workspace_says_what_there_is(capsys, tmp_path):
    Draft.open(tmp_path / "runs" / "half", "branch", {}).close()
    assert run(["artifacts", "lineage"]) == 0
    out = capsys.readouterr().out
    assert "runs holds no artifact" in out and f"unfinished: {Path('runs', 'half')}" in out and "builtin:branch" in out
    assert run(["artifacts", "lineage", "builtin:branch"]) == 0


def test_what_a_command_writes_elsewhere_is_listed(stage, capsys, tmp_path):
    stage("extract_latents", made(tmp_path / "images"))
    assert run(["extract-latents", "-o", "images"]) == 0
    capsys.readouterr()
    assert run(["artifacts", "ls"]) == 0
    assert capsys.readouterr().out.split()[-1] == "images"


def test_rm_and_gc(capsys, tmp_path):
    latents = made(tmp_path / "runs" / "l")
    Draft.open(tmp_path / "runs" / "half", "branch", {}).close()
    with Draft.open(tmp_path / "runs" / "b", "branch", {"y": 1}, [latents]) as draft:
        branch = draft.commit()
    for dry in (["--dry-run"], []):
        capsys.readouterr()
        assert run(["artifacts", "gc", "--json", *dry]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [item["path"] for item in found["removed"]] == [str(Path("runs", "half"))]
        assert (tmp_path / "runs" / "half").exists() == bool(dry)
    assert run(["artifacts", "gc"]) == 0 and "nothing to remove" in capsys.readouterr().out
    assert run(["artifacts", "rm", latents.id]) == 5
    assert branch.id in capsys.readouterr().err
    assert run(["artifacts", "rm", latents.id, branch.id, "--dry-run"]) == 0
    assert "would remove 2 items" in capsys.readouterr().out and branch.path.is_dir() and latents.path.is_dir()
    assert run(["artifacts", "rm", branch.id]) == 0
    assert "removed 1 item," in capsys.readouterr().out
    assert run(["artifacts", "rm", latents.id]) == 0 and not list(Path("runs").glob("*"))


def test_recipes_cp(capsys, tmp_path):
    assert run(["recipes", "cp", "tiny", "my/tiny.yaml"]) == 0
    assert "--recipe my" in capsys.readouterr().err
    assert (tmp_path / "my" / "tiny.yaml").read_bytes() == (ROOT / "recipes" / "tiny.yaml").read_bytes()
    assert run(["recipes", "check", "my/tiny.yaml"]) == 0
    builtin = str(ROOT / "bifrost_cli" / "builtin" / "branch")
    assert run(["recipes", "cp", builtin, "branch.yaml"]) == 0 and run(["recipes", "check", "branch.yaml"]) == 0
    (tmp_path / "bad.yaml").write_text("no: 1")
    for ref, file in (("tiny", "my/tiny.yaml"), ("tiny", "my"), ("bad.yaml", "new.yaml"), ("nothing", "new.yaml")):
        assert run(["recipes", "cp", ref, file]) == 2
    assert not Path("new.yaml").exists()
