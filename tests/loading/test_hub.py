"""Models from a hub: each trouble has its own message, within seconds, and --offline opens no socket."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stub_hub import COMMIT, hub

ROOT = Path(__file__).parents[2]
# Cases come as JSON lines (name, revision, token); each is answered with what the user would read.
ASK = """
import json, os, sys, time
from bifrost_cli.errors import BifrostError
from bifrost_cli.loading.resolve import resolve_model
for line in sys.stdin:
    ref, revision, token = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if token: os.environ["HF_TOKEN"] = token
    began = time.perf_counter()
    try: told = {"path": resolve_model(ref, revision=revision)}
    except BifrostError as error:
        told = {"code": error.code, "exit": error.exit_code, "message": error.message, "at": error.at, "fix": error.fix}
    print(json.dumps({**told, "seconds": time.perf_counter() - began}), flush=True)
"""


class Client:
    """A process that asks for models, with a cache of its own."""

    def __init__(self, cache: Path, address: str, **environment: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = {**kept, "HF_HOME": str(cache), "HF_ENDPOINT": address, "PYTHONPATH": str(ROOT), **environment}
        self._process = subprocess.Popen([sys.executable, "-c", ASK], env=environment, text=True, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip

    def ask(self, ref: str, revision: str | None = None, token: str | None = None) -> dict:
        self._process.stdin.write(json.dumps([ref, revision, token]) + "\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        assert told["seconds"] < 30
        return told

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, dict]:
    """What each trouble is told as."""
    cache = tmp_path_factory.mktemp("hub")
    with hub() as server:
        client = Client(cache, server.address)
        found = {
            "whole": client.ask("stub/fine"),
            "its commit": client.ask("stub/fine", COMMIT),
            "no revision": client.ask("stub/fine", "wrong"),
            "no model": client.ask("stub/none"),
            "no token": client.ask("stub/gated"),
            "not accepted": client.ask("stub/gated", token="hf_secret"),
            "no right": client.ask("stub/closed", token="hf_secret"),
            "busy": client.ask("stub/busy"),
            "half": client.ask("stub/half"),
            "no name": client.ask("a/../b"),
        }
        address = server.address
    found |= {"down, cached": client.ask("stub/fine"), "down": client.ask("stub/other"),
              "down, half": client.ask("stub/half")}  # fmt: skip
    client.close()
    offline = Client(cache, address, HF_HUB_OFFLINE="1")
    found |= {"offline, cached": offline.ask("stub/fine"), "offline": offline.ask("stub/other"),
              "offline, half": offline.ask("stub/half")}  # fmt: skip
    offline.close()
    return found


TROUBLES = {
    "no revision": ("020", "stub/fine has no revision wrong"),
    "no model": ("020", "there is no model stub/none that you may see"),
    "no token": ("021", "stub/gated is gated, and there is no token"),
    "not accepted": ("022", "stub/gated is gated, and your account has not accepted its licence"),
    "no right": ("022", "your token may not read stub/closed"),
    "busy": ("024", "the hub cannot serve stub/busy now: it answers 503"),
    "half": ("024", "the download of stub/half broke off"),
    "no name": ("020", "a/../b is neither a folder nor a hub id"),
    "down": ("023", "stub/other is not in the cache, and the hub cannot be reached"),
    "offline": ("023", "stub/other is not whole in the cache, and this run is offline"),
    "offline, half": ("023", "stub/half is not whole in the cache, and this run is offline"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_each_trouble_has_its_own_message_and_a_fix(told, trouble):
    code, message = TROUBLES[trouble]
    found = told[trouble]
    assert (found.get("code"), found["message"], found["exit"]) == (f"BF-ENV-{code}", message, 3)
    assert found["fix"] and "hf_secret" not in json.dumps(found)


def test_no_two_troubles_read_the_same():
    assert len({message for _, message in TROUBLES.values()}) == len(TROUBLES)


@pytest.mark.parametrize("case", ["whole", "its commit", "down, cached", "offline, cached"])
def test_a_whole_model_is_found_with_and_without_the_hub(told, case):
    assert sorted(path.name for path in Path(told[case]["path"]).iterdir()) == ["config.json", "model.safetensors"]


def test_half_a_download_is_never_taken_for_a_model(told):
    assert not any("path" in told[case] for case in ("half", "down, half", "offline, half"))


# ---- --offline -------------------------------------------------------------------------------------------------------

OFFLINE = """
import socket, sys
def refuse(*args, **options): raise AssertionError("a socket was opened")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse
from bifrost_cli.cli.app import run
COMMANDS = [["plan", "bifrost1-7b"], ["doctor"], ["generate", "a red circle", "-o", "out.png"],
            ["extract-latents", "--set", "shapes.rows=16"]]
codes = [run([*command, "--offline", "-q"]) for command in COMMANDS]
codes.append(run(["doctor", "--recipe", "bifrost1-7b", "--offline", "-q"]))
codes.append(run(["ask", "out.png", "what?", "--recipe", "bifrost1-7b", "--offline", "-q"]))
assert codes == [0, 0, 0, 0, 8, 3], codes
"""


def test_offline_opens_no_socket(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hub")}
    command = [sys.executable, "-c", OFFLINE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").exists() and "a socket was opened" not in done.stderr
    assert "hf download Qwen/Qwen2.5-VL-7B-Instruct" in done.stdout and "BF-ENV-023" in done.stderr
