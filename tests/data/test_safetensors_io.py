"""safetensors, written and read by us: round trips, the same bytes every time, and every malformed file refused."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timing import within

from bifrost_cli.data.safetensors_io import load_tensors, save_tensors, weights_hash
from bifrost_cli.errors import ArtifactError

TENSORS = {
    "b": torch.arange(12).reshape(3, 4).bfloat16(),
    "a": torch.arange(5),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 3),
    "turned": torch.arange(20.0).reshape(4, 5).t(),
    "flags": torch.tensor([True, False, True]),
    "numbers": np.linspace(0, 1, 6).reshape(2, 3),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def test_round_trip(path):
    save_tensors(path, TENSORS, {"kind": "branch", "né": [1.5]})
    found, meta = load_tensors(path)
    assert meta == {"kind": "branch", "né": [1.5]} and set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        expected = torch.as_tensor(tensor)
        assert found[name].dtype == expected.dtype and torch.equal(found[name], expected), name


def test_the_library_reads_our_files_and_we_read_its(path):
    save_tensors(path, TENSORS, {})
    theirs = safetensors.torch.load_file(path)
    ours, _ = load_tensors(path)
    assert all(torch.equal(theirs[name], ours[name]) for name in TENSORS)
    safetensors.torch.save_file({"x": torch.ones(3)}, path, metadata={"format": "pt"})
    found, meta = load_tensors(path)
    assert torch.equal(found["x"], torch.ones(3)) and meta == {}


def test_the_bytes_depend_on_nothing_else(path):
    save_tensors(path, TENSORS, {"a": 1, "b": 2})
    first = path.read_bytes()
    save_tensors(path, dict(reversed(TENSORS.items())), {"b": 2, "a": 1})
    assert path.read_bytes() == first
    assert os.listdir(path.parent) == [path.name]


def test_a_module_over_the_file_it_came_from(path):
    save_tensors(path, {"x": torch.ones(1000)}, {})
    found, _ = load_tensors(path)
    save_tensors(path, {"x": found["x"] * 2}, {})
    assert torch.equal(found["x"], torch.ones(1000))


def test_the_hash_sees_name_type_shape_and_bytes_and_not_the_order():
    base = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    same = {"b": torch.ones(2), "a": np.zeros((2, 3), np.float32)}
    assert weights_hash(base) == weights_hash(same)
    others = [
        {"a2": base["a"], "b": base["b"]},
        {"a": base["a"].double(), "b": base["b"]},
        {"a": base["a"].reshape(3, 2), "b": base["b"]},
        {"a": base["a"] + 1e-30, "b": base["b"]},
        {"a": base["a"]},
        {"a": -base["a"], "b": base["b"]},
    ]
    assert len({weights_hash(state) for state in (base, *others)}) == 1 + len(others)


def test_the_hash_of_a_module_in_bfloat16():
    module = torch.nn.Linear(3, 2).bfloat16()
    assert weights_hash(module.state_dict()) == weights_hash({k: v.clone() for k, v in module.state_dict().items()})


# ---- malformed files -------------------------------------------------------------------------------------------------


def entry(start=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def file_of(header: object, data: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


MALFORMED = {
    "empty": b"",
    "short": b"\1\2",
    "header of 2^63": struct.pack("<Q", 2**63) + b"{}",
    "header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "not JSON": file_of(b"{]"),
    "not UTF-8": file_of(b'{"\xff": 1}'),
    "deep JSON": file_of(b"[" * 100_000),
    "a list": file_of([1]),
    "a number": file_of(3),
    "duplicate keys": file_of(b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}"),
    "overlap": file_of({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12),
    "hole": file_of({"a": entry(0, 8), "b": entry(12, 20)}, b"\0" * 20),
    "trailing bytes": file_of({"a": entry()}, b"\0" * 9),
    "missing bytes": file_of({"a": entry()}, b"\0" * 7),
    "negative shape": file_of({"a": entry(shape=(-2,))}),
    "two negatives": file_of({"a": entry(shape=(-2, -1))}),
    "fractional shape": file_of({"a": entry(shape=(2.0,))}),
    "true as size": file_of({"a": entry(0, 4, (True,))}, b"\0" * 4),
    "shape too large": file_of({"a": entry(shape=(99999999999999,))}),
    "unknown type": file_of({"a": entry(dtype="F33")}),
    "type is a list": file_of({"a": {**entry(), "dtype": []}}),
    "no offsets": file_of({"a": {"dtype": "F32", "shape": [2]}}),
    "three offsets": file_of({"a": {**entry(), "data_offsets": [0, 8, 9]}}),
    "entry is a number": file_of({"a": 1}),
    "metadata is a list": file_of({"__metadata__": [], "a": entry()}),
    "our metadata is not JSON": file_of({"__metadata__": {"bifrost": "{"}, "a": entry()}),
    "NaN": file_of({"a": entry()}, struct.pack("<2f", 1.0, float("nan"))),
    "infinity": file_of({"a": entry()}, struct.pack("<2f", float("inf"), 1.0)),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused_at_once(path, case):
    path.write_bytes(MALFORMED[case])
    caught = within(1, lambda: pytest.raises(ArtifactError, load_tensors, path))
    assert caught.value.exit_code == 5 and str(path) in caught.value.message


def test_a_bad_number_names_its_tensor(path):
    save_tensors(path, {"good": torch.ones(2), "bad.weight": torch.tensor([1.0, float("nan")])}, {})
    with pytest.raises(ArtifactError, match="bad.weight"):
        load_tensors(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "whole.safetensors"
    save_tensors(path, {"a": torch.ones(3), "b": torch.zeros(2, 2)}, {"x": 1})
    return path


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200), position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_bytes_are_read_or_refused(whole, data, position, bit):
    flipped = bytearray(whole.read_bytes())
    flipped[position % len(flipped)] ^= 1 << bit
    fuzzed = whole.with_name("fuzzed.safetensors")
    for raw in (data, struct.pack("<Q", len(data)) + data, bytes(flipped)):
        fuzzed.write_bytes(raw)
        try:
            load_tensors(fuzzed)
        except ArtifactError:
            pass


class Canary:
    def __reduce__(self):
        return os.mkdir, ("canary",)


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.ckpt", "model.safetensors"])
def test_a_pickle_is_refused_and_never_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for data in (pickle.dumps(Canary(), 2), pickle.dumps(Canary()), zipped(pickle.dumps(Canary()))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ArtifactError, match="pickle") as caught:
            load_tensors(tmp_path / name)
        assert caught.value.code == "BF-ART-008" and caught.value.fix
    assert not (tmp_path / "canary").exists()


def zipped(data: bytes) -> bytes:
    import io

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    return stream.getvalue()


def test_a_missing_file(path):
    with pytest.raises(ArtifactError, match="does not exist"):
        load_tensors(path)
