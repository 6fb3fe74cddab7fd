"""The two parts of a published checkpoint, held against the frozen bases that the recipe names.

The MLLM is loaded once: for the identities that `generate` compares, and to compare the checkpoint's own copies of its
weights, which are never used. A part is its tensors under our names, its config, its identity, and what became of each
key. Nothing is written here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

from bifrost_cli.artifacts.files import read_json
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.safetensors_io import misfits, shapes_of, weights_hash
from bifrost_cli.data.sharded_checkpoint import ShardedCheckpoint, few
from bifrost_cli.errors import ArtifactError, EnvironmentProblem
from bifrost_cli.interop.published_names import (
    OWN,
    Names,
    config_from_published,
    from_published,
    published_name,
    to_published,
)
from bifrost_cli.loading.loaders import ModelLoader
from bifrost_cli.models.branch.visual_branch import VisualBranch
from bifrost_cli.models.diffusion.controlnet import (
    controlnet_config,
    controlnet_from_config,
)
from bifrost_cli.models.diffusion.flux import FluxModel
from bifrost_cli.models.mllm.frozen_mllm import Mllm
from bifrost_cli.runtime.ui import Ui

_WIDTHS = {  # of the two sizes that the published code handles
    3584: ": --recipe bifrost1-7b",
    2048: ": --recipe bifrost1-7b --set models.mllm=Qwen/Qwen2.5-VL-3B-Instruct",
}
_VOCABULARY = ("model.language_model.embed_tokens.weight", "lm_head.weight")
CONTROLNET = "flux_controlnet"
_BLOCKS = {"num_layers": "transformer_blocks", "num_single_layers": "single_transformer_blocks"}


@dataclass(frozen=True)
class ImportedPart:
    """A branch or a ControlNet, ready to be written."""

    kind: str
    identity: dict[str, Any]
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    report: dict[str, Any]


# ---- the frozen MLLM -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """What the parts need of the frozen MLLM.

    Attributes:
        mllm: sha256 of its weights.
        text_config: the config of its decoder, whose form the branch has.
        latents: identity, grid and channels of the encoder.
        frozen: names of the checkpoint's copies of its weights, by how they compare with it.
    """

    mllm: str
    text_config: Any
    latents: dict[str, Any]
    frozen: dict[str, list[str]]


def load_base(recipe: Recipe, root: ShardedCheckpoint | None, names: Names, ui: Ui) -> Base:
    """Load the recipe's MLLM, compare the checkpoint's copies of its weights, and release it.

    Raises:
        ArtifactError: BF-ART-007 an MLLM of another width, BF-ART-004 copies that differ.
        EnvironmentProblem: the MLLM is not here.
    """
    models = recipe.models
    ui.say(f"base: {models.mllm}; what is imported is tied to the weights it will be used with")
    loader = ModelLoader(models)
    mllm = loader.mllm()
    if mllm.model.config.model_type != "qwen2_5_vl":
        raise _other_family(models.mllm, "Qwen2.5-VL")
    if root:
        _require_width(root, mllm, models.mllm)
    encoder = loader.encoder(recipe.latents, recipe.images, mllm=mllm)
    latents = {"encoder": encoder.identity, "grid": list(encoder.grid), "channels": encoder.channels}
    frozen = _compare(names.mllm, root, mllm.model.state_dict(), ui) if root else {}
    if different := frozen.get("different"):
        raise ArtifactError(
            f"{len(different)} frozen weights of the checkpoint are not those of {models.mllm}",
            at=few(different),
            fix="name the MLLM that the checkpoint was trained with: --set models.mllm=FOLDER",
            code="BF-ART-004",
        )
    return Base(mllm.weights_hash(), mllm.text_config, latents, frozen)


def _compare(
    names: Mapping[str, str], root: ShardedCheckpoint, state: Mapping[str, Tensor], ui: Ui
) -> dict[str, list[str]]:
    """The published names of the copies, sorted by how they compare with the base's `state`; one tensor at a time.

    Generating does not read the output layer: where it differs, the report says so and nothing stops.
    """
    result: dict[str, list[str]] = {"equal": [], "different": [], "different but unread": [], "unknown": []}
    with ui.progress(len(names), "frozen weights compared") as bar:
        for published, ours in names.items():
            if ours not in state:
                verdict = "unknown"
            elif _same(ours, root.load([published])[published], state[ours]):
                verdict = "equal"
            else:
                verdict = "different but unread" if ours.startswith("lm_head.") else "different"
            result[verdict].append(published)
            bar.advance(1)
    return {**result, "the base's own": sorted(state.keys() - set(names.values()))}


def _same(name: str, copy: Tensor, base: Tensor) -> bool:
    """Equality in the base's number format; of a resized vocabulary, of the rows that both have."""
    if name in _VOCABULARY:
        rows = min(len(copy), len(base))
        copy, base = copy[:rows], base[:rows]
    return copy.shape == base.shape and torch.equal(copy.to(base.dtype), base)


