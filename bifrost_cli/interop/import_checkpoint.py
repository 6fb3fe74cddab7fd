"""import: a published Bifrost-1 checkpoint -> a branch and a ControlNet artifact.

In: a recipe, which names the frozen bases, and a folder or hub id in the published layout: safetensors at the root,
`flux_controlnet/` a diffusers folder; either may be missing. Out: artifacts that `generate` takes with that recipe.
Everything is checked before anything is written, and every key is accounted for. Knows Qwen2.5-VL and FLUX alone.
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
from bifrost_cli.data.sharded_checkpoint import ShardedCheckpoint
from bifrost_cli.errors import ArtifactError
from bifrost_cli.interop.import_base import load_base
from bifrost_cli.interop.import_parts import CONTROLNET, ImportedPart, branch_part, controlnet_part
from bifrost_cli.interop.published_names import Names, sort_names
from bifrost_cli.loading.resolve import resolve_model
from bifrost_cli.runtime.ui import Ui

_FILES = ("*.json", "*.safetensors")
_SHOWN = 5


@dataclass(frozen=True)
class _Checkpoint:
    """What a source offers, by its headers. `commit` is that of a hub id."""

    root: ShardedCheckpoint | None
    controlnet: ShardedCheckpoint | None
    names: Names
    commit: str | None


def import_checkpoint(
    recipe: Recipe,
    source: Path | str,
    *,
    output: Path | str | None = None,
    workspace: Path | str = "runs",
    dry_run: bool = False,
    ui: Ui | None = None,
) -> list[Artifact] | dict[str, Any]:
    """Import what `source` holds: a branch, a ControlNet, or both, below `output` or as the workspace names them.

    With `dry_run` returns every key, by where it would go; no base is loaded. ArtifactError (5): BF-ART-005 a
    checkpoint that is not whole, 007 weights that are missing, unexpected or misshapen, 004 of other bases, 008 a
    pickle.
    EnvironmentProblem (3) when a base is not here: an artifact's identity is that of the weights it was made on.
    """
    ui = ui or Ui()
    found = _open(source, ui)
    if dry_run:
        return _listing(found)
    base = load_base(recipe, found.root, found.names, ui)
    parts: list[ImportedPart] = []
    if found.root:
        parts.append(branch_part(recipe, found.root, found.names, base))
    if found.controlnet:
        parts.append(controlnet_part(recipe, found.controlnet, base))
    info = {"source": str(source), "commit": found.commit, "recipe": recipe.model_dump(mode="json")}
    made = [_write(part, _place(part, output, workspace), info, ui) for part in parts]
    _say_keys(found, base.frozen, ui)
    return made


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
    return _Checkpoint(root, controlnet, sort_names(root.shapes if root else ()), commit)


def _listing(found: _Checkpoint) -> dict[str, Any]:
    names = found.names
    return {
        "branch": dict(names.branch),
        "controlnet": sorted(found.controlnet.shapes) if found.controlnet else [],
        "frozen MLLM": dict(names.mllm),
        "unexpected": names.strangers,
        "ignored": names.ignored,
        "unknown": names.unknown,
    }


def _place(part: ImportedPart, output: Path | str | None, workspace: Path | str) -> Path:
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


def _say_keys(found: _Checkpoint, frozen: Mapping[str, list[str]], ui: Ui) -> None:
    """The whole report in a few lines; import.json has every name."""
    names = found.names
    if found.root:
        ui.say(f"branch: {len(names.branch)} keys imported")
        ui.say("frozen MLLM: " + ", ".join(f"{len(keys)} {what}" for what, keys in frozen.items()))
        for what, keys in (("ignored", names.ignored), ("unknown", names.unknown)):
            ui.say(f"{what}: {len(keys)} keys{_heads(keys)}")
    if found.controlnet:
        ui.say(f"controlnet: {len(found.controlnet.shapes)} keys imported")


def _heads(keys: Iterable[str]) -> str:
    """How many begin with what: `: diffusion_decoder (1040), vision_gen_vae_model (244)`."""
    heads = Counter(key.split(".")[0] for key in keys).most_common()
    more = [f"and {len(heads) - _SHOWN} others"] if len(heads) > _SHOWN else []
    return ": " + ", ".join([f"{head} ({count})" for head, count in heads[:_SHOWN]] + more) if heads else ""
