"""Names to open_clip models: `builtin:open_clip`, `open_clip:NAME/PRETRAINED`, `open_clip:local-dir:FOLDER`.

Weights come from safetensors wherever we choose the file; a model without weights is an error, never a random one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from bifrost_cli.errors import ArtifactError, EnvironmentProblem
from bifrost_cli.loading.resolve import resolve_device, resolve_model

_LOCAL = "local-dir:"


def features_name(ref: str) -> str:
    """The name without the place: of a local folder its last part, so that an identity holds no path."""
    place = ref.removeprefix("open_clip:")
    return f"open_clip:{Path(place.removeprefix(_LOCAL)).name}" if place.startswith(_LOCAL) else ref


def load_open_clip(ref: str, device: str | torch.device) -> Any:
    """The whole model in float32, by open_clip's own factory, with the activation its weights were trained with.

    EnvironmentProblem: unknown name, not reachable. ArtifactError: no safetensors in a folder, weights that do not fit.
    """
    import open_clip  # a second of imports that only this needs

    name, tag = _place(ref)
    known = open_clip.get_pretrained_cfg(name, tag) if tag else None
    quick_gelu = bool(known and known.get("quick_gelu"))
    try:
        model = open_clip.create_model(name, tag, force_quick_gelu=quick_gelu, require_pretrained=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _explained(ref, error) from error
    return model.to(resolve_device(str(device))).eval()


def load_tokenizer(ref: str) -> Any:
    """open_clip's tokenizer of the same name: `tokenize(texts, context_length)`. Errors of `load_open_clip`."""
    import open_clip

    try:
        return open_clip.get_tokenizer(_place(ref)[0])
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _explained(ref, error) from error


def _place(ref: str) -> tuple[str, str | None]:
    """What open_clip's factory is given: a model name, and a tag or file of weights."""
    if ref.startswith("builtin:"):
        return _LOCAL + resolve_model(ref), None
    place = ref.removeprefix("open_clip:")
    if place.startswith(_LOCAL):
        return _LOCAL + str(_safe_folder(Path(place.removeprefix(_LOCAL)).expanduser())), None
    if place.startswith("hf-hub:"):
        return place, None
    name, _, tag = place.partition("/")
    if Path(tag).is_file() and not tag.endswith(".safetensors"):
        raise _unsafe(tag)
    return name, tag


def _safe_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise EnvironmentProblem(f"there is no model folder {folder}", fix="check evaluate.features", code="BF-ENV-020")
    if not list(folder.glob("*.safetensors")):
        raise _unsafe(str(folder))
    return folder


def _unsafe(place: str) -> ArtifactError:
    return ArtifactError(
        f"{place} holds no safetensors weights",
        fix="convert them to open_clip_model.safetensors; other formats can run code and are not read",
        code="BF-ART-008",
    )


def _explained(ref: str, error: Exception) -> EnvironmentProblem | ArtifactError:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    if "state_dict" in first:
        message, fix = f"the weights of {ref} do not fit", "give the model they belong to"
        return ArtifactError(message, at=str(error)[:600], fix=fix, code="BF-ART-007")
    if isinstance(error, SafetensorError):
        return ArtifactError(f"{ref} holds damaged weights: {first}", fix="fetch the model again", code="BF-ART-008")
    return EnvironmentProblem(
        f"{ref} could not be loaded: {first[:200]}",
        fix="check the name (open_clip.list_pretrained() has them all) and the network, or name a folder: "
        "open_clip:local-dir:FOLDER",
        code="BF-ENV-020",
    )
