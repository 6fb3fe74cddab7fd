"""`bifrost export` and `bifrost export-mllm`: folders that other programs read; no name of a local folder is in them.

A branch or a ControlNet becomes plain safetensors under the published names, config.json, and the model card. A branch
with its ControlNet in `flux_controlnet/` below it is the published layout (Qwen2.5-VL and FLUX), which `bifrost import`
reads back to the bit. The frozen MLLM is copied byte for byte: what generates and what is measured have one hash.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
from torch import Tensor

from bifrost_cli.artifacts import Artifact, default_path, resolve
from bifrost_cli.artifacts.files import make_folder, new_file, new_folder, read_json, write_bytes, write_json
from bifrost_cli.artifacts.manifest import require_new
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.safetensors_io import INDEX, load_tensors, save_tensors
from bifrost_cli.errors import ArtifactError, UsageError
from bifrost_cli.interop.model_card import model_card
from bifrost_cli.interop.published_names import public_name, published_name, to_published
from bifrost_cli.loading.compatibility import has_own_conditioner, trained_on
from bifrost_cli.loading.loaders import ModelLoader
from bifrost_cli.loading.resolve import MODEL_FILES, resolve_model
from bifrost_cli.runtime.ui import Ui

WEIGHTS = "model.safetensors"
_BLOCK = 16 * 2**20


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
    ui, artifact = ui or Ui(), resolve(workspace, ref)
    if artifact.kind not in ("branch", "controlnet"):
        raise UsageError(f"{artifact.path} is a {artifact.kind} artifact; a branch or a ControlNet can be exported",
                         fix="give one: bifrost artifacts ls")  # fmt: skip
    folder = Path(output or default_path(workspace, "export", artifact.id))
    require_new(folder)
    artifact.check()
    config, tensors = read_json(artifact.file("config.json")), load_tensors(artifact.file(WEIGHTS))[0]
    make_folder(folder.parent)
    with new_folder(folder) as draft:
        (_write_branch if artifact.kind == "branch" else _write_controlnet)(draft, artifact, config, tensors)
        write_bytes(draft / "README.md", model_card(artifact).encode())
    if artifact.kind == "branch":
        ui.say(f"{folder}: the branch; its ControlNet goes beside it: bifrost export REF -o {folder}/flux_controlnet")
    else:
        ui.say(f"{folder}: a diffusers folder; called flux_controlnet beside a branch, bifrost import reads both")
    return folder


def export_mllm(recipe: Recipe, output: Path | str, *, ui: Ui | None = None) -> Path:
    """Copy the recipe's frozen MLLM into a new folder, load the copy and compare the hashes of the weights.

    Raises:
        UsageError: the folder exists.
        EnvironmentProblem, ArtifactError: the model is not here, is damaged, or its copy has another hash.
    """
    ui, folder, models = ui or Ui(), Path(output), recipe.models
    require_new(folder)
    base = ModelLoader(models).mllm()
    kind, wanted = base.model.config.model_type, base.weights_hash()
    del base  # the copy is loaded next, and there may be room for one
    source = Path(resolve_model(models.mllm, revision=models.mllm_revision))
    make_folder(folder.parent)
    with new_folder(folder) as draft:
        for path in sorted({path for pattern in MODEL_FILES for path in source.glob(pattern)}):
            with new_file(draft / path.name, path.stat().st_size) as write:
                for block in _blocks(path):
                    write(block)
        copy = models.model_copy(update={"mllm": str(draft), "mllm_revision": None})
        if (actual := ModelLoader(copy).mllm().weights_hash()) != wanted:
            at = f"sha256 {wanted[:12]} -> {actual[:12]}"
            raise ArtifactError(f"the copy of {models.mllm} has other weights", at=at, code="BF-ART-008",
                                fix="give the command again; if it stays, check the disk")  # fmt: skip
        write_bytes(draft / "README.md", _card(recipe, folder.name, kind, wanted).encode())
    ui.say(f"{folder}: the MLLM as it is, weights {wanted[:12]}; {_command(str(folder), kind)}")
    return folder


def _write_branch(folder: Path, artifact: Artifact, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    if has_own_conditioner(artifact):
        raise _refused(f"{artifact.path} holds learned queries and their control, which no published layout has")
    if config.get("text_config", {}).get("model_type") != "qwen2_5_vl_text":
        raise _other_models(artifact, "Qwen2.5-VL")
    if "tune" in config:
        raise ArtifactError(f"{artifact.path} was trained in part ({config['tune']}): it holds no whole branch",
                            fix="use it where it is, or train with branch.tune full", code="BF-ART-004")  # fmt: skip
    published = {published_name(name): tensor for name, tensor in tensors.items()}
    save_tensors(folder / WEIGHTS, published)
    size = sum(tensor.nbytes for tensor in published.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(published, WEIGHTS)}
    write_json(folder / f"model{INDEX}", index)
    shared = trained_on(artifact)  # by public names and hashes
    encoder = {**shared["encoder"], "name": public_name(str(shared["encoder"].get("name", "unknown")))}
    bases = {**shared, "encoder": encoder, "mllm": artifact.identity.get("mllm")}
    write_json(folder / "config.json", {"branch": config, "trained_on": bases})


def _write_controlnet(folder: Path, artifact: Artifact, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    stock = {name: value for name, value in config.items() if name != "control_channels"}
    if unpublished := {"control", "control_ratio"} & set(config):
        said = f"{artifact.path} has no ControlNet of the published form: {config[unpublished.pop()]}"
        raise _refused(said, f" ({artifact.path})")
    if "num_single_layers" not in stock:
        raise _other_models(artifact, "FLUX")
    names = {"_class_name": "FluxControlNetModel", "_diffusers_version": diffusers.__version__}
    save_tensors(folder / "diffusion_pytorch_model.safetensors", to_published(tensors))
    write_json(folder / "config.json", {**names, **stock})


def _other_models(artifact: Artifact, wanted: str) -> ArtifactError:
    said = f"{artifact.path} is not of {wanted}: the published layout has no names for its weights"
    return _refused(said, f" ({artifact.path})")


def _refused(message: str, where: str = "") -> ArtifactError:
    fix = f"use it where it is: its model.safetensors is plain safetensors{where}"
    return ArtifactError(message, fix=fix, code="BF-ART-009")


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


def _command(folder: str, kind: str) -> str:
    model = kind if kind in ("qwen2_5_vl", "qwen3_vl") else "llava_hf"  # lmms-eval has one for all LLaVAs
    return f"python -m lmms_eval --model {model} --model_args pretrained={folder} --tasks mme --batch_size 1"


def _card(recipe: Recipe, folder: str, kind: str, weights: str) -> str:
    name, commit = public_name(recipe.models.mllm), recipe.models.mllm_revision
    revision = f" at revision {commit}" if commit else ""
    return f"""# The frozen MLLM of recipe {recipe.name}

These are the files of {name}{revision}, byte for byte; Bifrost trains a branch beside this model and
never changes it. sha256 over its tensors in {recipe.models.dtype}: `{weights}`. The manifest of every branch that was
trained beside it names the same hash (`bifrost artifacts show BRANCH`, identity.mllm).

Its understanding, measured by lmms-eval (a package of its own environment):

```sh
{_command(folder, kind)}
```

The licence is that of the base model.
"""
