"""The frozen MLLM that an imported checkpoint is used with, and the checkpoint's own copies of its weights.

In: a recipe, headers and names of a checkpoint. Out: a `Base`: the identities that `generate` compares, and how each
copy compares with the base. The MLLM is let go again. Copies are never used: the base is what is loaded to generate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.sharded_checkpoint import ShardedCheckpoint, few
from bifrost_cli.errors import ArtifactError
from bifrost_cli.interop.published_names import Names
from bifrost_cli.loading.loaders import ModelLoader
from bifrost_cli.models.encoders import MllmEncoder
from bifrost_cli.models.mllm.frozen_mllm import Mllm
from bifrost_cli.runtime.ui import Ui

_WIDTHS = {  # of the two sizes that the published code handles
    3584: ": --recipe bifrost1-7b",
    2048: ": --recipe bifrost1-7b --set models.mllm=Qwen/Qwen2.5-VL-3B-Instruct",
}
_VOCABULARY = ("model.language_model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Base:
    """What the frozen MLLM says of the parts: its weights' hash, its decoder's form, the latents of the encoder, and
    the names of its weights by how the checkpoint's copies compare."""

    mllm: str
    text_config: Any
    latents: dict[str, Any]
    frozen: dict[str, list[str]]


def load_base(recipe: Recipe, root: ShardedCheckpoint | None, names: Names, ui: Ui) -> Base:
    """Load the recipe's MLLM, compare the copies, and let it go.

    ArtifactError BF-ART-007: an MLLM of another width; BF-ART-004: copies that differ. What `load_mllm` raises when the
    base is not here.
    """
    models = recipe.models
    ui.say(f"base: {models.mllm}; what is imported is tied to the weights it will be used with")
    loader = ModelLoader(models)
    mllm = loader.mllm()
    if mllm.model.config.model_type != "qwen2_5_vl":
        raise other_family(models.mllm, "Qwen2.5-VL")
    if root:
        _require_width(root, mllm, models.mllm)
    own = recipe.latents.encoder == "mllm"
    encoder = MllmEncoder(mllm, recipe.images.input_size) if own else loader.encoder(recipe.latents, recipe.images)
    latents = {"encoder": encoder.identity, "grid": list(encoder.grid), "channels": encoder.channels}
    frozen = compared(names.mllm, root, mllm.model.state_dict(), ui) if root else {}
    if different := frozen.get("different"):
        raise ArtifactError(
            f"{len(different)} frozen weights of the checkpoint are not those of {models.mllm}",
            at=few(different),
            fix="name the MLLM that the checkpoint was trained with: --set models.mllm=FOLDER",
            code="BF-ART-004",
        )
    return Base(mllm.weights_hash(), mllm.text_config, latents, frozen)


def compared(
    names: Mapping[str, str], root: ShardedCheckpoint, state: Mapping[str, Tensor], ui: Ui
) -> dict[str, list[str]]:
    """The published names of the copies, sorted by how they compare with the base's `state`; one tensor at a time.

    The output layer is not read to generate: where it differs, that is told and stops nothing.
    """
    found: dict[str, list[str]] = {"equal": [], "different": [], "different but unread": [], "unknown": []}
    with ui.progress(len(names), "frozen weights compared") as bar:
        for published, ours in names.items():
            if ours not in state:
                verdict = "unknown"
            elif _same(ours, root.load([published])[published], state[ours]):
                verdict = "equal"
            else:
                verdict = "different but unread" if ours.startswith("lm_head.") else "different"
            found[verdict].append(published)
            bar.advance(1)
    return {**found, "the base's own": sorted(state.keys() - set(names.values()))}


def _same(name: str, copy: Tensor, base: Tensor) -> bool:
    """Equal in the base's number format; of a vocabulary that was made longer or shorter, the rows that both have."""
    if name in _VOCABULARY:
        rows = min(len(copy), len(base))
        copy, base = copy[:rows], base[:rows]
    return copy.shape == base.shape and torch.equal(copy.to(base.dtype), base)


def other_family(name: str, wanted: str) -> ArtifactError:
    """BF-ART-009: the published checkpoint is of one MLLM and one diffusion model."""
    return ArtifactError(f"{name} is not of {wanted}, which the published layout is for", code="BF-ART-009",
                         fix="give a recipe of a Qwen2.5-VL and a FLUX: --recipe bifrost1-7b")  # fmt: skip


def _require_width(root: ShardedCheckpoint, mllm: Mllm, name: str) -> None:
    """A checkpoint of the 3B model does not fit the 7B one: said before a hundred keys are."""
    token = root.shapes.get("mask_token", (mllm.width,))
    if token and token[-1] != mllm.width:
        raise ArtifactError(
            f"the checkpoint is for an MLLM of width {token[-1]}; {name} has width {mllm.width}",
            at=f"mask_token is {token}",
            fix=f"give the recipe of an MLLM of width {token[-1]}" + _WIDTHS.get(token[-1], ""),
            code="BF-ART-007",
        )