def _other_family(name: str, wanted: str) -> ArtifactError:
    return ArtifactError(f"{name} is not of {wanted}, which the published layout is for", code="BF-ART-009",
                         fix="give a recipe of a Qwen2.5-VL and a FLUX: --recipe bifrost1-7b")  # fmt: skip


def _require_width(root: ShardedCheckpoint, mllm: Mllm, name: str) -> None:
    """Fail on an MLLM of another size by its width, before listing a hundred misshapen tensors."""
    token = root.shapes.get("mask_token", (mllm.width,))
    if token and token[-1] != mllm.width:
        raise ArtifactError(
            f"the checkpoint is for an MLLM of width {token[-1]}; {name} has width {mllm.width}",
            at=f"mask_token is {token}",
            fix=f"give the recipe of an MLLM of width {token[-1]}" + _WIDTHS.get(token[-1], ""),
            code="BF-ART-007",
        )


# ---- the branch ------------------------------------------------------------------------------------------------------


def branch_part(recipe: Recipe, root: ShardedCheckpoint, names: Names, base: Base) -> ImportedPart:
    """The checkpoint's branch. ArtifactError BF-ART-007 names every missing, unexpected or misshapen key."""
    patches = base.latents["grid"][0] * base.latents["grid"][1]
    _require_positions(recipe, root, patches)
    own = {name.removeprefix(OWN + "vision_head.") for name in names.branch if name.startswith(OWN + "vision_head.")}
    head = "codebook" if "codes_KC" in own else "flow" if own else "linear"
    codes = root.shapes[OWN + "vision_head.codes_KC"][0] if head == "codebook" else None
    normalize = OWN + "latents_mean_C" in names.branch
    with init_empty_weights():
        branch = VisualBranch(
            base.text_config, patches, base.latents["channels"], head=head, codes=codes, normalize=normalize
        )
    wanted = {published_name(name): shape for name, shape in shapes_of(branch.state_dict()).items()}
    present = {name: root.shapes[name] for name in (*names.branch, *names.unexpected)}
    _require_fit(misfits(wanted, present), f"the branch in {root.folder} does not fit {recipe.models.mllm}")
    tensors = {names.branch[name]: tensor for name, tensor in root.load(names.branch).items()}
    identity = {**base.latents, "mllm": base.mllm, "imported": weights_hash(tensors)}
    report = {"imported": names.branch, "frozen": base.frozen, "ignored": names.ignored, "unknown": names.unknown}
    return ImportedPart("branch", identity, tensors, branch.config, report)


def _require_positions(recipe: Recipe, root: ShardedCheckpoint, patches: int) -> None:
    shape, size = root.shapes.get("learnable_pos_emb", ()), recipe.images.input_size
    if len(shape) == 3 and shape[1] != patches:
        raise ArtifactError(
            f"the checkpoint has {shape[1]} positions; images.input_size {size} makes {patches} patches",
            fix=f"--set images.input_size={round(size * (shape[1] / patches) ** 0.5)}",
            code="BF-ART-007",
        )


# ---- the ControlNet --------------------------------------------------------------------------------------------------


