"""export: a branch or a ControlNet artifact -> a folder of plain safetensors that others read.

In: an artifact. Out: a new folder: weights under the published names, config.json, and README.md, the model card. A
branch with its ControlNet in `flux_controlnet` below it is the published layout, which import reads back to the bit.
Knows Qwen2.5-VL and FLUX alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from torch import Tensor

from bifrost_cli.artifacts import Artifact, default_path, resolve
from bifrost_cli.artifacts.files import make_folder, new_folder, read_json, write_bytes, write_json
from bifrost_cli.data.safetensors_io import load_tensors, save_tensors
from bifrost_cli.errors import ArtifactError, UsageError
from bifrost_cli.interop.model_card import model_card
from bifrost_cli.interop.published_names import published_name
from bifrost_cli.loading.compatibility import builtin, has_own_conditioner, trained_on
from bifrost_cli.models.diffusion.controlnet import to_published
from bifrost_cli.runtime.ui import Ui

_BUILTIN = ("builtin:branch", "builtin:controlnet")
_DECODER = "qwen2_5_vl_text"


def export(
    ref: Path | str, *, output: Path | str | None = None, workspace: Path | str = "runs", ui: Ui | None = None
) -> Path:
    """Write the artifact that `ref` means (a folder, an id, builtin:branch, builtin:controlnet) into a new folder.

    The folder appears whole or not at all. UsageError (2): it exists, lies in the artifact, or `ref` is of another
    kind. ArtifactError (5): a damaged artifact, or one of other models than the published layout has.
    """
    ui = ui or Ui()
    artifact = builtin(str(ref).removeprefix("builtin:")) if str(ref) in _BUILTIN else resolve(workspace, ref)
    if artifact.kind not in _WRITERS:
        raise UsageError(f"{artifact.path} is a {artifact.kind} artifact; a branch or a ControlNet can be exported",
                         fix="give one: bifrost artifacts ls")  # fmt: skip
    folder = Path(output or default_path(workspace, "export", artifact.id))
    _require_new(folder, artifact)
    artifact.check()
    config, tensors = read_json(artifact.file("config.json")), load_tensors(artifact.file("model.safetensors"))[0]
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
    save_tensors(folder / "model.safetensors", {published_name(name): tensor for name, tensor in tensors.items()})
    write_json(folder / "config.json", {"branch": config, "trained_on": _trained_on(artifact)})


def _write_controlnet(folder: Path, artifact: Artifact, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    stock = {name: value for name, value in config.items() if name != "control_channels"}
    if strange := {"control", "control_ratio"} & set(config):
        raise ArtifactError(f"{artifact.path} is no ControlNet of the published form: {config[strange.pop()]}",
                            fix=f"use it where it is: its model.safetensors is plain safetensors ({artifact.path})",
                            code="BF-ART-009")  # fmt: skip
    if "num_single_layers" not in stock:
        raise _other_models(artifact, "FLUX")
    names = {"_class_name": "FluxControlNetModel", "_diffusers_version": diffusers.__version__}
    save_tensors(folder / "diffusion_pytorch_model.safetensors", to_published(dict(tensors)))
    write_json(folder / "config.json", {**names, **stock})


_WRITERS = {"branch": _write_branch, "controlnet": _write_controlnet}


def _trained_on(artifact: Artifact) -> dict[str, Any]:
    """The identity of the latents and the MLLM: what a reader of the file must have, too."""
    return {**trained_on(artifact), "mllm": artifact.identity.get("mllm")}


def _require_new(folder: Path, artifact: Artifact) -> None:
    if folder.exists() or folder.is_symlink():
        raise UsageError(f"{folder} exists already", fix="choose another place with -o", code="BF-USE-002")
    if artifact.path.resolve() in folder.resolve().parents:
        raise UsageError(f"{folder} lies inside the artifact {artifact.path}", fix="choose another place with -o")


def _other_models(artifact: Artifact, wanted: str) -> ArtifactError:
    return ArtifactError(f"{artifact.path} is not of {wanted}: the published layout has no names for its weights",
                         fix=f"use it where it is: its model.safetensors is plain safetensors ({artifact.path})",
                         code="BF-ART-009")  # fmt: skip


def _say_next(artifact: Artifact, folder: Path, ui: Ui) -> None:
    if artifact.kind == "branch":
        ui.say(f"{folder}: the branch; its ControlNet goes beside it: bifrost export REF -o {folder}/flux_controlnet")
    else:
        ui.say(f"{folder}: a diffusers folder; called flux_controlnet beside a branch, bifrost import reads both")
