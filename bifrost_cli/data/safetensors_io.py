"""Weights as safetensors: written so that they last, read with suspicion. Never a pickle. What the format can say is
checked before a tensor is made; it has no checksum: an artifact's manifest keeps one. A checkpoint that others wrote,
in one file or in many with an index, is checked as one before any tensor is read."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bifrost_cli.artifacts.files import canonical_json, new_file, read_json
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
INDEX = ".safetensors.index.json"
# What the trainers of transformers and accelerate leave beside the weights; never opened, no weights are in them.
_TRAINER_STATE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|sampler|dl_state_dict|rng_state|random_states|custom_checkpoint)"
    r"(_\d+)*\.(bin|pt|pth|pkl)"
)

Tensors = Mapping[str, "torch.Tensor | np.ndarray"]


def save_tensors(path: Path | str, tensors: Tensors, meta: Mapping[str, Any] | None = None) -> None:
    """Write a safetensors file atomically; `meta` is its one metadata key, as canonical JSON: with several the format's
    own writer gives other bytes in every process. DiskFull when there is no room."""
    state = {name: _tensor(value) for name, value in tensors.items()}
    ordered = sorted(state.items(), key=lambda item: (-item[1].element_size(), item[0]))
    entries: dict[str, Any] = {"__metadata__": {META_KEY: canonical_json(meta or {}).decode()}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with new_file(Path(path), len(header) + end) as write:
        write(struct.pack("<Q", len(header)) + header)
        for _, tensor in ordered:
            write(_bytes(tensor))


def load_tensors(path: Path | str, only: Container[str] | None = None
                 ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:  # fmt: skip
    """The tensors (on the CPU; with `only` those it names) and our metadata ({} in a foreign file). ArtifactError:
    absent (BF-ART-001), a pickle (BF-ART-008), a header that does not describe the file, or a number that is not finite
    (BF-ART-005, naming the first bad tensor)."""
    with open_tensors(path) as file:
        return dict(file.tensors(only)), file.meta


class TensorFile:
    """An open safetensors file, from which tensors are read one after the other."""

    def __init__(self, path: Path, stream: BufferedReader) -> None:
        self.path, self._stream = path, stream
        self._entries, self.meta = _read_header(path, stream)

    def about(self) -> list[tuple[str, torch.Size, torch.dtype]]:
        """Name, shape and number format of every tensor, in the order of the file."""
        return [
            (name, torch.Size(entry["shape"]), _DTYPES[entry["dtype"]]) for name, entry in _by_offset(self._entries)
        ]

    def tensors(self, only: Container[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor, once, in the order of the file; with `only` those it names. ArtifactError BF-ART-005: a
        number that is not finite, or the file ends early."""
        for name, shape, dtype in self.about():
            start, end = self._entries[name]["data_offsets"]
            if only is not None and name not in only:
                self._stream.seek(end - start, 1)
                continue
            data = bytearray(end - start)
            if self._stream.readinto(data) != len(data):
                raise _damaged(self.path, f"{name} ends early")
            tensor = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            if dtype in _CHECKED and not torch.isfinite(tensor).all():
                raise _damaged(self.path, f"{name} holds numbers that are not finite")
            yield name, tensor.reshape(shape)


@contextmanager
def open_tensors(path: Path | str) -> Iterator[TensorFile]:
    """A file whose header is checked; errors as `load_tensors`."""
    path = Path(path)
    if path.suffix in PICKLES:
        raise _pickle(path)
    try:
        stream = open(path, "rb")
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist", code="BF-ART-001") from error
    with stream:
        yield TensorFile(path, stream)


