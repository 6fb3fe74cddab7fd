"""Where a training begins: anew, where its own run was left, where another one ended (`--resume`, with more steps), or
with the weights of an artifact (`--init`). What it began from is a parent of what it makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import nn

from bifrost_cli.artifacts import Artifact
from bifrost_cli.artifacts.files import make_folder, write_bytes
from bifrost_cli.artifacts.identity import differences
from bifrost_cli.artifacts.manifest import MANIFEST
from bifrost_cli.config.schema import Train
from bifrost_cli.data.safetensors_io import few, load_tensors, misfits, shapes_of
from bifrost_cli.errors import ArtifactError, UsageError
from bifrost_cli.loading.compatibility import require_base, trained_on
from bifrost_cli.training.checkpoint import Checkpoints
from bifrost_cli.training.loop import changed_settings

_TABLES = ("losses.csv", "validation.csv")


@dataclass(frozen=True)
class Origin:
    """The artifact that a training begins with: at `step` of its training, or at 0 with its weights alone."""

    artifact: Artifact
    step: int = 0

    @property
    def work(self) -> Path:
        return self.artifact.path / "work"


@dataclass(frozen=True)
class Start:
    """What `--resume` comes to: a folder that is continued as it is, or an origin and the steps that are left."""

    folder: Path | None = None
    origin: Origin | None = None
    steps: int = 0


def resumed(
    resume: Path | str, output: Path | str | None, kind: str, header: dict[str, Any], train: Train, own_id: str
) -> Start:
    """What of the run that `resume` names, by itself or by its newest checkpoint, is continued, and how.

    Args:
        resume: the run's folder, or its newest checkpoint.
        output: where the result was asked to go.
        kind: branch or controlnet.
        header: identity and parents of the training that is asked for, and `own_id` its artifact's id.
        train: its settings.

    Raises:
        ArtifactError: no run is there, or (BF-ART-003) one that differs in more than its last steps.
        UsageError: a place was given for what continues where it is, or no more steps are asked for than were made.
    """
    named = Path(resume)
    folder = named.parents[2] if named.name.startswith("step-") and len(named.parents) > 2 else named
    checkpoints = Checkpoints(folder / "work" / "checkpoints")
    finished = Artifact.open(folder) if (folder / MANIFEST).is_file() else None
    if not named.is_dir() or not (finished or checkpoints.steps()):
        raise ArtifactError(
            f"{named} holds no checkpoint to resume from", fix="leave --resume out to start", code="BF-ART-001"
        )
    last = checkpoints.path(max(checkpoints.steps(), default=0))
    if folder != named and last.name != named.name:
        raise UsageError(f"{named} is not the newest checkpoint of its run", at=str(last), code="BF-USE-001",
                         fix=f"--resume {quote(str(last))}, or remove the newer ones first")  # fmt: skip
    if finished is None or finished.id == own_id:
        if output is not None:
            raise UsageError(f"--resume {resume} continues where it is, so -o {output} would be ignored",
                             fix="give one", code="BF-USE-001")  # fmt: skip
        return Start(folder=folder)
    return _more_steps(finished, checkpoints, kind, header, train)


def _more_steps(finished: Artifact, checkpoints: Checkpoints, kind: str, header: dict[str, Any], train: Train) -> Start:
    recorded, made = _without_end(finished.identity)
    if finished.kind != kind or made is None:
        raise ArtifactError(f"{finished.path} ({finished.kind}) is no training of a {kind} that could go on",
                            fix="begin with its weights: --init", code="BF-ART-003")  # fmt: skip
    now = {**header, "identity": _without_end(header["identity"])[0]}
    if changed := differences({**finished.manifest, "identity": recorded, "parents": finished.parents[:1]}, now):
        fix = f"set them back, or begin with its weights: --init {quote(str(finished.path))}"
        raise ArtifactError(f"{finished.path} was trained with other settings", at=changed, fix=fix, code="BF-ART-003")
    if train.steps <= made:
        raise UsageError(f"{finished.path} has made {made} steps already", at=f"{kind}.train.steps is {train.steps}",
                         fix=f"--set {kind}.train.steps={2 * made}", code="BF-USE-001")  # fmt: skip
    saved = checkpoints.newest()
    if saved and not changed_settings(saved.state.get("train", {}), train, saved.step):
        return Start(origin=Origin(finished, saved.step), steps=train.steps)
    return Start(origin=Origin(finished), steps=train.steps - made)


def _without_end(identity: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """A training's identity without how it ends, and its steps; None where it says none."""
    settings = identity.get("settings")
    train = settings.get("train") if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or not isinstance(train, dict) or type(train.get("steps")) is not int:
        return identity, None
    kept = {key: value for key, value in train.items() if key not in ("steps", "schedule", "decay_steps")}
    return {**identity, "settings": {**settings, "train": kept}}, train["steps"]


def require_origin(origin: Artifact, kind: str, identity: dict[str, Any], bases: dict[str, str]) -> None:
    """ArtifactError BF-ART-004 unless the artifact is of this kind, for these latents, and on these bases.

    Args:
        origin: what a training is to begin with.
        kind: branch or controlnet.
        identity: of that training.
        bases: the names of the frozen models by their key in the identity (mllm, painter).
    """
    if origin.kind != kind:
        raise ArtifactError(f"{origin.path} is a {origin.kind}, not a {kind}", fix=f"give a {kind} artifact",
                            code="BF-ART-004")  # fmt: skip
    wanted = {key: identity[key] for key in trained_on(origin)}
    if trained_on(origin) != wanted:
        header = {"kind": kind, "parents": []}
        at = differences({**header, "identity": trained_on(origin)}, {**header, "identity": wanted})
        raise ArtifactError(f"{kind} {origin.id} is of other latents than this training's", at=at,
                            fix="extract again with the encoder that it was trained on", code="BF-ART-004")  # fmt: skip
    for base, name in bases.items():
        if base in identity:
            require_base(origin, base, name, identity[base], identity.get(f"{base}_files"))


def begin_with(module: nn.Module, origin: Artifact) -> None:
    """Copy the artifact's weights (the averaged ones) into the module that is to be trained.

    Args:
        module: the untrained module; what is frozen in it stays.
        origin: an artifact of the same parts.

    Raises:
        ArtifactError: BF-ART-005 its weights are damaged; BF-ART-004 they are of another module.
    """
    path = origin.file("model.safetensors")
    origin.check()
    weights, frozen = load_tensors(path)[0], {name for name, p in module.named_parameters() if not p.requires_grad}
    own = {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}
    if troubles := misfits(shapes_of(own), shapes_of(weights)):
        raise ArtifactError(f"{origin.path} holds other weights than this training trains", at=few(troubles, "; "),
                            fix=f"train with its own settings: --recipe {quote(str(origin.path))}",
                            code="BF-ART-004")  # fmt: skip
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def copy_tables(origin: Origin, work: Path) -> None:
    """The tables of the training that goes on, whose later rows are cut by `fit`; not over those of a run that has
    begun. ArtifactError: they are not whole."""
    if Checkpoints(work / "checkpoints").steps():
        return
    origin.artifact.check()
    make_folder(work)
    for name in _TABLES:
        if name in origin.artifact.files:
            write_bytes(work / name, origin.artifact.file(name).read_bytes())
