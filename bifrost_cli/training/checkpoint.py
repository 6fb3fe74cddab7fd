"""Checkpoints of a training: whole or absent, checked byte by byte, never guessed. `step-NNNNNNN/` folders hold
safetensors, `state.json` and `manifest.json` (sha256 of each file). A folder is filled under a temporary name and
renamed last; one that does not verify is an error, never a reason to start again. A checkpoint of any number of
processes, whole or in parts (of which each writes its own), is read by any other."""

from __future__ import annotations

import errno
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor, distribute_tensor

from bifrost_cli.artifacts import files
from bifrost_cli.data.safetensors_io import TensorFile, open_tensors, save_tensors
from bifrost_cli.errors import ArtifactError
from bifrost_cli.runtime import distributed

FORMAT = 1
AT_ONCE = 1e9  # bytes of tensors in parts that are read at once
SHARDS = "shards"  # the folder of tensors in parts, in the place of one file a group
_REQUIRED = {"model.safetensors", "optimizer.safetensors", "state.json"}
_NAME = re.compile(r"step-(\d{7,})")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint in memory: `groups` maps a file stem (model, ema, optimizer) to its named tensors."""

    step: int
    groups: dict[str, dict[str, Tensor]]
    state: dict


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint on the disk whose bytes are right."""

    path: Path
    step: int
    state: dict
    files: tuple[str, ...]

    def read(self, group: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of a group (nothing where there is none), one at a time: no process holds a whole group.
        They are on the CPU or, where `module` is in parts, in the same parts. All processes read to the end."""
        if any(name.startswith(SHARDS) for name in self.files):
            yield from _read_shards(self.path / SHARDS, module, group)
        elif (name := f"{group}.safetensors") in self.files:
            first, path = distributed.rank() == 0, self.path / name
            opened: AbstractContextManager[TensorFile | None] = open_tensors(path) if first else nullcontext()
            with opened as file:
                yield from _spread(file, module)


class Checkpoints:
    """The checkpoints of one training, in `folder`; at most `keep` (at least one) are left after a save, and that of
    step `pinned`."""

    def __init__(self, folder: Path, keep: int = 2, pinned: int | None = None) -> None:
        self.folder, self.keep, self.pinned = Path(folder), max(1, keep), pinned

    def prepare(self) -> None:
        """Create the folder and remove what a killed save left under temporary names."""
        files.make_folder(self.folder)
        files.sweep(self.folder)

    def steps(self) -> list[int]:
        """Steps of all checkpoint folders, damaged ones included, oldest first."""
        matches = (_NAME.fullmatch(path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"

    def newest(self) -> SavedCheckpoint | None:
        """The newest checkpoint, verified, or None when there is none. Raises ArtifactError when it is damaged."""
        steps = self.steps()
        if not steps:
            return None
        path = self.path(steps[-1])
        names = tuple(verify(path))
        return SavedCheckpoint(path, steps[-1], files.read_json(path / "state.json"), names)

    def save(self, checkpoint: Checkpoint, parts: bool = False) -> None:
        """Write, rename, read back, then drop the oldest; errors are those of all processes, which all call it."""
        final = self.path(checkpoint.step)
        if distributed.run_on_main(lambda: checkpoint.step in self.steps()):
            distributed.run_on_main(lambda: verify(final))
            return
        if parts:
            _save_parts(checkpoint, final)
        else:
            distributed.run_on_main(lambda: _save_whole(checkpoint, final))
        distributed.run_on_main(self._drop_old)

    def save_alone(self, checkpoint: Checkpoint) -> None:
        """`save` of whole tensors, in this process alone: no other one is waited for."""
        final = self.path(checkpoint.step)
        if checkpoint.step in self.steps():
            verify(final)
            return
        _save_whole(checkpoint, final)
        self._drop_old()

    def _drop_old(self) -> None:
        self._remove(self.steps()[: -self.keep])

    def tidy(self) -> None:
        """After the training: remove all but the pinned one."""
        self._remove(self.steps())
        if not self.steps():
            files.remove(self.folder)

    def _remove(self, steps: list[int]) -> None:
        for step in steps:
            if step != self.pinned:
                files.remove(self.path(step))


def verify(path: Path, part: slice = slice(None)) -> dict[str, str]:
    """Check a checkpoint folder, and every byte of `part` of its sorted files; returns all files and digests."""

    def damaged(why: str) -> ArtifactError:
        return ArtifactError(
            f"checkpoint {path} is damaged: {why}",
            at=str(path),
            code="BF-ART-005",
            fix=f"restore it from a copy, or remove it to continue from the one before: rm -r {path}",
        )

    if not (path / "manifest.json").is_file():
        raise damaged("manifest.json is missing")
    manifest = files.read_json(path / "manifest.json")
    listed, number = (manifest.get(key) if isinstance(manifest, dict) else None for key in ("files", "format"))
    if type(number) is int and number > FORMAT:
        raise ArtifactError.newer(f"{path} is a checkpoint", number, FORMAT)
    in_parts = isinstance(listed, dict) and any(name.startswith(f"{SHARDS}/") for name in listed)
    required = {"state.json"} if in_parts else _REQUIRED
    if not isinstance(listed, dict) or number != FORMAT or not listed.keys() >= required:
        raise damaged("manifest.json is not a checkpoint's")
    step = manifest.get("step")
    if type(step) is not int or path.name != f"step-{step:07d}":
        raise damaged(f"its manifest says step {step}")
    for name, digest in sorted(listed.items())[part]:
        if not (path / name).is_file():
            raise damaged(f"{name} is missing")
        if files.sha256_file(path / name) != digest:
            raise damaged(f"{name} has changed since it was written")
    return listed


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and persistent buffers by name, tied ones once (safetensors refuses shared memory)."""
    persistent = module.state_dict().keys()
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    return {name: tensor.detach() for name, tensor in [*trained, *module.named_buffers()] if name in persistent}


@torch.no_grad()
def restore_module(module: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy tensors into the module in place. Raises ArtifactError naming missing, unexpected or misshapen ones."""
    own = module_tensors(module)
    missing, wrong = set(own), []
    for name, tensor in tensors:
        if name in own and own[name].shape == tensor.shape:
            own[name].copy_(tensor)
            missing.remove(name)
        else:
            wrong.append(name)
    if wrong := sorted({*wrong, *missing}):
        raise ArtifactError(f"the checkpoint is of another model: {len(wrong)} tensors differ", at=", ".join(wrong[:5]),
                            fix="train into a new folder", code="BF-ART-007")  # fmt: skip


def _save_whole(checkpoint: Checkpoint, final: Path) -> None:
    with files.new_folder(final) as draft:
        for name, tensors in checkpoint.groups.items():
            save_tensors(draft / f"{name}.safetensors", tensors, {"kind": "checkpoint", "step": checkpoint.step})
        _finish(draft, checkpoint, {path.name: files.sha256_file(path) for path in sorted(draft.iterdir())})
    verify(final)


def _save_parts(checkpoint: Checkpoint, final: Path) -> None:
    # torch.distributed.checkpoint's default storage writes a pickle (`.metadata`), which may not be read from a shared
    # place; its Hugging Face storage keeps the offsets in the headers of safetensors files, one a process.
    mine = slice(distributed.rank(), None, distributed.world())
    flat = {
        f"{group}/{name}": tensor if isinstance(tensor, DTensor) else tensor.clone()  # two groups may share a buffer
        for group, tensors in checkpoint.groups.items()
        for name, tensor in tensors.items()
    }
    with files.new_folder(final) if distributed.rank() == 0 else nullcontext() as folder:
        draft = Path(distributed.run_on_main(lambda: str(folder)))
        shards = draft / SHARDS
        try:
            dcp.save(flat, storage_writer=dcp.HuggingFaceStorageWriter(str(shards), save_distributed=True))
        except dcp.CheckpointException as error:
            with files.disk_errors(shards):
                raise _cause(error) from error
        paths = sorted(shards.iterdir())[mine]
        with distributed.raise_together():
            for path in (*paths, shards):
                files.sync(path)
        digests = distributed.all_gather_object({f"{SHARDS}/{path.name}": files.sha256_file(path) for path in paths})
        if distributed.rank() == 0:
            _finish(draft, checkpoint, {name: digest for part in digests for name, digest in part.items()})
    distributed.raise_if_any_failed()  # it has its name
    verify(final, mine)
    distributed.raise_if_any_failed()


def _finish(draft: Path, checkpoint: Checkpoint, digests: dict[str, str]) -> None:
    """The state, and last the manifest."""
    files.write_json(draft / "state.json", {**checkpoint.state, "step": checkpoint.step})
    digests = {**digests, "state.json": files.sha256_file(draft / "state.json")}
    files.write_json(draft / "manifest.json", {"format": FORMAT, "step": checkpoint.step, "files": digests})


def _cause(error: Any) -> BaseException:
    """The first process's own exception; an OSError is rebuilt, so that its number is understood."""
    cause = next(iter(error.failures.values()))[0]
    while not isinstance(cause, OSError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if "No space left" in str(cause) and not isinstance(cause, OSError):
        return OSError(errno.ENOSPC, "No space left on device")
    return cause


def _read_shards(folder: Path, module: nn.Module, group: str) -> Iterator[tuple[str, Tensor]]:
    """A group that any number of processes wrote, so much at a time: whole tensors, or this process's parts when
    `module` is sharded, of which each then reads no more than it holds."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    metadata: dict[str, Any] = reader.read_metadata().state_dict_metadata
    parameters, prefix = dict(module.named_parameters()), f"{group}/"
    alone = not any(isinstance(parameter, DTensor) for parameter in parameters.values())
    for names in _in_parts({name: about for name, about in metadata.items() if name.startswith(prefix)}):
        flat = {name: _like(parameters, name.removeprefix(prefix), metadata[name].size, metadata[name].properties.dtype)
                for name in names}  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is no mistake
            dcp.load(flat, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=alone)
        while flat:
            name, tensor = flat.popitem()
            yield name.removeprefix(prefix), tensor


def _in_parts(metadata: dict[str, Any]) -> Iterator[list[str]]:
    """The names, so many at once that their tensors have about `AT_ONCE` bytes."""
    names, size = list[str](), 0
    for name, about in metadata.items():
        names.append(name)
        size += about.size.numel() * about.properties.dtype.itemsize
        if size >= AT_ONCE:
            yield names
            names, size = [], 0
    if names:
        yield names


def _spread(file: TensorFile | None, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The first process's file (the others have none) in all: whole tensors, or in parts when `module` is sharded."""
    own: Iterator[tuple[str, Tensor]] = iter(()) if file is None else file.tensors()
    if distributed.world() == 1:
        yield from own
        return
    parameters = dict(module.named_parameters())
    for name, shape, dtype in distributed.run_on_main(lambda: [] if file is None else file.about()):
        whole = torch.empty(shape, dtype=dtype) if file is None else next(own)[1]
        part = _like(parameters, name, shape, dtype)
        if isinstance(part, DTensor):
            whole = distribute_tensor(whole.to(part.device), part.device_mesh, part.placements)
        else:
            dist.broadcast(whole, 0)
        yield name, whole


def _like(parameters: dict[str, nn.Parameter], name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor to fill for `parameter` or `parameter/key`: in parts where its parameter is."""
    owner = parameters.get(name.split("/")[0])
    if isinstance(owner, DTensor) and owner.shape == shape:
        return torch.zeros_like(owner, dtype=dtype).detach()
    return torch.zeros(shape, dtype=dtype)
