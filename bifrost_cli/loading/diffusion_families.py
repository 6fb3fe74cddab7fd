"""A diffusion model's folder, its recipe and its ControlNet: which family it is of, and whether they fit.

In: a local folder; a loaded diffusion model with a recipe or a ControlNet artifact. Out: a family's name, or an error that
names both sides. Reads the small JSON files of a folder, never its weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5Tokenizer,
)

from bifrost_cli.artifacts.files import read_json
from bifrost_cli.errors import ArtifactError

_SHOWN = 3
# A family's parts: each is a folder that the class beside it reads.
_DIFFUSION = {"vae": AutoencoderKL, "scheduler": FlowMatchEulerDiscreteScheduler, "tokenizer": CLIPTokenizer}
PARTS: dict[str, dict[str, Any]] = {
    "FLUX": {
        **_DIFFUSION,
        "transformer": FluxTransformer2DModel,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": T5EncoderModel,
        "tokenizer_2": T5Tokenizer,
    },
    "SD3": {
        **_DIFFUSION,
        "transformer": SD3Transformer2DModel,
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
        "tokenizer_2": CLIPTokenizer,
        "tokenizer_3": T5Tokenizer,
    },
}


def diffusion_family(folder: Path | str) -> str:
    """The family of the diffusers pipeline in `folder`, by its transformer's class.

    ArtifactError BF-ART-009: of no known family, or not a pipeline at all.
    """
    families = {parts["transformer"].__name__: family for family, parts in PARTS.items()}
    found = _class_of(Path(folder), "transformer")
    if found not in families:
        known = ", ".join(f"{name} ({family})" for name, family in families.items())
        raise _unfit(f"{folder} holds no diffusion model of a known family", f"transformer: {found}\nknown: {known}")
    return families[found]


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
