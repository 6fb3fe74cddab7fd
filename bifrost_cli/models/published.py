"""The published checkpoint's names and ours: one table, used by `bifrost import` and by the parity vectors.

In: a state dict with published names. Out: the same tensors sorted by where they belong, under our names. Nothing is
loaded, built or guessed here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

_PUBLISHED_BRANCH = {
    "mask_token": "mask_token",
    "learnable_pos_emb": "position_embedding",
    "vision_head.weight": "vision_head.weight",
    "vision_head.bias": "vision_head.bias",
    "vision_language_model.model.vision_branch_norm.weight": "decoder.norm.weight",
}
_LAYER = re.compile(r"vision_language_model\.model\.(layers\.\d+\.)(self_attn\.)?vision_branch_(.+)")
_MLLM = (
    ("vision_language_model.visual.", "model.visual."),
    ("vision_language_model.model.", "model.language_model."),
    ("vision_language_model.lm_head.", "lm_head."),
)
IGNORED = ("vision_gen_vae_model.", "diffusion_decoder.")


@dataclass(frozen=True)
class Published:
    """`branch` and `mllm` under our (stock) names; `ignored` is of parts that are not used, `unknown` of none."""

    branch: dict[str, Tensor]
    mllm: dict[str, Tensor]
    ignored: tuple[str, ...]
    unknown: tuple[str, ...]


def branch_name(published: str) -> str | None:
    """Our name of a published branch weight (a `VisualBranch` state-dict key), or None if it is no branch weight."""
    if match := _LAYER.fullmatch(published):
        layer, attention, rest = match.groups()
        return f"decoder.{layer}{attention or ''}{rest}"
    return _PUBLISHED_BRANCH.get(published)


def mllm_name(published: str) -> str | None:
    """The stock transformers 5 name of a published MLLM weight, or None if it is no MLLM weight."""
    for old, new in _MLLM:
        if published.startswith(old):
            return new + published.removeprefix(old)
    return None


def split_published(weights: Mapping[str, Tensor]) -> Published:
    """Sorts a published checkpoint. Be strict with `branch` when loading; the base model fills what `mllm` lacks."""
    branch: dict[str, Tensor] = {}
    mllm: dict[str, Tensor] = {}
    ignored, unknown = [], []
    for name, tensor in weights.items():
        if ours := branch_name(name):
            branch[ours] = tensor
        elif ours := mllm_name(name):
            mllm[ours] = tensor
        else:
            (ignored if name.startswith(IGNORED) else unknown).append(name)
    return Published(branch, mllm, tuple(ignored), tuple(unknown))