def controlnet_part(recipe: Recipe, shards: ShardedCheckpoint, base: Base) -> ImportedPart:
    """The checkpoint's ControlNet, as deep as its own config.json says.

    Raises:
        ArtifactError: BF-ART-007, which names every key that does not fit that config; BF-ART-004 for another FLUX.
        EnvironmentProblem: FLUX is not here.
    """
    published_config = _published_config(shards)
    config = config_from_published(published_config, base.latents["channels"])
    try:
        with init_empty_weights():
            controlnet = controlnet_from_config(config)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ArtifactError(f"{shards.folder / 'config.json'} makes no ControlNet: {error}", fix="fetch it again",
                            code="BF-ART-005") from error  # fmt: skip
    wanted = shapes_of(to_published(controlnet.state_dict()))
    _require_fit(misfits(wanted, shards.shapes), f"the ControlNet in {shards.folder} does not fit its config.json and "
                 f"{recipe.models.mllm}")  # fmt: skip
    diffusion = _diffusion(recipe)
    _require_diffusion(config, diffusion, recipe.models.diffusion)
    tensors = from_published(shards.load(shards.shapes))
    identity = {**base.latents, "painter": diffusion.weights_hash(), "imported": weights_hash(tensors)}
    unused = {key: value for key, value in published_config.items() if key not in config and not key.startswith("_")}
    imported = {published: ours for ours, published in from_published({name: name for name in shards.shapes}).items()}
    report = {"imported": imported, "unused keys of config.json": unused}
    return ImportedPart("controlnet", identity, tensors, controlnet_config(controlnet), report)


def _published_config(shards: ShardedCheckpoint) -> dict[str, Any]:
    """config.json, which must name as many blocks as there are weights for; the published script builds others."""
    path = shards.folder / "config.json"
    config = read_json(path)
    if not isinstance(config, dict) or config.get("_class_name", "FluxControlNetModel") != "FluxControlNetModel":
        raise ArtifactError(f"{path} is not of a FLUX ControlNet", code="BF-ART-007",
                            fix="only the published layout can be imported: Qwen2.5-VL and FLUX")  # fmt: skip
    configured = {key: config.get(key) for key in _BLOCKS}
    present = {key: _blocks(shards, prefix) for key, prefix in _BLOCKS.items()}
    if configured != present:
        raise ArtifactError(f"{path} and the weights beside it are of two different ControlNets", code="BF-ART-007",
                            at=f"config.json: {_depth(configured)}\nweights: {_depth(present)}",
                            fix="give the config.json that these weights were saved with")  # fmt: skip
    return config


def _blocks(shards: ShardedCheckpoint, prefix: str) -> int:
    matches = (re.match(rf"{prefix}\.(\d+)\.", name) for name in shards.shapes)
    return len({match[1] for match in matches if match})


def _depth(blocks: dict[str, Any]) -> str:
    return " + ".join(f"{blocks[key]} {kind}" for key, kind in zip(_BLOCKS, ("double", "single"), strict=True))


def _diffusion(recipe: Recipe) -> FluxModel:
    models = recipe.models
    try:
        diffusion = ModelLoader(models).diffusion()
    except EnvironmentProblem as error:
        error.fix = f"{error.fix}; for the branch alone, give a folder without {CONTROLNET}/"
        raise
    if not isinstance(diffusion, FluxModel):
        raise _other_family(models.diffusion, "FLUX")
    return diffusion


def _require_diffusion(config: dict[str, Any], diffusion: FluxModel, name: str) -> None:
    """The sizes at which ControlNet and transformer meet."""
    flux = diffusion.transformer.config
    sides = [
        {
            "in_channels": side["in_channels"],
            "width": side["num_attention_heads"] * side["attention_head_dim"],
            "text width": side["joint_attention_dim"],
            "pooled text width": side["pooled_projection_dim"],
        }
        for side in (config, flux)
    ]
    if different := [f"{key} {sides[0][key]}, not {size}" for key, size in sides[1].items() if sides[0][key] != size]:
        raise ArtifactError(f"the ControlNet is of another FLUX than {name}", at="; ".join(different),
                            fix="name the FLUX that it was trained with: --set models.diffusion=FOLDER",
                            code="BF-ART-004")  # fmt: skip


# ---- both parts ------------------------------------------------------------------------------------------------------


def _require_fit(troubles: list[str], what: str) -> None:
    if troubles:
        raise ArtifactError(f"{what}: {len(troubles)} keys", at=few(troubles, "; "),
                            fix="fetch the checkpoint again, or give the recipe that it was made for",
                            code="BF-ART-007")  # fmt: skip
