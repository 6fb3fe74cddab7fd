"""Names of the published checkpoint's tensors and ours: the one table behind `bifrost import` and `bifrost export`.

What the published code has no name for (normalized latents, a sampling head, latents of another encoder) is called
`bifrost.` and our name. The published layout is one of Qwen2.5-VL and FLUX.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

OWN = "bifrost."
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_BRANCH = {
    "mask_token": "mask_token",
    "learnable_pos_emb": "position_embedding",
    "vision_head.weight": "vision_head.weight",
    "vision_head.bias": "vision_head.bias",
    "vision_language_model.model.vision_branch_norm.weight": "decoder.norm.weight",
}
_TO_PUBLISHED = {ours: published for published, ours in _BRANCH.items()}
_PUBLISHED_LAYER = re.compile(r"vision_language_model\.model\.(layers\.\d+\.)(self_attn\.)?vision_branch_(.+)")
_OUR_LAYER = re.compile(r"decoder\.(layers\.\d+\.)(self_attn\.)?(.+)")
_OF_THE_BRANCH = re.compile(r".*vision_branch_.*|(mask_token|learnable_pos_emb|vision_head|bifrost)\b.*")
# Published prefix -> stock transformers 5.
_MLLM = {
    "vision_language_model.visual.": "model.visual.",
    "vision_language_model.model.": "model.language_model.",
    "vision_language_model.lm_head.": "lm_head.",
}
# Published prefix -> ours; every other name of a published ControlNet is diffusers' own and stays.
_CONTROLNET = {
    "up_sampling_block.": "controlnet_x_embedder.",
    "controlnet_x_embedder.": "controlnet_x_embedder.proj.",
}
_IGNORED = ("vision_gen_vae_model.", "diffusion_decoder.")


@dataclass(frozen=True)
class Names:
    """The names of a published checkpoint, sorted: of the branch and the MLLM, to ours and stock transformers 5's; of
    models that are not used; of no known model; and named like the branch's, which has no such tensor."""

    branch: dict[str, str] = field(default_factory=dict)
    mllm: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def branch_name(published: str) -> str | None:
    """The `VisualBranch` state-dict key of a published tensor name; None if it is not of the branch."""
    if match := _PUBLISHED_LAYER.fullmatch(published):
        layer, attention, rest = match.groups()
        ours = f"decoder.{layer}{attention or ''}{rest}"
    else:
        ours = _BRANCH.get(published, published.removeprefix(OWN))
    return ours if published_name(ours) == published else None


def published_name(ours: str) -> str:
    """The published name of a `VisualBranch` state-dict key."""
    if match := _OUR_LAYER.fullmatch(ours):
        layer, attention, rest = match.groups()
        return f"vision_language_model.model.{layer}{attention or ''}vision_branch_{rest}"
    return _TO_PUBLISHED.get(ours, OWN + ours)


def sort_names(names: Iterable[str]) -> Names:
    """Sort the tensor names of a published checkpoint; each ends in exactly one group."""
    result = Names()
    for name in names:
        if ours := branch_name(name):
            result.branch[name] = ours
        elif _OF_THE_BRANCH.fullmatch(name):
            result.unexpected.append(name)
        elif (ours := _renamed(name, _MLLM)) != name:
            result.mllm[name] = ours
        else:
            (result.ignored if name.startswith(_IGNORED) else result.unknown).append(name)
    return result


def public_name(name: str) -> str:
    """A model's name as strangers may read it: `builtin:`, `open_clip:` and hub names as they are, else the last part.

    A local folder's path names users and machines, so of a path only the last part leaves the machine.
    """
    prefix, _, rest = name.rpartition(":")
    if Path(rest).exists() or not HUB_ID.fullmatch(rest):
        rest = Path(rest).name
    prefix = prefix.removesuffix(":local-dir")
    return f"{prefix}:{rest}" if prefix.startswith(("builtin", "open_clip")) else rest


def from_published(weights: Mapping[str, T]) -> dict[str, T]:
    """The published `flux_controlnet/` state dict under our names (same tensors, nothing dropped)."""
    return {_renamed(name, _CONTROLNET): tensor for name, tensor in weights.items()}


def to_published(weights: Mapping[str, T]) -> dict[str, T]:
    """The inverse of `from_published`."""
    # The other way round: our name of the projection begins with our name of the upsampler.
    names = {ours: published for published, ours in reversed(_CONTROLNET.items())}
    return {_renamed(name, names): tensor for name, tensor in weights.items()}


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
