"""`bifrost import`: a published Bifrost-1 checkpoint becomes a branch and a ControlNet artifact.

The layout (Qwen2.5-VL and FLUX) has safetensors at its root and a diffusers folder `flux_controlnet/`; either may be
missing. Everything is held against the frozen bases before anything is written; the report accounts for every key.
A trainer's files (training_args.bin, optimizer.pt ...) are listed and never opened.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from diffusers import FluxControlNetModel
from torch import Tensor

from bifrost_cli.artifacts import Artifact, Draft, default_path, identity_id
from bifrost_cli.artifacts.files import read_json, write_json
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.safetensors_io import (
    ShardedCheckpoint,
    few,
    misfits,
    save_tensors,
    shapes_of,
    trainer_files,
    weights_hash,
)
from bifrost_cli.errors import ArtifactError, EnvironmentProblem
from bifrost_cli.interop import published_names as published
from bifrost_cli.interop.published_names import OWN, Names
from bifrost_cli.loading.loaders import ModelLoader
from bifrost_cli.loading.resolve import resolve_model
from bifrost_cli.models.branch.visual_branch import VisualBranch
from bifrost_cli.models.diffusion.controlnet import controlnet_config, controlnet_from_config
from bifrost_cli.models.diffusion.flux import FluxModel
from bifrost_cli.runtime.ui import Ui

_FILES = ("*.json", "*.safetensors")
_SHOWN = 5
_WIDTHS = {  # of the two sizes that the published code handles
    3584: ": --recipe bifrost1-7b",
    2048: ": --recipe bifrost1-7b --set models.mllm=Qwen/Qwen2.5-VL-3B-Instruct",
}
_VOCABULARY = ("model.language_model.embed_tokens.weight", "lm_head.weight")
_CONTROLNET = "flux_controlnet"
_BLOCKS = {"num_layers": "transformer_blocks", "num_single_layers": "single_transformer_blocks"}


class _Base(NamedTuple):
    """What the parts need of the frozen MLLM: its hash; its decoder's config; identity, grid and channels of the
    encoder; and the names of the checkpoint's copies of its weights, by how they compare with it."""

    mllm: str
    text_config: Any
    latents: dict[str, Any]
    frozen: dict[str, list[str]]


class _Part(NamedTuple):
    """A branch or a ControlNet, ready to be written: tensors under our names, and what became of each key."""

    kind: str
    identity: dict[str, Any]
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    report: dict[str, Any]


def import_checkpoint(
    recipe: Recipe, source: Path | str, *, output: Path | str | None = None, workspace: Path | str = "runs",
    dry_run: bool = False, ui: Ui | None = None,
) -> list[Artifact] | dict[str, Any]:  # fmt: skip
    """Import what a published checkpoint holds: a branch, a ControlNet, or both.

    Args:
        recipe: names the frozen bases, which are loaded: an artifact's identity holds the hash of their weights.
        source: a folder or a hub id in the published layout.
        output: the folder that gets `branch/` and `controlnet/`; None names them in `workspace`.
        workspace: where artifacts are.
        dry_run: load and write nothing.
        ui: where progress is said.

    Returns:
        The artifacts; with `dry_run` every key, by where it would go.

    Raises:
        ArtifactError: BF-ART-005 a checkpoint that is not whole, BF-ART-007 weights that are missing, unexpected or
            misshapen, BF-ART-004 weights of other bases, BF-ART-008 a pickle.
        EnvironmentProblem: a base is not here.
    """
    ui = ui or Ui()
    folder = Path(resolve_model(str(source), patterns=_FILES))
    commit = None if Path(source).expanduser().is_dir() else folder.name
    root, controlnet, left = _open(folder, str(source), ui)
    names, ignored = published.sort_names(root.shapes if root else ()), {"ignored files": left} if left else {}
    if dry_run:
        parts = {"branch": names.branch, "controlnet": sorted(controlnet.shapes) if controlnet else []}
        others = {"unexpected": names.unexpected, "ignored": names.ignored, "unknown": names.unknown}
        return {**parts, "frozen MLLM": names.mllm, **others, **ignored}
    base = load_base(recipe, root, names, ui)
    made = [_branch(recipe, root, names, base)] if root else []
    made += [_controlnet(recipe, controlnet, base)] if controlnet else []
    info = {"source": str(source), "commit": commit, "recipe": recipe.model_dump(mode="json")}
    artifacts = []
    for part in made:
        place = Path(output) / part.kind if output is not None else None
        place = place or default_path(workspace, part.kind, identity_id(part.kind, part.identity))
        with Draft.open(place, part.kind, part.identity) as draft:
            if draft.complete:
                draft.complete.check()
                ui.say(f"{place} holds this {part.kind} already; it was verified")
                artifacts.append(draft.complete)
                continue
            save_tensors(draft.path / "model.safetensors", part.tensors, {"kind": part.kind})
            write_json(draft.path / "config.json", part.config)
            write_json(draft.path / "import.json", part.report | ignored)
            parameters = sum(tensor.numel() for tensor in part.tensors.values())
            artifacts.append(draft.commit({**info, "metrics": {}, "parameters": parameters}))
    if root:
        ui.say(f"branch: {len(names.branch)} keys imported")
        ui.say("frozen MLLM: " + ", ".join(f"{len(keys)} {what}" for what, keys in base.frozen.items()))
        ui.say(f"ignored: {len(names.ignored)} keys{_heads(names.ignored)}")
        ui.say(f"unknown: {len(names.unknown)} keys{_heads(names.unknown)}")
    if controlnet:
        ui.say(f"controlnet: {len(controlnet.shapes)} keys imported")
    if left:
        ui.say(f"ignored: {', '.join(left)}, which a trainer left and holds no weights")
    return artifacts


