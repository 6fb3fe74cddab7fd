"""`bifrost import`: a published Bifrost-1 checkpoint becomes a branch and a ControlNet artifact.

The published layout (Qwen2.5-VL and FLUX) has safetensors at its root and a diffusers folder `flux_controlnet/`; either
may be missing. Everything is checked before anything is written, and the report accounts for every key. What a trainer
left in the folder (training_args.bin, optimizer.pt ...) is listed and never opened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bifrost_cli.artifacts import Artifact, Draft, default_path, identity_id
from bifrost_cli.artifacts.files import write_json
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.safetensors_io import save_tensors
from bifrost_cli.data.sharded_checkpoint import ShardedCheckpoint, trainer_files
from bifrost_cli.errors import ArtifactError
from bifrost_cli.interop.import_parts import CONTROLNET, ImportedPart, branch_part, controlnet_part, load_base
from bifrost_cli.interop.published_names import Names, sort_names
from bifrost_cli.loading.resolve import resolve_model
from bifrost_cli.runtime.ui import Ui

_FILES = ("*.json", "*.safetensors")
_SHOWN = 5


@dataclass(frozen=True)
class _Checkpoint:
    """What a source holds, by its headers; `commit` is that of a hub id, `ignored_files` are a trainer's."""

    root: ShardedCheckpoint | None
    controlnet: ShardedCheckpoint | None
    names: Names
    commit: str | None
    ignored_files: list[str]


def import_checkpoint(
    recipe: Recipe,
    source: Path | str,
    *,
    output: Path | str | None = None,
    workspace: Path | str = "runs",
    dry_run: bool = False,
    ui: Ui | None = None,
) -> list[Artifact] | dict[str, Any]:
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
    checkpoint = _open(source, ui)
    if dry_run:
        return _listing(checkpoint)
    base = load_base(recipe, checkpoint.root, checkpoint.names, ui)
    parts: list[ImportedPart] = []
    if checkpoint.root:
        parts.append(branch_part(recipe, checkpoint.root, checkpoint.names, base))
    if checkpoint.controlnet:
        parts.append(controlnet_part(recipe, checkpoint.controlnet, base))
    for part in parts if checkpoint.ignored_files else ():
        part.report["ignored files"] = checkpoint.ignored_files
    info = {"source": str(source), "commit": checkpoint.commit, "recipe": recipe.model_dump(mode="json")}
    artifacts = [_write(part, _path(part, output, workspace), info, ui) for part in parts]
    _say_keys(checkpoint, base.frozen, ui)
    return artifacts


def _open(source: Path | str, ui: Ui) -> _Checkpoint:
    folder = Path(resolve_model(str(source), patterns=_FILES))
    commit = None if Path(source).expanduser().is_dir() else folder.name
    inner = folder / CONTROLNET
    root, controlnet = ShardedCheckpoint.open(folder), ShardedCheckpoint.open(inner) if inner.is_dir() else None
    if root is None and controlnet is None:
        raise ArtifactError(
            f"{source} holds no Bifrost checkpoint: no safetensors at its root and none in {CONTROLNET}/",
            fix="give the folder or hub id that holds them, such as hanlincs/Bifrost-1",
        )
    for shards, what, other in ((root, "weights at the root", "ControlNet"), (controlnet, f"{CONTROLNET}/", "branch")):
        if shards is None:
            ui.say(f"{source} has no {what}: the {other} alone is imported")
    ignored = [
        *trainer_files(folder),
        *(f"{CONTROLNET}/{name}" for name in (trainer_files(inner) if controlnet else ())),
    ]
    return _Checkpoint(root, controlnet, sort_names(root.shapes if root else ()), commit, ignored)


def _listing(checkpoint: _Checkpoint) -> dict[str, Any]:
    names = checkpoint.names
    return {
        "branch": dict(names.branch),
        "controlnet": sorted(checkpoint.controlnet.shapes) if checkpoint.controlnet else [],
        "frozen MLLM": dict(names.mllm),
        "unexpected": names.unexpected,
        "ignored": names.ignored,
        "unknown": names.unknown,
        **({"ignored files": checkpoint.ignored_files} if checkpoint.ignored_files else {}),
    }


def _path(part: ImportedPart, output: Path | str | None, workspace: Path | str) -> Path:
    if output is not None:
        return Path(output) / part.kind
    return default_path(workspace, part.kind, identity_id(part.kind, part.identity))


def _write(part: ImportedPart, path: Path, info: Mapping[str, Any], ui: Ui) -> Artifact:
    with Draft.open(path, part.kind, part.identity) as draft:
        if draft.complete:
            draft.complete.check()
            ui.say(f"{path} holds this {part.kind} already; it was verified")
            return draft.complete
        save_tensors(draft.path / "model.safetensors", part.tensors, {"kind": part.kind})
        write_json(draft.path / "config.json", part.config)
        write_json(draft.path / "import.json", part.report)
        parameters = sum(tensor.numel() for tensor in part.tensors.values())
        return draft.commit({**info, "metrics": {}, "parameters": parameters})


def _say_keys(checkpoint: _Checkpoint, frozen: Mapping[str, list[str]], ui: Ui) -> None:
    """Summarize the report, which import.json holds in full."""
    names = checkpoint.names
    if checkpoint.root:
        ui.say(f"branch: {len(names.branch)} keys imported")
        ui.say("frozen MLLM: " + ", ".join(f"{len(keys)} {what}" for what, keys in frozen.items()))
        for what, keys in (("ignored", names.ignored), ("unknown", names.unknown)):
            ui.say(f"{what}: {len(keys)} keys{_heads(keys)}")
    if checkpoint.controlnet:
        ui.say(f"controlnet: {len(checkpoint.controlnet.shapes)} keys imported")
    if checkpoint.ignored_files:
        ui.say(f"ignored: {', '.join(checkpoint.ignored_files)}, which a trainer left and holds no weights")


def _heads(keys: Iterable[str]) -> str:
    """The keys counted by their first part: `: diffusion_decoder (1040), vision_gen_vae_model (244)`."""
    heads = Counter(key.split(".")[0] for key in keys).most_common()
    more = [f"and {len(heads) - _SHOWN} others"] if len(heads) > _SHOWN else []
    return ": " + ", ".join([f"{head} ({count})" for head, count in heads[:_SHOWN]] + more) if heads else ""
