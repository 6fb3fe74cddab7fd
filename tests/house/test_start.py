"""How long commands take before they do anything: what each may import, and processor time beside `import torch`."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from bifrost_cli import BifrostPipeline

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "diffusers", "accelerate", "open_clip", "scipy", "datasets", "peft", "bitsandbytes"}
UNUSED = {"peft", "bitsandbytes", "scipy", "open_clip", "datasets", "zarr", "torch._inductor.compile_fx"}
MODULES = """
import json, sys
from bifrost_cli.cli.app import run
from bifrost_cli.runtime.light_imports import in_own_process
in_own_process()
code = run(json.loads(sys.argv[1]))
print(json.dumps([code, sorted(sys.modules)]))
"""
# A command, its exit code, and what it must not import.
COMMANDS = {
    "eval --explain": (["eval", "--explain"], 0, HEAVY),
    "a page of a training": (["report", "builtin:branch", "-o", "page.html"], 0, HEAVY),
    "a refused output": (["generate", "a", "-n", "2", "-o", "two.png"], 2, HEAVY),
    "a refused source": (["extract-latents", "nowhere"], 4, HEAVY),
    "a refused recipe": (["train", "branch", "--set", "branch.train.steps=-1"], 2, HEAVY),
    "doctor": (["doctor"], 0, HEAVY - {"torch", "scipy"}),
}


def cpu_seconds(arguments: list[str], folder: Path) -> tuple[float, str]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_imports_no_more_than_it_uses(name, tmp_path):
    words, wanted, forbidden = COMMANDS[name]
    _, out = cpu_seconds(["-c", MODULES, json.dumps(words)], tmp_path)
    code, modules = json.loads(out.splitlines()[-1])
    assert code == wanted
    assert not forbidden & set(modules)


def test_a_first_picture_takes_less_than_five_times_what_importing_torch_does(tmp_path):
    torch, _ = cpu_seconds(["-c", "import torch"], tmp_path)
    seconds, out = cpu_seconds(["-c", MODULES, json.dumps(["generate", "a red circle", "-o", "out.png"])], tmp_path)
    code, modules = json.loads(out.splitlines()[-1])
    assert code == 0 and not UNUSED & set(modules)
    assert seconds < 5 * torch, "3.6 on a quiet machine; what it imports is held above"
    here = BifrostPipeline.from_pretrained("builtin")("a red circle", seed=0).images[0]  # with all that is installed
    assert here.tobytes() == Image.open(tmp_path / "out.png").tobytes()


def test_what_is_left_out_can_be_imported_afterwards():
    script = """
import sys
from bifrost_cli.runtime.light_imports import without
with without(["peft", "json.tool", "sys"]):
    try:
        import json.tool
    except ImportError:
        pass
    else:
        raise SystemExit("it was found")
    import sys as again
import json.tool
assert again is sys and "peft" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
