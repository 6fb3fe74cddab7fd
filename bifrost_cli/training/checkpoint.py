"""Checkpoints of a training: whole or absent, checked byte by byte, never guessed.

`step-NNNNNNN/` folders hold safetensors, `state.json` and `manifest.json` (sha256 of each file). A folder is filled
under a temporary name and renamed last; older ones go only after the new one was read back. A `step-*` folder that does
not verify is an error, never a reason to start again.
With several processes the first writes what all have; what is in parts each writes its own of. A checkpoint of any
number of processes, whole or in parts, is read by any other.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bifrost_cli.artifacts.files import (
    make_folder,
    new_folder,
    read_json,
    remove,
    sha256_file,
    sweep,
    sync,
    write_json,
)
from bifrost_cli.data.safetensors_io import load_tensors, save_tensors
from bifrost_cli.errors import ArtifactError
from bifrost_cli.runtime import distributed
from bifrost_cli.training.sharded_state import read_shards, spread, write_shards

FORMAT = 1
SHARDS = "shards"  # the folder of tensors in parts, in the place of one file a group
_REQUIRED = {"model.safetensors", "optimizer.safetensors", "state.json"}
_NAME = re.compile(r"step-(\d{7,})")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint in memory: `groups` maps a file stem (model, ema, optimizer) to its named tensors."""

    step: int
    groups: dict[str, dict[str, Tensor]]
    state: dict


class Checkpoints:
    """The checkpoints of one training, in `folder`; at most `keep` (at least one) are left after a save."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), max(1, keep)

    def prepare(self) -> None:
        """Create the folder and remove what a killed save left under temporary names."""
        make_folder(self.folder)
        sweep(self.folder)

    def steps(self) -> list[int]:
        """Steps of all checkpoint folders, damaged ones included, oldest first."""
        matches = (_NAME.fullmatch(path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"

    def save(self, checkpoint: Checkpoint, parts: bool = False) -> None:
        """Write, rename, read back, then drop the oldest. All processes call it; `parts`: the tensors are in parts.

        Raises DiskFull, ArtifactError (5), in all processes.
        """
        final = self.path(checkpoint.step)
        if distributed.run_on_main(lambda: checkpoint.step in self.steps()):
            distributed.run_on_main(lambda: verify(final))
            return
        if parts:
            self._save_parts(checkpoint, final)
        else:
            distributed.run_on_main(lambda: self._save_whole(checkpoint, final))
        distributed.run_on_main(self._drop_old)

    def _save_whole(self, checkpoint: Checkpoint, final: Path) -> None:
        with new_folder(final) as draft:
            for name, tensors in checkpoint.groups.items():
                save_tensors(draft / f"{name}.safetensors", tensors, {"kind": "checkpoint", "step": checkpoint.step})
            _finish(draft, checkpoint, {path.name: sha256_file(path) for path in sorted(draft.iterdir())})
        verify(final)

    def _save_parts(self, checkpoint: Checkpoint, final: Path) -> None:
        with new_folder(final) if distributed.rank() == 0 else nullcontext() as folder:
            draft = Path(distributed.run_on_main(lambda: str(folder)))
            write_shards(draft / SHARDS, checkpoint.groups)
            mine = sorted((draft / SHARDS).iterdir())[distributed.rank() :: distributed.world()]
            with distributed.raise_together():
                for path in (*mine, draft / SHARDS):
                    sync(path)
            digests = distributed.all_gather_object({f"{SHARDS}/{path.name}": sha256_file(path) for path in mine})
            if distributed.rank() == 0:
                _finish(draft, checkpoint, {name: digest for part in digests for name, digest in part.items()})
        distributed.raise_if_any_failed()  # it has its name
        verify(final, slice(distributed.rank(), None, distributed.world()))
        distributed.raise_if_any_failed()

    def _drop_old(self) -> None:
        for step in self.steps()[: -self.keep]:
            remove(self.path(step))

    def newest(self) -> SavedCheckpoint | None:
        """The newest checkpoint, verified, or None when there is none. Raises ArtifactError when it is damaged."""
        if not self.steps():
            return None
        path = self.path(self.steps()[-1])
        files = tuple(verify(path))
        return SavedCheckpoint(path, self.steps()[-1], read_json(path / "state.json"), files)


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint on the disk whose bytes are right."""

    path: Path
    step: int
    state: dict
    files: tuple[str, ...]

    def read(self, group: str, module: nn.Module) -> dict[str, Tensor]:
        """A group ({} where there is none), on the CPU or, where `module` is in parts, in the same parts.

        All processes call it. One group at a time, since a host's processes would else hold all of them at once.
        """
        if any(name.startswith(SHARDS) for name in self.files):
            return read_shards(self.path / SHARDS, module, group)
        name = f"{group}.safetensors"
        if name not in self.files:
            return {}
        tensors = None if distributed.rank() else {group: load_tensors(self.path / name)[0]}
        return spread(tensors, module).get(group, {})


def _finish(draft: Path, checkpoint: Checkpoint, digests: dict[str, str]) -> None:
    """The state, and last the manifest."""
    write_json(draft / "state.json", {**checkpoint.state, "step": checkpoint.step})
    digests = {**digests, "state.json": sha256_file(draft / "state.json")}
    write_json(draft / "manifest.json", {"format": FORMAT, "step": checkpoint.step, "files": digests})


def verify(path: Path, part: slice = slice(None)) -> dict[str, str]:
    """Check every byte of a checkpoint folder; returns its files and digests. Raises ArtifactError (5).

    `part`: of the sorted files, those whose bytes are read.
    """

    def damaged(why: str) -> ArtifactError:
        return ArtifactError(
            f"checkpoint {path} is damaged: {why}",
            at=str(path),
            code="BF-ART-005",
            fix=f"restore it from a copy, or remove it to continue from the one before: rm -r {path}",
        )

    if not (path / "manifest.json").is_file():
        raise damaged("manifest.json is missing")
    manifest = read_json(path / "manifest.json")
    files, number = (manifest.get(key) if isinstance(manifest, dict) else None for key in ("files", "format"))
    if type(number) is int and number > FORMAT:
        raise ArtifactError.newer(f"{path} is a checkpoint", number, FORMAT)
    if not isinstance(files, dict) or number != FORMAT or not _is_whole(files):
        raise damaged("manifest.json is not a checkpoint's")
    step = manifest.get("step")
    if type(step) is not int or path.name != f"step-{step:07d}":
        raise damaged(f"its manifest says step {step}")
    for name, digest in sorted(files.items())[part]:
        if not (path / name).is_file():
            raise damaged(f"{name} is missing")
        if sha256_file(path / name) != digest:
            raise damaged(f"{name} has changed since it was written")
    return files


def _is_whole(files: dict[str, str]) -> bool:
    return files.keys() >= _REQUIRED or "state.json" in files and any(name.startswith(f"{SHARDS}/") for name in files)


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and persistent buffers by name, tied ones once (safetensors refuses shared memory)."""
    persistent = module.state_dict().keys()
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    return {name: tensor.detach() for name, tensor in [*trained, *module.named_buffers()] if name in persistent}


@torch.no_grad()
def restore_module(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into the module in place. Raises ArtifactError naming missing, unexpected or misshapen ones."""
    own = module_tensors(module)
    wrong = sorted(own.keys() ^ tensors.keys()) or [n for n in own if own[n].shape != tensors[n].shape]
    if wrong:
        raise ArtifactError(
            f"the checkpoint is of another model: {len(wrong)} tensors differ",
            at=", ".join(wrong[:5]),
            fix="train into a new folder",
            code="BF-ART-007",
        )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
