"""Which family a diffusion model's folder is of, and whether all its parts are there: built-in ones and plug-ins.

Reads the small JSON files of a folder, never its weights.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from torch import nn

from bifrost_cli.artifacts.files import read_json
from bifrost_cli.errors import ArtifactError
from bifrost_cli.models.diffusion.base import DiffusionModel
from bifrost_cli.models.diffusion.flux import FluxModel
from bifrost_cli.models.diffusion.sd3 import Sd3Model
from bifrost_cli.runtime.plugins import plugins

DIFFUSION_MODELS = plugins("bifrost.diffusion_models", {"FLUX": FluxModel, "SD3": Sd3Model}, base=DiffusionModel)
_SHOWN = 3


def diffusion_class(folder: Path | str) -> type[DiffusionModel]:
    """The family of the diffusers pipeline in `folder`, by its transformer's class.

    Raises:
        ArtifactError: BF-ART-009, of no known family, or not a pipeline at all.
        EnvironmentProblem: the folder is of no built-in family, and a plug-in does not load.
    """
    name, known = _class_of(Path(folder), "transformer"), []
    for family in DIFFUSION_MODELS:  # built-in ones first, so that plug-ins are imported for other models only
        kind = DIFFUSION_MODELS[family]
        transformer = kind.parts["transformer"].partition(":")[2]
        if transformer == name:
            return kind
        known.append(f"{transformer} ({family})")
    raise _unfit(f"{folder} holds no diffusion model of a known family",
                 f"transformer: {name}\nknown: {', '.join(known)}")  # fmt: skip


def part_classes(kind: type[DiffusionModel]) -> dict[str, type]:
    """The folders of a family's pipeline and the class that reads each."""
    named = {part: value.partition(":") for part, value in kind.parts.items()}
    return {part: getattr(importlib.import_module(module), name) for part, (module, _, name) in named.items()}


def require_part(folder: Path | str, part: str, wanted: type) -> None:
    """ArtifactError unless the part is there: BF-ART-009 of another class, BF-ART-010 missing, or without weights."""
    place = Path(folder) / part
    if not place.is_dir():
        raise _lacking(f"{folder} lacks its {part} ({wanted.__name__})")
    if not issubclass(wanted, nn.Module):
        return
    if (found := _class_of(Path(folder), part)) != wanted.__name__:
        raise _unfit(f"{place} is not the {part} that its family has", f"found: {found}\nwanted: {wanted.__name__}")
    indexes = [read_json(path)["weight_map"].values() for path in place.glob("*.safetensors.index.json")]
    gone = sorted({name for index in indexes for name in index if not (place / name).is_file()})
    if gone or not any(place.glob("*.safetensors")):
        raise _lacking(f"{place} lacks {', '.join(gone[:_SHOWN]) or 'its weights: there is no .safetensors file'}")


def _class_of(folder: Path, part: str) -> str | None:
    """The class that a part's config.json names, by diffusers' key or by transformers'; else the pipeline's index."""
    config, index = folder / part / "config.json", folder / "model_index.json"
    facts = read_json(config) if config.is_file() else {}
    listed = read_json(index).get(part) if index.is_file() else None
    return facts.get("_class_name") or (facts.get("architectures") or listed or [None])[-1]


def _unfit(what: str, at: str) -> ArtifactError:
    return ArtifactError(what, at=at, fix="name another in models.diffusion", code="BF-ART-009")


def _lacking(what: str) -> ArtifactError:
    return ArtifactError(what, fix="fetch the model again, whole", code="BF-ART-010")
