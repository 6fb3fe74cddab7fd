"""Names to open_clip models: `builtin:open_clip`, `open_clip:NAME/PRETRAINED`, `open_clip:local-dir:FOLDER`.

Weights come from safetensors wherever we choose the file; a model without weights is an error, never a random one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    with _explained(ref):
        model = open_clip.create_model(name, tag, force_quick_gelu=quick_gelu, require_pretrained=True)
    return model.to(resolve_device(str(device))).eval()


def load_tokenizer(ref: str) -> Any:
    """open_clip's tokenizer of the same name: `tokenize(texts, context_length)`. Errors of `load_open_clip`."""
    import open_clip

    name, _ = _place(ref)
    with _explained(ref):
        return open_clip.get_tokenizer(name)


def _place(ref: str) -> tuple[str, str | None]:
    """What open_clip's factory is given: a model name, and a tag or file of weights."""
    if ref.startswith("builtin:"):
        return _LOCAL + resolve_model(ref), None
    place = ref.removeprefix("open_clip:")
    if place.startswith(_LOCAL):
        folder = Path(place.removeprefix(_LOCAL)).expanduser()
        if not folder.is_dir():
            raise EnvironmentProblem(f"there is no model folder {folder}", fix="check evaluate.features",
                                     code="BF-ENV-020")  # fmt: skip
        if not list(folder.glob("*.safetensors")):
            raise _unsafe(str(folder))
        return _LOCAL + str(folder), None
    if place.startswith("hf-hub:"):
        return place, None
    name, _, tag = place.partition("/")
    if Path(tag).is_file() and not tag.endswith(".safetensors"):
        raise _unsafe(tag)
    return name, tag


def _unsafe(place: str) -> ArtifactError:
    fix = "convert them to open_clip_model.safetensors; other formats can run code and are not read"
    return ArtifactError(f"{place} holds no safetensors weights", fix=fix, code="BF-ART-008")


@contextmanager
def _explained(ref: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if "state_dict" in first:
            raise ArtifactError(f"the weights of {ref} do not fit", at=str(error)[:600], code="BF-ART-007",
                                fix="give the model they belong to") from error  # fmt: skip
        if isinstance(error, SafetensorError):
            raise ArtifactError(f"{ref} holds damaged weights: {first}", code="BF-ART-008",
                                fix="fetch the model again") from error  # fmt: skip
        fix = "check the name (open_clip.list_pretrained() has them all) and the network, or name a folder: "
        raise EnvironmentProblem(f"{ref} could not be loaded: {first[:200]}", code="BF-ENV-020",
                                 fix=f"{fix}open_clip:local-dir:FOLDER") from error  # fmt: skip