def weights_hash(state: Tensors) -> str:
    """sha256 over (name, dtype, shape, bytes) of every tensor, in the order of the names; device does not matter."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = _tensor(state[name])
        digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def shapes_of(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def misfits(wanted: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> list[str]:
    """One sentence for each tensor that is missing, unexpected, or of another shape than wanted; sorted."""
    both = [(name, tuple(found[name]), tuple(wanted[name])) for name in wanted.keys() & found.keys()]
    return sorted([
        *(f"missing {name}" for name in wanted.keys() - found.keys()),
        *(f"unexpected {name}" for name in found.keys() - wanted.keys()),
        *(f"{name} is {shape}, not {other}" for name, shape, other in both if shape != other),
    ])  # fmt: skip


def _tensor(value: torch.Tensor | np.ndarray) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach()
    return torch.from_numpy(np.ascontiguousarray(value).reshape(np.shape(value)))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _by_offset(entries: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(entries.items(), key=lambda item: tuple(item[1]["data_offsets"]))


def _read_header(path: Path, stream: BufferedReader) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries of an open file, all checked against its size, and our metadata; the stream stands at the data."""
    size, head = path.stat().st_size, stream.read(8)
    if head[:2] == b"PK" or head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        raise _pickle(path)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
    if length > HEADER_LIMIT or 8 + length > size:
        raise _damaged(path, "its header is longer than the file or than any header can be")
    try:
        entries = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is not a table")
        meta = json.loads(metadata[META_KEY]) if META_KEY in metadata else {}
        position = 0  # tensors follow each other without hole or overlap, and fill the data exactly
        for name, entry in _by_offset(entries):
            (start, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
            if dtype not in _DTYPES:
                raise ValueError(f"{name} has the unknown type {dtype}")
            if any(type(number) is not int or number < 0 for number in (start, end, *shape)):
                raise ValueError(f"{name} has a size that is no size")
            if start != position or end - start != math.prod(shape) * _DTYPES[dtype].itemsize:
                raise ValueError(f"{name} overlaps, leaves a hole, or has another size than its shape")
            position = end
        if position != size - 8 - length:
            raise ValueError(f"the data has {size - 8 - length} bytes, the tensors {position}")
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


def _damaged(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{path} is damaged: {why}", fix="make it again, or restore it from a copy", code="BF-ART-005")


def _pickle(path: Path) -> ArtifactError:
    return ArtifactError(f"{path} is a pickle, which can run code when it is read; only safetensors files are read",
                         fix="convert it with safetensors.torch.save_file in the program that made it",
                         code="BF-ART-008")  # fmt: skip


@dataclass(frozen=True)
class ShardedCheckpoint:
    """The tensors of a folder: the shape of each, and the file it lies in."""

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, Path]

    @classmethod
    def open(cls, folder: Path | str, *, pickles_too: bool = False) -> ShardedCheckpoint | None:
        """Look at every header. None when the folder holds no weights. pickles_too: pickles may lie in the folder, and
        are left unread. A trainer's files are never opened. ArtifactError: BF-ART-008 another pickle among the weights;
        BF-ART-005 a file that is damaged or absent, a name given twice, or an index that tells of other tensors than
        the files hold."""
        folder = Path(folder)
        pickles = [] if pickles_too else sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if found := [name for name in pickles if not _TRAINER_STATE.fullmatch(name)]:
            kinds = ", ".join(dict.fromkeys(Path(name).suffix for name in found))
            raise ArtifactError(
                f"{folder} holds pickles ({kinds}), which can run code when they are read; only safetensors is",
                at=few(found),
                fix="move them away if safetensors files beside them hold the weights; else convert them with "
                "safetensors.torch.save_file in the program that made them",
                code="BF-ART-008",
            )
        paths, listed = _files(folder)
        shapes: dict[str, tuple[int, ...]] = {}
        files: dict[str, Path] = {}
        for path in paths:
            with open(path, "rb") as stream:
                entries, _ = _read_header(path, stream)
            if twice := sorted(entries.keys() & files.keys()):
                raise _wrong(folder, f"{few(twice)}: both in {files[twice[0]].name} and in {path.name}")
            shapes |= {name: tuple(entry["shape"]) for name, entry in entries.items()}
            files |= dict.fromkeys(entries, path)
        there = {name: path.name for name, path in files.items()}
        listed = there if listed is None else listed
        if lacking := sorted(
            f"{name} (said to be in {file})" for name, file in listed.items() if there.get(name) != file
        ):
            raise _wrong(folder, f"the files do not hold what the index names: {few(lacking)}")
        if surplus := sorted(there.keys() - listed.keys()):
            raise _wrong(folder, f"the files hold what the index does not name: {few(surplus)}")
        return cls(folder, shapes, files) if paths else None

    def load(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors, on the CPU. ArtifactError BF-ART-005 for a number that is not finite."""
        wanted = set(names)
        found: dict[str, torch.Tensor] = {}
        for path in sorted({self.files[name] for name in wanted}):
            found |= load_tensors(path, only=wanted)[0]
        return found


def _files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files, and the index's `tensor -> file name`, or None where one file needs none."""
    indexes = sorted(folder.glob(f"*{INDEX}"))
    if len(indexes) > 1:
        raise _wrong(folder, f"it has {len(indexes)} indexes: {few([path.name for path in indexes])}")
    if not indexes:
        paths = sorted(folder.glob("*.safetensors"))
        if len(paths) > 1:
            raise _wrong(folder, f"it has {len(paths)} weight files and no index *{INDEX}")
        return paths, None
    index = indexes[0]
    value: Any = read_json(index)
    listed = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise _wrong(folder, f"{index.name} has no weight_map of names")
    names = sorted(set(listed.values()))
    if strange := [name for name in names if Path(name).name != name or name in (".", "..")]:
        raise _wrong(folder, f"{index.name} names {few(strange)}, which is no file beside it")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise _wrong(folder, f"{index.name} names {few(absent)}, which is not there")
    return [folder / name for name in names], listed


def trainer_files(folder: Path | str) -> list[str]:
    """Names of the trainer's files in a checkpoint folder (training_args.bin, optimizer.pt, rng_state_0.pth ...)."""
    return sorted(path.name for path in Path(folder).iterdir() if _TRAINER_STATE.fullmatch(path.name))


def _wrong(folder: Path, why: str) -> ArtifactError:
    return ArtifactError(f"the checkpoint in {folder} is not whole: {why}", fix="fetch it again", code="BF-ART-005")


def few(names: list[str], between: str = ", ") -> str:
    """The first five, and how many more there are."""
    more = [f"and {len(names) - 5} more"] if len(names) > 5 else []
    return between.join(names[:5] + more)
