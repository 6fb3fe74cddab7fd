"""Bombs: small files, or holes on the disk, that would fill memory or take hours: refused within seconds.

All of them are given to commands in one process that may have a gigabyte more than its libraries take.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from test_webdataset import archive, image

ROOT = Path(__file__).parents[2]
HUGE = 20_000_000_000  # bytes of a file that is one hole
SECONDS = 5  # of the processor
RUN = """
import io, json, resource, sys, time
from contextlib import redirect_stderr, redirect_stdout
from bifrost_cli.cli.app import run
import bifrost_cli.extraction.extract, bifrost_cli.generation.generate, bifrost_cli.interop.import_checkpoint
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 1_000_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for line in sys.stdin:
    began, said = time.process_time(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = run(json.loads(line))
    print(json.dumps([code, said.getvalue(), time.process_time() - began]), flush=True)
"""


def hole(path: Path, start: bytes = b"") -> Path:
    path.write_bytes(start)
    os.truncate(path, HUGE)
    return path


def sample(folder: Path, name: str, start: bytes = b"") -> Path:
    """A folder of one image and its caption, of which `name` is a hole."""
    folder.mkdir()
    (folder / "a.png").write_bytes(image())
    (folder / "a.txt").write_bytes(b"x")
    hole(folder / name, start)
    return folder


def written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def tar_of_long_name(path: Path) -> Path:
    """A GNU long name that says it has 8 GB, in a file of as many."""
    data = bytearray(archive(path, ("n" * 200, b"x"), format=1).read_bytes())
    data[124:136] = b"77777777777\0"
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    return hole(path, bytes(data))


def large_member(path: Path) -> Path:
    """An image of 8 GB in an archive, all of it there, and the closing blocks."""
    data = bytearray(archive(path, ("a.png", b"")).read_bytes()[:512])
    data[124:136] = b"77777777777\0"
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    path.write_bytes(data)
    os.truncate(path, 512 + 8**11 + 1024)
    return path


EXTRACT = ["extract-latents", "--dry-run", "-o", "out"]
# What is made in a folder; the command before it; exit code, code, words.
BOMBS = {
    "a recipe with a hole": (lambda f: hole(f / "a.yaml", b"name: x"), ["recipes", "show"], 2, "RECIPE-001", "1000000"),
    "a recipe of brackets": (lambda f: written(f / "b.yaml", b"a: " + b"[" * 500_000), ["recipes", "show"], 2,
                             "RECIPE-001", "b.yaml:1:"),
    "a recipe of braces": (lambda f: written(f / "c.yaml", b"{a: " * 200_000), ["recipes", "show"], 2, "RECIPE-001",
                           "c.yaml:1:"),
    "prompts with a hole": (lambda f: hole(f / "p.txt", b"a\n"), ["generate", "-o", "out", "--prompts"], 2, "USE-001",
                            "p.txt has more than"),
    "prompts without an end": (lambda f: Path("/dev/zero"), ["generate", "-o", "out", "--prompts"], 2, "USE-001",
                               "/dev/zero has more than"),
    "an image with a hole": (lambda f: sample(f / "d", "a.png", image()), EXTRACT, 4, "DATA-003", "a.png"),
    "a caption with a hole": (lambda f: sample(f / "e", "a.txt"), EXTRACT, 4, "DATA-002", "a.txt"),
    "a table with a hole": (lambda f: hole(f / "t.jsonl"), EXTRACT, 4, "DATA-001", "t.jsonl"),
    "a line of 100 MB": (lambda f: written(f / "u.jsonl", b'{"file_name":"' + b"x" * 100_000_000 + b'"}'), EXTRACT, 4,
                         "DATA-005", "u.jsonl:1"),
    "a field of 100 MB": (lambda f: written(f / "v.csv", b"image,text\n" + b"x" * 100_000_000 + b",x\n"), EXTRACT, 4,
                          "DATA-005", "v.csv:2"),
    "a line of brackets": (lambda f: written(f / "w.jsonl", b"[" * 1_000_000), EXTRACT, 4, "DATA-005", "w.jsonl:1"),
    "a tar.gz of zeros": (lambda f: written(f / "a.tar", gzip.compress(bytes(100_000_000))), EXTRACT, 4, "DATA-005",
                          "a.tar is compressed"),
    "a member of 8 GB": (lambda f: large_member(f / "b.tar"), EXTRACT, 4, "DATA-003", "b.tar: a.png"),
    "a name of 8 GB": (lambda f: tar_of_long_name(f / "c.tar"), EXTRACT, 4, "DATA-005", "c.tar is damaged"),
    "a header of 2^63": (lambda f: written(f / "g/model.safetensors", header(b"{}", 2**63)).parent, ["import"], 5,
                         "ART-005", "g/model.safetensors"),
    "a header of 100 MB": (lambda f: written(f / "h/model.safetensors", header(b" " * 100_000_000)).parent, ["import"],
                           5, "ART-005", "h/model.safetensors"),
    "a header of tables": (lambda f: written(f / "i/model.safetensors", header(b'{"a":[' + b"{}," * 3_300_000 + b"1]}"))
                           .parent, ["import"], 5, "ART-005", "i/model.safetensors"),
    "a header of brackets": (lambda f: written(f / "j/model.safetensors", header(b"[" * 9_000_000)).parent, ["import"],
                             5, "ART-005", "j/model.safetensors"),
    "a manifest with a hole": (lambda f: sample(f / "k", "manifest.json"), ["artifacts", "show"], 5, "ART-005",
                               "k/manifest.json"),
    "a manifest of brackets": (lambda f: written(f / "l/manifest.json", b"[" * 1_000_000).parent, ["artifacts", "show"],
                               5, "ART-005", "l/manifest.json"),
}  # fmt: skip


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, list]:
    folder = tmp_path_factory.mktemp("bombs")
    lines = [json.dumps([*command, str(make(folder))]) for make, command, *_ in BOMBS.values()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", RUN], input="\n".join(lines), env=environment, cwd=folder, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (folder / "out").exists()
    shutil.rmtree(folder)
    return dict(zip(BOMBS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_soon_and_in_a_gigabyte(answers, name):
    _, _, exit_code, code, words = BOMBS[name]
    found, said, seconds = answers[name]
    assert found == exit_code and f"error[BF-{code}]" in said and words in said and "Traceback" not in said, said
    assert seconds < SECONDS