def _open(folder: Path, source: str, ui: Ui) -> tuple[ShardedCheckpoint | None, ShardedCheckpoint | None, list[str]]:
    """What the folder holds at its root and of a ControlNet, by the headers; and a trainer's files."""
    inner = folder / _CONTROLNET
    root, controlnet = ShardedCheckpoint.open(folder), ShardedCheckpoint.open(inner) if inner.is_dir() else None
    if root is None and controlnet is None:
        said = f"{source} holds no Bifrost checkpoint: no safetensors at its root and none in {_CONTROLNET}/"
        raise ArtifactError(said, fix="give the folder or hub id that holds them, such as hanlincs/Bifrost-1")
    for shards, what, other in ((root, "weights at the root", "ControlNet"), (controlnet, f"{_CONTROLNET}/", "branch")):
        if shards is None:
            ui.say(f"{source} has no {what}: the {other} alone is imported")
    theirs = [f"{_CONTROLNET}/{name}" for name in (trainer_files(inner) if controlnet else ())]
    return root, controlnet, trainer_files(folder) + theirs


def _heads(keys: list[str]) -> str:
    """The keys counted by their first part: `: diffusion_decoder (1040), vision_gen_vae_model (244)`."""
    heads = Counter(key.split(".")[0] for key in keys).most_common()
    more = [f"and {len(heads) - _SHOWN} others"] if len(heads) > _SHOWN else []
    return ": " + ", ".join([f"{head} ({count})" for head, count in heads[:_SHOWN]] + more) if heads else ""


def load_base(recipe: Recipe, root: ShardedCheckpoint | None, names: Names, ui: Ui) -> _Base:
    """Load the recipe's MLLM, compare the checkpoint's copies of its weights, and release it."""
    models, loader = recipe.models, ModelLoader(recipe.models)
    ui.say(f"base: {models.mllm}; what is imported is tied to the weights it will be used with")
    mllm, frozen = loader.mllm(), dict[str, list[str]]()
    if mllm.model.config.model_type != "qwen2_5_vl":
        raise _other_family(models.mllm, "Qwen2.5-VL")
    token = root.shapes.get("mask_token") if root else None
    if token and token[-1] != mllm.width:  # before a hundred misshapen tensors are listed
        said = f"the checkpoint is for an MLLM of width {token[-1]}; {models.mllm} has width {mllm.width}"
        fix = f"give the recipe of an MLLM of width {token[-1]}" + _WIDTHS.get(token[-1], "")
        raise ArtifactError(said, at=f"mask_token is {token}", fix=fix, code="BF-ART-007")
    encoder = loader.encoder(recipe.latents, recipe.images, mllm=mllm)
    latents = {"encoder": encoder.identity, "grid": list(encoder.grid), "channels": encoder.channels}
    if root:
        frozen = _compare(names.mllm, root, mllm.model.state_dict(), ui)
        if different := frozen["different"]:
            said = f"{len(different)} frozen weights of the checkpoint are not those of {models.mllm}"
            fix = "name the MLLM that the checkpoint was trained with: --set models.mllm=FOLDER"
            raise ArtifactError(said, at=few(different), fix=fix, code="BF-ART-004")
    return _Base(mllm.weights_hash(), mllm.text_config, latents, frozen)


