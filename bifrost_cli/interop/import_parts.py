"""The two parts of a published checkpoint, held against the frozen bases that the recipe names.

In: headers and tensors of a checkpoint, a recipe, its `Base`. Out: `Part`s: tensors under our names, their config, the
identity that `generate` compares, and what became of each key. Writes nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor

from bifrost_cli.artifacts.files import read_json
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.safetensors_io import misfits, shapes_of, weights_hash
from bifrost_cli.data.sharded_checkpoint import ShardedCheckpoint, few
from bifrost_cli.errors import ArtifactError, EnvironmentProblem
from bifrost_cli.interop.import_base import Base, other_family
from bifrost_cli.interop.published_names import OWN, Names, published_name
from bifrost_cli.loading.loaders import ModelLoader
from bifrost_cli.models.branch.visual_branch import VisualBranch
from bifrost_cli.models.diffusion.controlnet import (
    config_from_published,
    controlnet_config,
    controlnet_from_config,
    from_published,
    to_published,
)
from bifrost_cli.models.diffusion.flux import FluxModel

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


# ---- the branch -----------------------------------------------------------------------------------------------------


def branch_part(recipe: Recipe, root: ShardedCheckpoint, names: Names, base: Base) -> ImportedPart:
    """The branch. ArtifactError BF-ART-007 naming every key that is missing, unexpected or misshapen."""
    patches = base.latents["grid"][0] * base.latents["grid"][1]
    _require_positions(recipe, root, patches)
    head = "flow" if any(name.startswith(OWN + "vision_head.") for name in names.branch) else "linear"
    normalize = OWN + "latents_mean_C" in names.branch
    with init_empty_weights():
        branch = VisualBranch(base.text_config, patches, base.latents["channels"], head=head, normalize=normalize)
    wanted = {published_name(name): shape for name, shape in shapes_of(branch.state_dict()).items()}
    found = {name: root.shapes[name] for name in (*names.branch, *names.strangers)}
    _require_fit(misfits(wanted, found), f"the branch in {root.folder} does not fit {recipe.models.mllm}")
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


# ---- the ControlNet -------------------------------------------------------------------------------------------------


def controlnet_part(recipe: Recipe, shards: ShardedCheckpoint, base: Base) -> ImportedPart:
    """The ControlNet, as deep as its own config.json says.

    ArtifactError BF-ART-007 naming every key that does not fit that config, BF-ART-004 for one of another FLUX. What
    `load_diffusion` raises when FLUX is not here.
    """
    written = _written(shards)
    config = config_from_published(written, base.latents["channels"])
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
    unused = {key: value for key, value in written.items() if key not in config and not key.startswith("_")}
    imported = {published: ours for ours, published in from_published({name: name for name in shards.shapes}).items()}
    report = {"imported": imported, "unused keys of config.json": unused}
    return ImportedPart("controlnet", identity, tensors, controlnet_config(controlnet), report)


def _written(shards: ShardedCheckpoint) -> dict[str, Any]:
    """config.json, which must tell of as many blocks as there are weights for: the published script builds others."""
    path = shards.folder / "config.json"
    config = read_json(path)
    if not isinstance(config, dict) or config.get("_class_name", "FluxControlNetModel") != "FluxControlNetModel":
        raise ArtifactError(f"{path} is not of a FLUX ControlNet", code="BF-ART-007",
                            fix="only the published layout can be imported: Qwen2.5-VL and FLUX")  # fmt: skip
    said = {key: config.get(key) for key in _BLOCKS}
    there = {key: _blocks(shards, prefix) for key, prefix in _BLOCKS.items()}
    if said != there:
        raise ArtifactError(f"{path} and the weights beside it do not tell of the same ControlNet", code="BF-ART-007",
                            at=f"config.json: {_depth(said)}\nweights: {_depth(there)}",
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
        raise other_family(models.diffusion, "FLUX")
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


# ---- both -----------------------------------------------------------------------------------------------------------


def _require_fit(troubles: list[str], what: str) -> None:
    if troubles:
        raise ArtifactError(f"{what}: {len(troubles)} keys", at=few(troubles, "; "),
                            fix="fetch the checkpoint again, or give the recipe that it was made for",
                            code="BF-ART-007")  # fmt: skip
