"""Which branch and which ControlNet generate together.

In: what the user named, and a workspace. Out: a `GenerationModels` and the sentence that says why. Two parts fit when they were
trained on latents of the same encoder, grid and channels; that is read from their manifests, before any weight. Does
not know models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bifrost_cli.artifacts import Artifact, find, resolve
from bifrost_cli.errors import ArtifactError, RecipeError
from bifrost_cli.loading.resolve import BUILTIN

_SHARED = ("encoder", "grid", "channels")


@dataclass(frozen=True)
class GenerationModels:
    """A branch and a ControlNet that fit; `why` is the first line of a command."""

    branch: Artifact
    controlnet: Artifact
    why: str


def choose_models(branch: Path | str | None, controlnet: Path | str | None, workspace: Path | str) -> GenerationModels:
    """What was given; for the rest the newest of the workspace that fits; else the built-in.

    ArtifactError BF-ART-004 names both identities when what was given does not fit, BF-ART-001 when nothing is there.
    """
    given_branch = resolve(workspace, branch, "branch") if branch is not None else None
    given_controlnet = resolve(workspace, controlnet, "controlnet") if controlnet is not None else None
    branches = [given_branch] if given_branch else find(workspace, "branch")
    controlnets = [given_controlnet] if given_controlnet else find(workspace, "controlnet")
    if given_branch and given_controlnet:
        require_fit(given_branch, given_controlnet)
        return GenerationModels(given_branch, given_controlnet, _says(given_branch, given_controlnet, "as given"))
    for one in branches:
        if has_own_conditioner(one) and not given_controlnet:
            return GenerationModels(one, one, f"{one.id}: learned queries, which hold their own control")
        for other in controlnets:
            if fits(one, other):
                return GenerationModels(
                    one, other, _says(one, other, f"the newest pair in {workspace} that fits together")
                )
    return _with_builtin(given_branch, given_controlnet, workspace)


def choose_controlnet(
    controlnet: Path | str | None, encoder: dict[str, Any], workspace: Path | str
) -> tuple[Artifact, str]:
    """The ControlNet for latents of `encoder`: the given one, else the newest that fits, else the built-in; and why."""
    if controlnet is not None:
        found = resolve(workspace, controlnet, "controlnet")
        require_encoder(found, encoder)
        return found, f"controlnet {found.id}: as given"
    for found in find(workspace, "controlnet"):
        if found.identity.get("encoder") == encoder:
            return found, f"controlnet {found.id}: the newest in {workspace} that fits the encoder"
    found = builtin("controlnet")
    require_encoder(found, encoder)
    return found, f"controlnet {found.id}: built in, because {workspace} holds none that fits the encoder"


def builtin(kind: str) -> Artifact:
    """The trained part that ships with the package."""
    return Artifact.open(BUILTIN / kind)


def has_own_conditioner(branch: Artifact) -> bool:
    """True for learned queries, whose artifact holds the control that they were trained with."""
    return branch.kind == "branch" and "painter" in branch.identity


def require_one_step(branch: Artifact, steps: int) -> None:
    """RecipeError BF-RECIPE-005: learned queries were never trained to read those that are known already."""
    if has_own_conditioner(branch) and steps != 1:
        raise RecipeError(f"generate.decode_steps is {steps}; learned queries are decoded in one",
                          fix="--set generate.decode_steps=1", code="BF-RECIPE-005")  # fmt: skip


def fits(branch: Artifact, controlnet: Artifact) -> bool:
    """True when both were trained on the same kind of latents."""
    return trained_on(branch) == trained_on(controlnet)


def trained_on(artifact: Artifact) -> dict[str, Any]:
    """The encoder's identity, the grid and the channels that a branch or a ControlNet was trained on."""
    missing = [key for key in _SHARED if key not in artifact.identity]
    if missing:
        raise ArtifactError(f"{artifact.path} does not say its {', '.join(missing)}", fix="train it again",
                            code="BF-ART-005")  # fmt: skip
    return {key: artifact.identity[key] for key in _SHARED}


def require_fit(branch: Artifact, controlnet: Artifact) -> None:
    """ArtifactError BF-ART-004, naming both sides, unless they fit."""
    if fits(branch, controlnet):
        return
    raise ArtifactError(
        f"branch {branch.id} and controlnet {controlnet.id} were made from different latents",
        at=f"branch {branch.path}: {described(branch)}\ncontrolnet {controlnet.path}: {described(controlnet)}",
        fix="give two that were trained on the same store: bifrost artifacts lineage shows it",
        code="BF-ART-004",
    )


def require_encoder(controlnet: Artifact, encoder: dict[str, Any]) -> None:
    """ArtifactError BF-ART-004 unless the ControlNet was trained on latents of this encoder."""
    if controlnet.identity.get("encoder") == encoder:
        return
    raise ArtifactError(
        f"controlnet {controlnet.id} was trained on latents of another encoder",
        at=f"controlnet {controlnet.path}: {described(controlnet)}\nencoder now: {_encoder(encoder)}",
        fix="give the recipe that the ControlNet was trained with: --recipe " + str(controlnet.path),
        code="BF-ART-004",
    )


def require_base(trained: Artifact, base: str, name: str, weights: str) -> None:
    """ArtifactError BF-ART-004 unless `trained` was made on the base (`mllm`, `diffusion`) with these weights."""
    before = {"painter": "flux"}  # the name of artifacts made before format 2 of the recipe
    recorded = trained.identity.get(base, trained.identity.get(before.get(base)))
    if recorded == weights:
        return
    raise ArtifactError(
        f"{trained.kind} {trained.id} was trained on another {base} than {name}",
        at=f"{trained.path}: weights {str(recorded)[:12]}\n{name}: weights {weights[:12]}",
        fix=f"give the recipe that it was trained with: --recipe {trained.path}",
        code="BF-ART-004",
    )


def described(artifact: Artifact) -> str:
    """Encoder, weights, grid and channels in one line."""
    shared = trained_on(artifact)
    grid = "x".join(map(str, shared["grid"]))
    return f"{_encoder(shared['encoder'])}, grid {grid}, {shared['channels']} channels"


def _with_builtin(branch: Artifact | None, controlnet: Artifact | None, workspace: Path | str) -> GenerationModels:
    pair = (branch or builtin("branch"), controlnet or builtin("controlnet"))
    if branch or controlnet:
        require_fit(*pair)
        return GenerationModels(
            *pair, _says(*pair, f"{workspace} holds no other part that fits the given one, so it is built in")
        )
    counts = " and ".join(f"{len(find(workspace, kind))} {kind}" for kind in ("branch", "controlnet"))
    return GenerationModels(
        *pair, _says(*pair, f"the built-in pair, because {workspace} holds no pair that fits ({counts})")
    )


def _says(branch: Artifact, controlnet: Artifact, why: str) -> str:
    return f"{branch.id} and {controlnet.id}: {why}"


def _encoder(identity: dict[str, Any]) -> str:
    return f"encoder {identity.get('name')}, weights {str(identity.get('weights'))[:12]}"