def _compare(names: dict[str, str], root: ShardedCheckpoint, state: dict[str, Tensor], ui: Ui) -> dict[str, list[str]]:
    """The published names of the copies, by how they compare with the base's `state` in its number format; of a resized
    vocabulary, in the rows that both have. Generating does not read the output layer, so it may differ."""
    result: dict[str, list[str]] = {"equal": [], "different": [], "different but unread": [], "unknown": []}
    with ui.progress(len(names), "frozen weights compared") as bar:
        for name, ours in names.items():
            verdict = "unknown"
            if ours in state:
                copy, base = root.load([name])[name], state[ours]
                if ours in _VOCABULARY:
                    rows = min(len(copy), len(base))
                    copy, base = copy[:rows], base[:rows]
                same = copy.shape == base.shape and torch.equal(copy.to(base.dtype), base)
                unread = ours.startswith("lm_head.")
                verdict = "equal" if same else "different but unread" if unread else "different"
            result[verdict].append(name)
            bar.advance(1)
    return {**result, "the base's own": sorted(state.keys() - set(names.values()))}


def _branch(recipe: Recipe, root: ShardedCheckpoint, names: Names, base: _Base) -> _Part:
    patches, channels = base.latents["grid"][0] * base.latents["grid"][1], base.latents["channels"]
    positions, size = root.shapes.get("learnable_pos_emb", ()), recipe.images.input_size
    if len(positions) == 3 and positions[1] != patches:
        said = f"the checkpoint has {positions[1]} positions; images.input_size {size} makes {patches} patches"
        fix = f"--set images.input_size={round(size * (positions[1] / patches) ** 0.5)}"
        raise ArtifactError(said, fix=fix, code="BF-ART-007")
    own = {name.removeprefix(OWN + "vision_head.") for name in names.branch if name.startswith(OWN + "vision_head.")}
    head = "codebook" if "codes_KC" in own else "flow" if own else "linear"
    codes = root.shapes[OWN + "vision_head.codes_KC"][0] if head == "codebook" else None
    levels = 1 + len({name.split(".")[1] for name in own if name.startswith("deeper.")})
    normalize = OWN + "latents_mean_C" in names.branch
    form: dict[str, Any] = {"head": head, "codes": codes, "code_levels": levels, "normalize": normalize}
    with init_empty_weights():
        branch = VisualBranch(base.text_config, patches, channels, **form)
    wanted = {published.published_name(name): shape for name, shape in shapes_of(branch.state_dict()).items()}
    present = {name: root.shapes[name] for name in (*names.branch, *names.unexpected)}
    _require_fit(misfits(wanted, present), f"the branch in {root.folder} does not fit {recipe.models.mllm}")
    tensors = {names.branch[name]: tensor for name, tensor in root.load(names.branch).items()}
    identity = {**base.latents, "mllm": base.mllm, "imported": weights_hash(tensors)}
    report = {"imported": names.branch, "frozen": base.frozen, "ignored": names.ignored, "unknown": names.unknown}
    return _Part("branch", identity, tensors, branch.config, report)


