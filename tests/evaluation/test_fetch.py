"""`bifrost fetch` against a server that answers as the real ones do, breaks off, or sends something else."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bifrost_cli.cli.app import run
from bifrost_cli.errors import ArtifactError, DataError, EnvironmentProblem, UsageError
from bifrost_cli.evaluation import benchmark_files
from bifrost_cli.evaluation.benchmark_files import BENCHMARKS, cached, fetch
from bifrost_cli.evaluation.metrics.dpg import COLUMNS, Dpg
from bifrost_cli.evaluation.metrics.geneval import PROMPTS
from bifrost_cli.runtime.ui import Ui

WEIGHTS = bytes(range(256)) * 1000
GENEVAL = "".join(
    json.dumps({"tag": tag, "prompt": f"a cat {number}", "include": [{"class": "cat", "count": 1}]}) + "\n"
    for tag, count in PROMPTS.items()
    for number in range(count)
).encode()
DPG = (
    ",".join(COLUMNS) + "\n" + "".join(f"item{i},a cat {i},1,0,entity - whole (cat),Is it a cat?\n" for i in range(3))
).encode()


class Files(ThreadingHTTPServer):
    """`files` by path; `cut`: bytes after which an answer breaks off; `ranges`: whether parts are served."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.cut, self.ranges, self.asked = {}, None, True, []


class _Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, body: bool) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append((self.command, wanted))
        data = self.server.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body:
            self.wfile.write(data[start:][: self.server.cut])


class Heard(Ui):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@contextmanager
def serving():
    server = Files()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The three benchmarks on a server of this machine, with caches of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(benchmark_files, "DPG_PROMPTS", 3)
    with serving() as server:
        server.files = {"/geneval": GENEVAL, "/dpg": DPG, "/inception": WEIGHTS}
        for name, file in BENCHMARKS.items():
            own = replace(file, url=f"http://127.0.0.1:{server.server_address[1]}/{name}")
            if file.sha256:
                own = replace(own, sha256=hashlib.sha256(WEIGHTS).hexdigest()[:8])
            monkeypatch.setitem(BENCHMARKS, name, own)
        yield server


def test_each_is_put_where_eval_looks(server, tmp_path, capsys):
    assert run(["fetch", "geneval", "dpg", "inception", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [cached(name).read_bytes() for name in BENCHMARKS] == [GENEVAL, DPG, WEIGHTS]
    assert cached("inception") == tmp_path / "torch" / "hub" / "checkpoints" / BENCHMARKS["inception"].name
    assert found["geneval"]["sha256"] == hashlib.sha256(GENEVAL).hexdigest() and not found["geneval"]["there"]
    prompts = (tmp_path / "cache" / "bifrost" / "benchmarks" / "dpg_prompts.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in prompts] == [{"prompt": f"a cat {i}"} for i in range(3)]
    asked, ui = len(server.asked), Heard()
    assert fetch("geneval", ui=ui)["there"] and len(server.asked) == asked and "here already" in ui.lines[0]
    Dpg.check(type("Request", (), {"options": {}}))  # needs no --questions any more


def test_a_dry_run_asks_for_the_size_and_writes_nothing(server, tmp_path, capsys):
    assert run(["fetch", "inception", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert f"{len(WEIGHTS):,} bytes" in told and BENCHMARKS["inception"].url in told
    assert server.asked == [("HEAD", None)] and not (tmp_path / "torch").exists()


@pytest.mark.parametrize("ranges", [True, False])
def test_what_has_arrived_is_kept_and_only_the_rest_is_asked_for(server, ranges):
    server.cut, server.ranges, ui = 100_000, ranges, Heard()
    with pytest.raises(EnvironmentProblem, match="broke off") as caught:
        fetch("inception", ui=ui)
    assert caught.value.code == "BF-ENV-024" and cached("inception") is None
    assert ui.lines[0].startswith(f"{BENCHMARKS['inception'].name}: 0.3 MB, from http://")
    server.cut = None
    fetch("inception", ui=ui)
    assert cached("inception").read_bytes() == WEIGHTS and server.asked[1] == ("GET", "bytes=100000-")
    assert ("of which 0.1 MB are here" in ui.lines[1]) == ranges
    assert [path.name for path in cached("inception").parent.iterdir()] == [BENCHMARKS["inception"].name]


def test_what_is_not_the_published_file_is_removed(server):
    server.files = {"/geneval": GENEVAL[:-1000].rpartition(b"\n")[0], "/dpg": b"a,b\n1,2\n", "/inception": WEIGHTS[:-1]}
    for name, kind, message in (
        ("geneval", DataError, "not all of GenEval's prompts"),
        ("dpg", DataError, "no column"),
        ("inception", ArtifactError, "sha256"),
    ):
        with pytest.raises(kind, match=message):
            fetch(name)
        assert not any(BENCHMARKS[name].path.parent.iterdir())


def test_a_server_without_it_an_offline_run_and_a_wrong_name(server, monkeypatch):
    server.files.clear()
    with pytest.raises(EnvironmentProblem, match="answers 404") as caught:
        fetch("geneval")
    assert str(BENCHMARKS["geneval"].path) in caught.value.fix
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentProblem, match="offline") as caught:
        fetch("geneval")
    assert caught.value.code == "BF-ENV-023"
    with pytest.raises(UsageError, match="no benchmark"):
        fetch("coco")
    with pytest.raises(UsageError, match="fetch dpg"):
        Dpg.check(type("Request", (), {"options": {}}))
