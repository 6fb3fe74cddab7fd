"""A checkpoint that others wrote: safetensors in one file, or in many with an index, checked as one.

In: a folder. Out: names and shapes, read from headers alone, and tensors when they are asked for. A shard that is cut
short, absent, or tells of other tensors than the index is an error before any tensor is read. Does not know what the
tensors belong to.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bifrost_cli.artifacts.files import read_json
from bifrost_cli.data.safetensors_io import PICKLES, load_tensors, read_header
from bifrost_cli.errors import ArtifactError

INDEX = ".safetensors.index.json"
# What the trainers of transformers and accelerate leave beside the weights; never opened, no weights are in them.
_TRAINER_STATE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|sampler|dl_state_dict|rng_state|random_states|custom_checkpoint)"
    r"(_\d+)*\.(bin|pt|pth|pkl)"
)
_SHOWN = 5


@dataclass(frozen=True)
class ShardedCheckpoint:
    """The tensors of a folder: the shape of each, and the file it lies in."""

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, Path]

    @classmethod
    def open(cls, folder: Path | str, *, pickles_too: bool = False) -> ShardedCheckpoint | None:
        """Look at every header. None when the folder holds no weights.

        pickles_too: pickles may lie in the folder, and are left unread. A trainer's files are never opened.
        ArtifactError: BF-ART-008 another pickle among the weights; BF-ART-005 a file that is damaged or absent, a name
        given twice, or an index that tells of other tensors than the files hold.
        """
        folder = Path(folder)
        if not pickles_too:
            _refuse_pickles(folder)
        paths, listed = _files(folder)
        shapes: dict[str, tuple[int, ...]] = {}
        files: dict[str, Path] = {}
        for path in paths:
            with open(path, "rb") as stream:
                entries, _ = read_header(path, stream)
            if twice := sorted(entries.keys() & files.keys()):
                raise _wrong(folder, f"{few(twice)}: both in {files[twice[0]].name} and in {path.name}")
            shapes |= {name: tuple(entry["shape"]) for name, entry in entries.items()}
            files |= dict.fromkeys(entries, path)
        if listed is not None:
            _require_listed(folder, listed, files)
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
    if indexes:
        listed = _listed(indexes[0])
        paths = [folder / name for name in sorted(set(listed.values()))]
        if absent := [path.name for path in paths if not path.is_file()]:
            raise _wrong(folder, f"{indexes[0].name} names {few(absent)}, which is not there")
        return paths, listed
    paths = sorted(folder.glob("*.safetensors"))
    if len(paths) > 1:
        raise _wrong(folder, f"it has {len(paths)} weight files and no index *{INDEX}")
    return paths, None


def _listed(index: Path) -> dict[str, str]:
    value: Any = read_json(index)
    listed = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise _wrong(index.parent, f"{index.name} has no weight_map of names")
    if strange := sorted({name for name in listed.values() if Path(name).name != name or name in (".", "..")}):
        raise _wrong(index.parent, f"{index.name} names {few(strange)}, which is no file beside it")
    return listed


def _require_listed(folder: Path, listed: dict[str, str], files: dict[str, Path]) -> None:
    there = {name: path.name for name, path in files.items()}
    lacking = sorted(f"{name} (said to be in {file})" for name, file in listed.items() if there.get(name) != file)
    if lacking:
        raise _wrong(folder, f"the files do not hold what the index names: {few(lacking)}")
    if surplus := sorted(there.keys() - listed.keys()):
        raise _wrong(folder, f"the files hold what the index does not name: {few(surplus)}")


def trainer_files(folder: Path | str) -> list[str]:
    """Names of the trainer's files in a checkpoint folder (training_args.bin, optimizer.pt, rng_state_0.pth ...)."""
    return sorted(path.name for path in Path(folder).iterdir() if _TRAINER_STATE.fullmatch(path.name))


def _refuse_pickles(folder: Path) -> None:
    pickles = {path.name for path in folder.iterdir() if path.suffix in PICKLES}
    if found := sorted(pickles.difference(trainer_files(folder))):
        kinds = Counter(Path(name).suffix for name in found)
        raise ArtifactError(
            f"{folder} holds pickles ({', '.join(kinds)}), which can run code when they are read; only safetensors is",
            at=few(found),
            fix="move them away if safetensors files beside them hold the weights; else convert them with "
            "safetensors.torch.save_file in the program that made them",
            code="BF-ART-008",
        )


def _wrong(folder: Path, why: str) -> ArtifactError:
    return ArtifactError(f"the checkpoint in {folder} is not whole: {why}", fix="fetch it again", code="BF-ART-005")


def few(names: list[str], between: str = ", ") -> str:
    """The first five, and how many more there are."""
    more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return between.join(names[:_SHOWN] + more)
