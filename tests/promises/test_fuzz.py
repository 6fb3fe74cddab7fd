"""Any bytes give a result or one of our errors, soon, and in little memory: every reader of what others wrote.

A small number of tries in the ordinary suite; `pytest -m crash` has thousands. Bombs run in a process whose memory is
limited.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_webdataset import archive, image

from bifrost_cli.artifacts import Artifact, Draft
from bifrost_cli.config.load import load_recipe, recipe_path
from bifrost_cli.config.schema import Latents
from bifrost_cli.data.latents.zarr_layout import read_index, write_index
from bifrost_cli.data.safetensors_io import load_tensors, save_tensors
from bifrost_cli.data.sources.scan import scan
from bifrost_cli.errors import BifrostError
from bifrost_cli.evaluation.feature_statistics import load_adm
from bifrost_cli.generation.requests import read_prompts
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.training.checkpoint import verify

ROOT = Path(__file__).parents[2]
RULES = Latents(bad_image="skip", max_bad=1.0, missing_caption="empty")
SECONDS = 5  # of the processor, for one file

# ---- what is read: the file's name, how, and a whole one to begin with -----------------------------------------------


def artifact(folder: Path) -> bytes:
    with Draft.open(folder / "whole", "report", {"a": [1, "b"]}) as draft:
        (draft.path / "x.txt").write_bytes(b"x")
        return (draft.commit().path / "manifest.json").read_bytes()


def tensors(folder: Path) -> bytes:
    import torch

    save_tensors(folder / "whole.safetensors", {"a": torch.ones(3), "b": torch.zeros(2, 2)}, {"x": 1})
    return (folder / "whole.safetensors").read_bytes()


def index(folder: Path) -> bytes:
    (folder / "whole" / "index").mkdir(parents=True)
    write_index(folder / "whole", 0, [{"key": "a", "status": "ok"}], {"a": {"sha256": "0" * 64, "size": 1}}, {})
    return (folder / "whole" / "index" / "shard-00000.jsonl").read_bytes()


def npz(folder: Path) -> bytes:
    import numpy as np

    stream = io.BytesIO()
    np.savez(stream, mu=np.zeros(2), sigma=np.eye(2))
    return stream.getvalue()


def tar(folder: Path) -> bytes:
    return archive(folder / "whole.tar", ("a.png", image()), ("a.txt", b"x"), ("n" * 120, b"y"),
                   format=1).read_bytes()  # fmt: skip


def checkpoint(folder: Path) -> bytes:
    (folder / "in" / "step-0000001").mkdir(parents=True)
    files = dict.fromkeys(("model.safetensors", "optimizer.safetensors", "state.json"), hashlib.sha256().hexdigest())
    for name in files:
        (folder / "in" / "step-0000001" / name).write_bytes(b"")
    return json.dumps({"format": 1, "step": 1, "files": files}).encode()


Reader = tuple[str, Callable[[Path], Any], Callable[[Path], bytes]]
READERS: dict[str, Reader] = {
    "recipe": ("r.yaml", load_recipe, lambda folder: recipe_path("tiny").read_bytes()),
    "manifest": ("a/manifest.json", lambda path: Artifact.open(path.parent).verify(), artifact),
    "checkpoint": ("step-0000001/manifest.json", lambda path: verify(path.parent), checkpoint),
    "safetensors": ("m.safetensors", load_tensors, tensors),
    "index": ("index/shard-00000.jsonl", lambda path: read_index(path.parents[1], 0), index),
    "npz": ("s.npz", lambda path: load_adm(path, "pool"), npz),
    "prompts": ("p.txt", lambda path: read_prompts(path, Ui()), lambda folder: "a\n\n# größe\r\nb".encode()),
    "caption": ("a.txt", lambda path: scan(path.parent, RULES), lambda folder: "\ufeffgröße\r\n".encode("utf-16")),
    "picture": ("a.png", lambda path: scan(path.parent, RULES), lambda folder: image(3)),
    "jsonl": ("t.jsonl", lambda path: scan(path, RULES), lambda folder: b'{"file_name": "a.png", "text": "x"}\n\n'),
    "csv": ("t.csv", lambda path: scan(path, RULES), lambda folder: b'image,text\na.png,"x, y"\n"b\n.png",z\n'),
    "tar": ("t.tar", lambda path: scan(path, RULES), tar),
}

VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                      lambda one: st.lists(one, max_size=4) | st.dictionaries(st.text(max_size=8), one, max_size=4),
                      max_leaves=12)  # fmt: skip
EDITS = st.lists(st.tuples(st.integers(0, 1 << 20), st.sampled_from(("flip", "cut", "drop", "put")),
                           st.binary(min_size=1, max_size=9)), min_size=1, max_size=4)  # fmt: skip


def edited(whole: bytes, edits: list[tuple[int, str, bytes]]) -> bytes:
    """The whole file with bytes changed, left out or put in, or cut short."""
    for where, how, data in edits:
        at = where % (len(whole) + 1)
        left, right = whole[:at], whole[at:]
        whole = {"flip": left + data + right[len(data) :], "cut": left, "drop": left + right[len(data) :],
                 "put": left + data + right}[how]  # fmt: skip
    return whole


def replaced(whole: bytes, data: st.DataObject) -> bytes:
    """A JSON file in which one value is another, and the digests that cover it agree."""
    value = json.loads(whole)
    inner = value
    while isinstance(inner, dict) and inner:
        key = data.draw(st.sampled_from(sorted(inner)))
        if not isinstance(inner[key], dict) or data.draw(st.booleans()):
            inner[key] = data.draw(VALUES)
            break
        inner = inner[key]
    if "digest" in value:
        body = {key: found for key, found in value.items() if key != "digest"}
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        value["digest"] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "surrogatepass")


def headed(data: st.DataObject) -> bytes:
    """A safetensors file whose header is of the right length, and of entries that are nearly right."""
    numbers = st.integers(-2, 20) | st.sampled_from((2**31, 2**63, 2**64))
    entry = st.fixed_dictionaries({"dtype": st.sampled_from(("F32", "BF16", "I8", "F33", "BOOL")),
                                   "shape": st.lists(numbers, max_size=3),
                                   "data_offsets": st.lists(numbers, min_size=2, max_size=2)})  # fmt: skip
    names = st.text(max_size=4) | st.just("__metadata__")
    text = json.dumps(data.draw(st.dictionaries(names, entry | VALUES, max_size=3))).encode()
    return struct.pack("<Q", len(text)) + text + data.draw(st.binary(max_size=40))


def files_of(name: str, whole: bytes, data: st.DataObject) -> bytes:
    ways = [lambda: data.draw(st.binary(max_size=300)), lambda: edited(whole, data.draw(EDITS)),
            lambda: edited(whole, data.draw(EDITS)), lambda: json.dumps(data.draw(VALUES)).encode()]  # fmt: skip
    ways += [lambda: replaced(whole, data)] if name in ("manifest", "checkpoint") else []
    ways += [lambda: headed(data)] * 2 if name == "safetensors" else []
    return data.draw(st.sampled_from(ways))()


def fuzz(name: str, folder: Path, tries: int) -> None:
    file, read, make = READERS[name]
    whole, path = make(folder), folder / "in" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "a.png").write_bytes(image())

    @settings(max_examples=tries, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def one(data: st.DataObject) -> None:
        path.write_bytes(files_of(name, whole, data))
        began = time.process_time()
        try:
            read(path)
        except BifrostError as error:
            assert error.code != "BF-BUG-001" and error.message
        assert time.process_time() - began < SECONDS

    path.write_bytes(whole)
    read(path)  # what is whole is read
    one()


@pytest.mark.parametrize("name", READERS)
def test_any_bytes_give_a_result_or_our_error(name, tmp_path):
    fuzz(name, tmp_path, 60)


@pytest.mark.crash
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", READERS)
def test_many_bytes_give_a_result_or_our_error(name, tmp_path):
    fuzz(name, tmp_path, 5000)
