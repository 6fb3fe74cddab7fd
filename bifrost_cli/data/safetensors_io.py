"""Weights as safetensors: written so that they last, read with suspicion. Never a pickle.

In: named tensors and one JSON value. Out: a file whose bytes depend on nothing else. The format has no checksum: the
artifact's manifest keeps one; what the format can say is checked here before a tensor is made. Does not know which
model the tensors belong to.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bifrost_cli.artifacts.files import canonical_json, new_file
from bifrost_cli.errors import ArtifactError

HEADER_LIMIT = 10_000_000  # bytes; some 80,000 tensors. The format allows ten times as much: 86 s and 3 GB to read
META_KEY = "bifrost"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CHECKED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PICKLES = (".pt", ".bin", ".ckpt", ".pth", ".pkl")

Tensors = Mapping[str, "torch.Tensor | np.ndarray"]


def save_tensors(path: Path | str, tensors: Tensors, meta: Mapping[str, Any] | None = None) -> None:
    """Write a safetensors file atomically; `meta` is its one metadata key, as canonical JSON.

    One key only: with several the format's own writer gives other bytes in every process. DiskFull when there is no
    room.
    """
    path = Path(path)
    ordered = sorted(_as_torch(tensors).items(), key=lambda item: (-item[1].element_size(), item[0]))
    header = _header(ordered, meta or {})
    with new_file(path, len(header) + sum(tensor.nbytes for _, tensor in ordered)) as write:
        write(struct.pack("<Q", len(header)) + header)
        for _, tensor in ordered:
            write(_bytes(tensor))


def load_tensors(
    path: Path | str, only: Container[str] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors (on the CPU; with `only` those it names) and our metadata ({} in a foreign file).

    ArtifactError: absent (BF-ART-001), a pickle (BF-ART-008), a header that does not describe the file, or a number
    that is not finite (BF-ART-005, naming the first bad tensor).
    """
    path = Path(path)
    if path.suffix in PICKLES:
        raise _pickle(path)
    try:
        with open(path, "rb") as stream:
            header, meta = read_header(path, stream)
            return dict(_tensors(path, stream, header, only)), meta
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist", code="BF-ART-001") from error


def weights_hash(state: Tensors) -> str:
    """sha256 over (name, dtype, shape, bytes) of every tensor, in the order of the names; device does not matter."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.asarray(value))
        digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def shapes_of(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def misfits(wanted: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> list[str]:
    """One sentence for each tensor that is missing, unexpected, or of another shape than wanted; sorted."""
    troubles = [f"missing {name}" for name in wanted.keys() - found.keys()]
    troubles += [f"unexpected {name}" for name in found.keys() - wanted.keys()]
    troubles += [
        f"{name} is {tuple(found[name])}, not {tuple(wanted[name])}"
        for name in wanted.keys() & found.keys()
        if tuple(found[name]) != tuple(wanted[name])
    ]
    return sorted(troubles)


def _as_torch(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {
        name: value.detach()
        if isinstance(value, torch.Tensor)
        else torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape))
        for name, value in tensors.items()
    }


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)


def _header(ordered: Iterable[tuple[str, torch.Tensor]], meta: Mapping[str, Any]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {META_KEY: canonical_json(meta).decode()}}
    start = 0
    for name, tensor in ordered:
        end = start + tensor.nbytes
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def read_header(path: Path, stream: BufferedReader) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries of an open file, all checked against its size, and our metadata; the stream stands at the data."""
    size = path.stat().st_size
    start = stream.read(8)
    if start[:2] == b"PK" or start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        raise _pickle(path)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if length > HEADER_LIMIT or 8 + length > size:
        raise _damaged(path, "its header is longer than the file or than any header can be")
    try:
        entries = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is not a table")
        meta = json.loads(metadata[META_KEY]) if META_KEY in metadata else {}
        _check_layout(entries, size - 8 - length)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its header is wrong: {error}") from error
    return entries, meta


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"{key} is given twice")
        seen[key] = value
    return seen


def _check_layout(entries: dict[str, Any], data_size: int) -> None:
    """Tensors follow each other without hole or overlap, and fill the data exactly."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        (start, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
        if dtype not in _DTYPES:
            raise ValueError(f"{name} has the unknown type {dtype}")
        if any(type(number) is not int or number < 0 for number in (start, end, *shape)):
            raise ValueError(f"{name} has a size that is no size")
        if start != position or end - start != math.prod(shape) * _DTYPES[dtype].itemsize:
            raise ValueError(f"{name} overlaps, leaves a hole, or has another size than its shape")
        position = end
    if position != data_size:
        raise ValueError(f"the data has {data_size} bytes, the tensors {position}")


def _tensors(
    path: Path, stream: BufferedReader, entries: dict[str, Any], only: Container[str] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, entry in sorted(entries.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        start, end = entry["data_offsets"]
        if only is not None and name not in only:
            stream.seek(end - start, 1)
            continue
        data = bytearray(end - start)
        if stream.readinto(data) != len(data):
            raise _damaged(path, f"{name} ends early")
        dtype = _DTYPES[entry["dtype"]]
        tensor = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        if dtype in _CHECKED and not torch.isfinite(tensor).all():
            raise _damaged(path, f"{name} holds numbers that are not finite")
        yield name, tensor.reshape(entry["shape"])


def _damaged(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{path} is damaged: {why}", fix="make it again, or restore it from a copy", code="BF-ART-005")


def _pickle(path: Path) -> ArtifactError:
    return ArtifactError(
        f"{path} is a pickle, which can run code when it is read; only safetensors files are read",
        fix="convert it with safetensors.torch.save_file in the program that made it",
        code="BF-ART-008",
    )
