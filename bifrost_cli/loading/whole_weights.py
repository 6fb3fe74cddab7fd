"""Weights as their files hold them: every tensor is used or named, and every tensor of the model is filled.

The libraries warn where a file and a config.json do not agree, and go on; here that is an error. What changes weights
on the way (an adapter beside them, a quantization) is refused before anything is loaded.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.utils import logging as hub_logging

from bifrost_cli.artifacts.files import read_json
from bifrost_cli.errors import ArtifactError

ADAPTER = "adapter_config.json"
# Tensors of stock checkpoints that their own library computes by itself today.
COMPUTED = (
    r"(^|\.)position_ids$",  # 0, 1, 2 ...: CLIP and SigLIP, saved before transformers 4.31
    r"rotary_emb\.inv_freq$",  # Llama, saved before transformers 4.33
    r"\.relative_position_index$",  # Swin's windows
)
_QUANTIZED = ("quantization_config", "compression_config")
_WHOLE_NUMBERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
_SHOWN = 5


def require_plain(folder: Path | str) -> None:
    """ArtifactError BF-ART-007 for a model that is quantized, or that has a LoRA lying beside its weights."""
    folder = Path(folder)
    if (folder / ADAPTER).is_file():  # transformers would apply it unasked
        raise ArtifactError(
            f"{folder} holds an adapter (LoRA) beside the weights, which is not merged into them",
            at=str(folder / ADAPTER),
            fix="merge it (merge_and_unload of peft) and save the model, or take the adapter's files out of the folder",
            code="BF-ART-007",
        )
    config = folder / "config.json"
    values = read_json(config) if config.is_file() else {}
    parts = [part for part in (values, *getattr(values, "values", tuple)()) if isinstance(part, dict)]
    found = next((part[key] for part in parts for key in _QUANTIZED if part.get(key)), None)
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise _quantized(folder, f"config.json: {method or 'quantization_config'}")


def load_whole(kind: Any, folder: str, fix: str = "fetch the model again", **options: Any) -> Any:
    """`from_pretrained`, which would fill what is missing with random numbers and leave out what it has no place for.

    Raises:
        ArtifactError: BF-ART-007, a tensor is missing, surplus, of another shape, or of whole numbers.
    """
    place = Path(folder) / options.get("subfolder", "")
    _require_fractions(place)
    loud = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # the library prints a table of what our error says
    try:
        model, report = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True,
                                             ignore_mismatched_sizes=True, **options)  # fmt: skip
    finally:
        hub_logging.set_verbosity(loud)
    name = type(model).__name__
    lost = [*report["missing_keys"], *(f"{key} is {(*shape,)}, not {(*expected,)}"
                                       for key, shape, expected in report["mismatched_keys"])]  # fmt: skip
    if lost:
        raise ArtifactError(f"{place} lacks {len(lost)} tensors of {name}, or has them in another shape",
                            at=_few(lost), fix=fix, code="BF-ART-007")  # fmt: skip
    if surplus := [key for key in report["unexpected_keys"] if not re.search("|".join(COMPUTED), key)]:
        raise ArtifactError(
            f"{place} holds {len(surplus)} tensors that {name}, as its config.json describes it, has no place for",
            at=_few(surplus),
            fix="fetch config.json and weights of one model again, not quantized",
            code="BF-ART-007",
        )
    return model


def _require_fractions(place: Path) -> None:
    """Codes of a quantization are whole numbers: they would be copied as if they were weights."""
    for path in sorted(place.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            codes = [name for name in file.keys() if re.search(r"(^|[._])(weight|bias)$", name)
                     and file.get_slice(name).get_dtype() in _WHOLE_NUMBERS]  # fmt: skip
        if codes:
            raise _quantized(place, f"{path.name}: {_few(codes)}")


def _quantized(place: Path, at: str) -> ArtifactError:
    fix = "give the model in 16 or 32 bits; --set models.weights=int8 or nf4 quantizes it while it is loaded"
    return ArtifactError(f"{place} holds a quantized model", at=at, fix=fix, code="BF-ART-007")


def _few(names: list[str]) -> str:
    return "; ".join(sorted(names)[:_SHOWN])