def _controlnet(recipe: Recipe, shards: ShardedCheckpoint, base: _Base) -> _Part:
    """As deep as its own config.json says."""
    theirs = _published_config(shards)
    known = inspect.signature(FluxControlNetModel.__init__).parameters  # the published code writes others, too
    stock = {key: value for key, value in theirs.items() if key in known}
    config = {**stock, "control_channels": base.latents["channels"]}
    try:
        with init_empty_weights():
            controlnet = controlnet_from_config(config)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ArtifactError(f"{shards.folder / 'config.json'} makes no ControlNet: {error}", fix="fetch it again",
                            code="BF-ART-005") from error  # fmt: skip
    wanted = shapes_of(published.to_published(controlnet.state_dict()))
    _require_fit(misfits(wanted, shards.shapes), f"the ControlNet in {shards.folder} does not fit its config.json and "
                 f"{recipe.models.mllm}")  # fmt: skip
    diffusion = _diffusion(recipe, config)
    tensors = published.from_published(shards.load(shards.shapes))
    identity = {**base.latents, "painter": diffusion.weights_hash(), "imported": weights_hash(tensors)}
    unused = {key: value for key, value in theirs.items() if key not in config and not key.startswith("_")}
    imported = {name: ours for ours, name in published.from_published({name: name for name in shards.shapes}).items()}
    report = {"imported": imported, "unused keys of config.json": unused}
    return _Part("controlnet", identity, tensors, controlnet_config(controlnet), report)


def _published_config(shards: ShardedCheckpoint) -> dict[str, Any]:
    """config.json, which must name as many blocks as there are weights for; the published script builds others."""
    path = shards.folder / "config.json"
    config = read_json(path)
    if not isinstance(config, dict) or config.get("_class_name", "FluxControlNetModel") != "FluxControlNetModel":
        raise ArtifactError(f"{path} is not of a FLUX ControlNet", code="BF-ART-007",
                            fix="only the published layout can be imported: Qwen2.5-VL and FLUX")  # fmt: skip
    configured = [config.get(key) for key in _BLOCKS]
    blocks = {match[0] for name in shards.shapes if (match := re.match(r"\w+\.\d+\.", name))}
    present = [sum(block.startswith(f"{prefix}.") for block in blocks) for prefix in _BLOCKS.values()]
    if configured != present:
        said, held = (f"{double} double + {single} single" for double, single in (configured, present))
        raise ArtifactError(f"{path} and the weights beside it are of two different ControlNets", code="BF-ART-007",
                            at=f"config.json: {said}\nweights: {held}",
                            fix="give the config.json that these weights were saved with")  # fmt: skip
    return config


def _diffusion(recipe: Recipe, config: dict[str, Any]) -> FluxModel:
    """The recipe's FLUX, of the sizes at which ControlNet and transformer meet."""
    name = recipe.models.diffusion
    try:
        diffusion = ModelLoader(recipe.models).diffusion()
    except EnvironmentProblem as error:
        error.fix = f"{error.fix}; for the branch alone, give a folder without {_CONTROLNET}/"
        raise
    if not isinstance(diffusion, FluxModel):
        raise _other_family(name, "FLUX")
    ours, wanted = (
        {"in_channels": side["in_channels"], "width": side["num_attention_heads"] * side["attention_head_dim"],
         "text width": side["joint_attention_dim"], "pooled text width": side["pooled_projection_dim"]}
        for side in (config, diffusion.transformer.config)
    )  # fmt: skip
    if different := [f"{key} {ours[key]}, not {size}" for key, size in wanted.items() if ours[key] != size]:
        raise ArtifactError(f"the ControlNet is of another FLUX than {name}", at="; ".join(different),
                            fix="name the FLUX that it was trained with: --set models.diffusion=FOLDER",
                            code="BF-ART-004")  # fmt: skip
    return diffusion


def _other_family(name: str, wanted: str) -> ArtifactError:
    return ArtifactError(f"{name} is not of {wanted}, which the published layout is for", code="BF-ART-009",
                         fix="give a recipe of a Qwen2.5-VL and a FLUX: --recipe bifrost1-7b")  # fmt: skip


def _require_fit(troubles: list[str], what: str) -> None:
    if troubles:
        raise ArtifactError(f"{what}: {len(troubles)} keys", at=few(troubles, "; "),
                            fix="fetch the checkpoint again, or give the recipe that it was made for",
                            code="BF-ART-007")  # fmt: skip
