"""Checkpoints of a training: whole or absent, checked byte by byte, never guessed.

In: a folder, named tensors, a small JSON state. Out: `step-NNNNNNN/` folders holding safetensors, `state.json` and
`manifest.json` (sha256 of each file). A folder is filled under a temporary name and renamed last; older ones go only
after the new one was read back. A `step-*` folder that does not verify is an error, never a reason to start again.
Does not know what the tensors mean.
"""

from __future__ import annotations

import re
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
    write_json,
)
from bifrost_cli.data.weights import load_tensors, save_tensors
from bifrost_cli.errors import ArtifactError

FORMAT = 1
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
        found = (_NAME.fullmatch(path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write, rename, read back, then drop the oldest. Raises DiskFull, ArtifactError (5)."""
        final = self.path(checkpoint.step)
        if checkpoint.step in self.steps():
            verify(final)
            return final
        with new_folder(final) as draft:
            self._fill(draft, checkpoint)
        verify(final)
        for step in self.steps()[: -self.keep]:
            remove(self.path(step))
        return final

    def _fill(self, draft: Path, checkpoint: Checkpoint) -> None:
        for name, tensors in checkpoint.groups.items():
            save_tensors(draft / f"{name}.safetensors", tensors, {"kind": "checkpoint", "step": checkpoint.step})
        write_json(draft / "state.json", {**checkpoint.state, "step": checkpoint.step})
        digests = {path.name: sha256_file(path) for path in sorted(draft.iterdir())}
        write_json(draft / "manifest.json", {"format": FORMAT, "step": checkpoint.step, "files": digests})

    def load_newest(self) -> Checkpoint | None:
        """The newest checkpoint, verified, or None when there is none. Raises ArtifactError when it is damaged."""
        if not self.steps():
            return None
        path = self.path(self.steps()[-1])
        files = verify(path)
        stems = [name.removesuffix(".safetensors") for name in files if name.endswith(".safetensors")]
        groups = {stem: load_tensors(path / f"{stem}.safetensors")[0] for stem in stems}
        return Checkpoint(self.steps()[-1], groups, read_json(path / "state.json"))


def verify(path: Path) -> dict[str, str]:
    """Check every byte of a checkpoint folder; returns its files and digests. Raises ArtifactError (5)."""
    def damaged(why: str) -> ArtifactError:
        return ArtifactError(f"checkpoint {path} is damaged: {why}", at=str(path), code="BF-ART-005",
                             fix=f"restore it from a copy, or remove it to continue from the one before: rm -r {path}")

    if not (path / "manifest.json").is_file():
        raise damaged("manifest.json is missing")
    manifest = read_json(path / "manifest.json")
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or manifest.get("format") != FORMAT or not _REQUIRED <= set(files):
        raise damaged("manifest.json is not a checkpoint's, or of a newer bifrost")
    if path.name != f"step-{manifest.get('step', -1):07d}":
        raise damaged(f"its manifest says step {manifest.get('step')}")
    for name, digest in files.items():
        if not (path / name).is_file():
            raise damaged(f"{name} is missing")
        if sha256_file(path / name) != digest:
            raise damaged(f"{name} has changed since it was written")
    return files


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
        raise ArtifactError(f"the checkpoint is of another model: {len(wrong)} tensors differ", at=", ".join(wrong[:5]),
                            fix="train into a new folder", code="BF-ART-007")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
