"""Which branch and which ControlNet generate together, and what `BifrostPipeline.from_pretrained` means by a name.

Two fit when they were trained on latents of the same encoder, grid and channels, as their manifests say.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from bifrost_cli.artifacts import Artifact, find, lineage, resolve
from bifrost_cli.artifacts.identity import leaves
from bifrost_cli.artifacts.manifest import MANIFEST
from bifrost_cli.artifacts.workspace import BUILTIN, SHIPPED
from bifrost_cli.config.load import load_recipe, recipe_names
from bifrost_cli.config.schema import Recipe
from bifrost_cli.errors import ArtifactError
from bifrost_cli.loading.compatibility import SHARED, has_own_conditioner, require_encoder, require_fit, trained_on
from bifrost_cli.loading.hub_artifacts import HUB_ID, from_hub
from bifrost_cli.loading.resolve import builtin
from bifrost_cli.runtime.ui import counted

Ref = Path | str | None


class GenerationModels(NamedTuple):
    """A branch and a ControlNet that fit; `why` is the first line of a command."""

    branch: Artifact
    controlnet: Artifact
    why: str

    def own_recipe(self, sets: Sequence[str] = ()) -> Recipe:
        """The recipe that trained the branch, which says how to generate with it, and `sets` on top."""
        path = self.branch.path
        trained = isinstance(self.branch.info.get("recipe"), dict)
        if path == BUILTIN / "branch-linear":  # it ships with the tiny recipe: its own is older than `control_scale`
            trained = False
        return load_recipe(path if trained else None, sets)


def choose_models(branch: Ref, controlnet: Ref, workspace: Path | str) -> GenerationModels:
    """What was given (a folder, an id, or `builtin`); for the rest the newest of the workspace that fits; else the
    built-in one. With the built-in branch, the built-in ControlNet unless another is given."""
    if str(branch).startswith("builtin") and controlnet is None:
        controlnet = "builtin"
    given_branch, given_controlnet = _given(branch, "branch", workspace), _given(controlnet, "controlnet", workspace)
    if given_branch and given_controlnet:
        require_fit(given_branch, given_controlnet)
        return _models(given_branch, given_controlnet, "as given")
    branches = [given_branch] if given_branch else _usable(workspace, "branch")
    controlnets = [given_controlnet] if given_controlnet else _usable(workspace, "controlnet")
    found = f", the newest from {workspace}" + ("; --branch builtin goes back" if branch is None else " that fits it")
    for candidate in branches:
        if has_own_conditioner(candidate) and not given_controlnet:
            why = f"using {_trained(candidate)}, learned queries with their own control{found}"
            return GenerationModels(candidate, candidate, why)
        for other in controlnets:
            if trained_on(candidate) == trained_on(other):
                return GenerationModels(candidate, other, f"using {_trained(candidate)} and {_trained(other)}{found}")
    pair = (given_branch or builtin("branch"), given_controlnet or builtin("controlnet"))
    if given_branch or given_controlnet:
        require_fit(*pair)
        return _models(*pair, f"{workspace} holds nothing else that fits the given one, so the other is built in")
    counts = f"{len(branches)} branch and {len(controlnets)} controlnet"
    return _models(*pair, f"the built-in pair, because {workspace} holds no pair that fits ({counts})")


def choose_controlnet(controlnet: Ref, encoder: dict[str, Any], workspace: Path | str) -> tuple[Artifact, str]:
    """The ControlNet for latents of `encoder`: the given one, else the newest that fits, else the built-in; and why."""
    if (given := _given(controlnet, "controlnet", workspace)) is not None:
        require_encoder(given, encoder)
        return given, f"controlnet {given.id}: as given"
    for candidate in find(workspace, "controlnet"):
        if candidate.identity.get("encoder") == encoder:
            why = f"using {_trained(candidate)}, the newest from {workspace} that fits; --controlnet builtin goes back"
            return candidate, why
    ours = builtin("controlnet")
    require_encoder(ours, encoder)
    return ours, f"controlnet {ours.id}: built in, because {workspace} holds none that fits the encoder"


def pretrained(
    ref: Path | str, branch: Ref, controlnet: Ref, workspace: Path | str, sets: Sequence[str], revision: str | None
) -> tuple[Recipe, GenerationModels]:
    """The recipe and the artifacts that a name means; see `BifrostPipeline.from_pretrained`."""
    path = Path(ref).expanduser()
    if str(ref) == "builtin":
        models = choose_models(branch or "builtin", controlnet, workspace)
        return models.own_recipe(sets), models
    if str(ref) not in recipe_names():
        if path.is_dir():
            return _of_folder(path, branch, controlnet, sets)
        named = not path.exists() and path.suffix not in (".yaml", ".yml") and HUB_ID.fullmatch(str(ref))
        if named or str(ref).startswith("hub:"):
            at = f"@{revision}" if revision else ""
            return _of_folder(from_hub(f"hub:{str(ref).removeprefix('hub:')}{at}"), branch, controlnet, sets)
    return load_recipe(ref, sets), choose_models(branch, controlnet, workspace)


def _of_folder(folder: Path, branch: Ref, controlnet: Ref, sets: Sequence[str]) -> tuple[Recipe, GenerationModels]:
    """An artifact, or a folder of artifacts; what it does not hold is chosen from beside it."""
    if not (folder / MANIFEST).is_file():
        if not find(folder, "branch") and not find(folder, "controlnet"):
            fix = f"give a folder that does; published weights are imported first: bifrost import {quote(str(folder))}"
            raise ArtifactError(f"{folder} holds no branch and no controlnet artifact", fix=fix, code="BF-ART-001")
        models = choose_models(branch, controlnet, folder)
        trained = models.branch if models.branch.path.parent == folder else models.controlnet
        return load_recipe(trained.path, sets), models
    artifact = Artifact.open(folder)
    if artifact.kind not in ("branch", "controlnet", "samples"):
        raise ArtifactError(f"{folder} is a {artifact.kind} artifact, which does not generate images",
                            fix="give a branch, a controlnet or samples", code="BF-ART-001")  # fmt: skip
    if artifact.kind == "samples":
        parents = {parent["kind"]: _parent(artifact, parent) for parent in artifact.parents}
        branch, controlnet = branch or parents.get("branch"), controlnet or parents.get("controlnet")
    elif artifact.kind == "branch":
        branch = folder
    else:
        controlnet = folder
    return load_recipe(folder, sets), choose_models(branch, controlnet, folder.parent)


def _parent(artifact: Artifact, parent: dict[str, Any]) -> Path:
    here = [ancestor.artifact for ancestor in lineage(artifact) if ancestor.id == parent["id"]]
    if here and here[0] is not None:
        return here[0].path
    for ref in SHIPPED:
        if (shipped := resolve("", ref)).id == parent["id"]:
            return shipped.path
    raise ArtifactError(f"the {parent['kind']} {parent['id']} that made {artifact.path} is not here any more",
                        fix=f"name another: {parent['kind']}=FOLDER", code="BF-ART-001")  # fmt: skip


def _given(ref: Ref, kind: str, workspace: Path | str) -> Artifact | None:
    return None if ref is None else resolve(workspace, ref, kind)


def _models(branch: Artifact, controlnet: Artifact, why: str) -> GenerationModels:
    return GenerationModels(branch, controlnet, f"{branch.id} and {controlnet.id}: {why}")


def _usable(workspace: Path | str, kind: str) -> list[Artifact]:
    """Those of a workspace that say what they were trained on: an odd one keeps nobody from the others."""
    return [one for one in find(workspace, kind) if one.identity.keys() >= set(SHARED)]


def _trained(artifact: Artifact) -> str:
    """An artifact with the length of its training, so that a short one of one's own is seen."""
    steps = dict(leaves(artifact.info.get("recipe", {}))).get(f"{artifact.kind}.train.steps")
    return f"{artifact.id} of {counted(steps, 'step')}" if isinstance(steps, int) else artifact.id
