"""`bifrost export`: a branch or a ControlNet artifact becomes a folder of plain safetensors that other programs read.

The folder holds the weights under the published names, config.json, and the model card as README.md; a branch has the
index file that the published loader opens, too. A branch with its ControlNet in `flux_controlnet/` below it is the
published layout (Qwen2.5-VL and FLUX), which `bifrost import` reads back to the bit. Of names only public ones are
written: no folder of this machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from torch import Tensor

from bifrost_cli.artifacts import Artifact, default_path, resolve
from bifrost_cli.artifacts.files import make_folder, new_folder, read_json, write_bytes, write_json
from bifrost_cli.artifacts.manifest import require_new
from bifrost_cli.data.safetensors_io import load_tensors, save_tensors
from bifrost_cli.data.sharded_checkpoint import INDEX
from bifrost_cli.errors import ArtifactError, UsageError
from bifrost_cli.interop.model_card import model_card
from bifrost_cli.interop.published_names import public_name, published_name, to_published
from bifrost_cli.loading.compatibility import has_own_conditioner, trained_on
from bifrost_cli.loading.resolve import builtin
from bifrost_cli.runtime.ui import Ui

_BUILTIN = ("builtin:branch", "builtin:controlnet")
_DECODER = "qwen2_5_vl_text"
WEIGHTS = "model.safetensors"


def export(
    ref: Path | str, *, output: Path | str | None = None, workspace: Path | str = "runs", ui: Ui | None = None
) -> Path:
    """Write a branch or ControlNet artifact into a new folder, which appears whole or not at all.

    Args:
        ref: an artifact's folder or id, `builtin:branch` or `builtin:controlnet`.
        output: the new folder; None names it after the artifact, in `workspace`.
        workspace: where ids are looked up.
        ui: where progress is said.

    Returns:
        The folder.

    Raises:
        UsageError: the folder exists or lies in the artifact, or the artifact is of another kind.
        ArtifactError: a damaged artifact, or one of other models than the published layout has.
    """
    ui = ui or Ui()
    artifact = builtin(str(ref).removeprefix("builtin:")) if str(ref) in _BUILTIN else resolve(workspace, ref)
    if artifact.kind not in _WRITERS:
        raise UsageError(f"{artifact.path} is a {artifact.kind} artifact; a branch or a ControlNet can be exported",
                         fix="give one: bifrost artifacts ls")  # fmt: skip
    folder = Path(output or default_path(workspace, "export", artifact.id))
    require_new(folder)
    artifact.check()
    config, tensors = read_json(artifact.file("config.json")), load_tensors(artifact.file(WEIGHTS))[0]
    make_folder(folder.parent)
    with new_folder(folder) as draft:
        _WRITERS[artifact.kind](draft, artifact, config, tensors)
        write_bytes(draft / "README.md", model_card(artifact).encode())
    _say_next(artifact, folder, ui)
    return folder


def _write_branch(folder: Path, artifact: Artifact, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    if has_own_conditioner(artifact):
        raise ArtifactError(
            f"{artifact.path} holds learned queries and their control, which no published layout has",
            fix="use it where it is: its model.safetensors is plain safetensors",
            code="BF-ART-009",
        )
    if config.get("text_config", {}).get("model_type") != _DECODER:
        raise _other_models(artifact, "Qwen2.5-VL")
    if "tune" in config:
        raise ArtifactError(f"{artifact.path} was trained in part ({config['tune']}): it holds no whole branch",
                            fix="use it where it is, or train with branch.tune full", code="BF-ART-004")  # fmt: skip
    published = {published_name(name): tensor for name, tensor in tensors.items()}
    save_tensors(folder / WEIGHTS, published)
    size = sum(tensor.nbytes for tensor in published.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(published, WEIGHTS)}
    write_json(folder / f"model{INDEX}", index)
    write_json(folder / "config.json", {"branch": config, "trained_on": _trained_on(artifact)})


def _write_controlnet(folder: Path, artifact: Artifact, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    stock = {name: value for name, value in config.items() if name != "control_channels"}
    if unpublished := {"control", "control_ratio"} & set(config):
        raise ArtifactError(f"{artifact.path} has no ControlNet of the published form: {config[unpublished.pop()]}",
                            fix=f"use it where it is: its model.safetensors is plain safetensors ({artifact.path})",
                            code="BF-ART-009")  # fmt: skip
    if "num_single_layers" not in stock:
        raise _other_models(artifact, "FLUX")
    names = {"_class_name": "FluxControlNetModel", "_diffusers_version": diffusers.__version__}
    save_tensors(folder / "diffusion_pytorch_model.safetensors", to_published(dict(tensors)))
    write_json(folder / "config.json", {**names, **stock})


_WRITERS = {"branch": _write_branch, "controlnet": _write_controlnet}


def _trained_on(artifact: Artifact) -> dict[str, Any]:
    """The identities of the encoder and the MLLM that the branch needs, by public names and hashes."""
    shared = trained_on(artifact)
    encoder = {**shared["encoder"], "name": public_name(str(shared["encoder"].get("name", "unknown")))}
    return {**shared, "encoder": encoder, "mllm": artifact.identity.get("mllm")}


def _other_models(artifact: Artifact, wanted: str) -> ArtifactError:
    return ArtifactError(f"{artifact.path} is not of {wanted}: the published layout has no names for its weights",
                         fix=f"use it where it is: its model.safetensors is plain safetensors ({artifact.path})",
                         code="BF-ART-009")  # fmt: skip


def _say_next(artifact: Artifact, folder: Path, ui: Ui) -> None:
    if artifact.kind == "branch":
        ui.say(f"{folder}: the branch; its ControlNet goes beside it: bifrost export REF -o {folder}/flux_controlnet")
    else:
        ui.say(f"{folder}: a diffusers folder; called flux_controlnet beside a branch, bifrost import reads both")
