"""The published checkpoint's names and ours: one table, used by `bifrost import`, `bifrost export` and the vectors.

In: names, or a state dict, as published. Out: the same sorted by where they belong, under our names, and back. What the
published code has no name for (normalised latents, the flow head, latents of another encoder) is called `bifrost.` and
our name. Nothing is loaded, built or guessed here. The published layout is one of Qwen2.5-VL and FLUX.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

OWN = "bifrost."
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
_MLLM = (
    ("vision_language_model.visual.", "model.visual."),
    ("vision_language_model.model.", "model.language_model."),
    ("vision_language_model.lm_head.", "lm_head."),
)
IGNORED = ("vision_gen_vae_model.", "diffusion_decoder.")


@dataclass(frozen=True)
class Names:
    """Published name -> our (stock) name, for the branch and the frozen MLLM; `ignored` is of parts that are not used,
    `unknown` of none. `strangers` look like the branch's, and the branch has no such weight."""

    branch: dict[str, str] = field(default_factory=dict)
    mllm: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Published:
    """`branch` and `mllm` under our (stock) names; `ignored` is of parts that are not used, `unknown` of none."""

    branch: dict[str, Tensor]
    mllm: dict[str, Tensor]
    ignored: tuple[str, ...]
    unknown: tuple[str, ...]


def branch_name(published: str) -> str | None:
    """Our name of a published branch weight (a `VisualBranch` state-dict key), or None if it is no branch weight."""
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


def mllm_name(published: str) -> str | None:
    """The stock transformers 5 name of a published MLLM weight, or None if it is no MLLM weight."""
    for old, new in _MLLM:
        if published.startswith(old):
            return new + published.removeprefix(old)
    return None


def sort_names(names: Iterable[str]) -> Names:
    """Every name of a published checkpoint, at the one place where it belongs."""
    found = Names()
    for name in names:
        if ours := branch_name(name):
            found.branch[name] = ours
        elif _OF_THE_BRANCH.fullmatch(name):
            found.strangers.append(name)
        elif ours := mllm_name(name):
            found.mllm[name] = ours
        else:
            (found.ignored if name.startswith(IGNORED) else found.unknown).append(name)
    return found


def split_published(weights: Mapping[str, Tensor]) -> Published:
    """Sorts a published state dict. Be strict with `branch` when loading; the base model fills what `mllm` lacks."""
    names = sort_names(weights)
    branch, mllm = ({ours: weights[name] for name, ours in part.items()} for part in (names.branch, names.mllm))
    return Published(branch, mllm, tuple(names.ignored), (*names.unknown, *names.strangers))
