"""Which artifacts, models, stores and settings fit together: every such check, in one place.

Each raises an error that names both sides, as early as what it compares is known.
"""

from __future__ import annotations

import math
from shlex import quote
from typing import TYPE_CHECKING, Any

from torch import nn

from bifrost_cli.artifacts import Artifact
from bifrost_cli.artifacts.files import read_json
from bifrost_cli.artifacts.identity import differences
from bifrost_cli.config.schema import Branch, Models, Recipe, Train
from bifrost_cli.errors import ArtifactError, RecipeError
from bifrost_cli.models.diffusion.base import DiffusionModel
from bifrost_cli.models.diffusion.controlnet import config_family, image_tokens
from bifrost_cli.runtime.ui import Ui

if TYPE_CHECKING:
    from bifrost_cli.data.latents.reader import LatentsStore

_SHARED = ("encoder", "grid", "channels")

# ---- trained artifacts --------------------------------------------------------------------------------------------


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
    recorded = trained.identity.get(base)
    if recorded is None and base == "painter":
        recorded = trained.identity.get("flux")  # the name of artifacts made before format 2 of the recipe
    if recorded == weights:
        return
    raise ArtifactError(
        f"{trained.kind} {trained.id} was trained on another {base} than {name}",
        at=f"{trained.path}: weights {str(recorded)[:12]}\n{name}: weights {weights[:12]}",
        fix=f"give the recipe that it was trained with: --recipe {quote(str(trained.path))}",
        code="BF-ART-004",
    )


def check_settings(recipe: Recipe, diffusion: DiffusionModel, ui: Ui) -> None:
    """RecipeError BF-RECIPE-005 for more text tokens than the model reads; a line for guidance that it ignores."""
    settings, models, name = recipe.generate, recipe.models, recipe.models.diffusion
    if models.diffusion_text_tokens > diffusion.most_tokens:
        raise RecipeError(
            f"models.diffusion_text_tokens is {models.diffusion_text_tokens}; {name} reads at most "
            f"{diffusion.most_tokens}",
            fix=f"--set models.diffusion_text_tokens={diffusion.most_tokens}",
            code="BF-RECIPE-005",
        )
    if "guidance_scale" in settings.model_fields_set and not diffusion.reads_guidance:
        ui.say(f"generate.guidance_scale {settings.guidance_scale:g} changes nothing: {name} has no guidance")


def require_diffusion(controlnet: Artifact, name: str, diffusion: DiffusionModel, weights: str) -> None:
    """ArtifactError BF-ART-004 unless the ControlNet was made for this family and on these weights (their hash); both
    are named."""
    family = config_family(read_json(controlnet.file("config.json")))
    if family != diffusion.family:
        raise ArtifactError(
            f"controlnet {controlnet.id} is for {family}, and {name} is {diffusion.family}",
            at=f"{controlnet.path}: {family}\n{name}: {diffusion.family}",
            fix=f"give the recipe that it was trained with: --recipe {quote(str(controlnet.path))}",
            code="BF-ART-004",
        )
    require_base(controlnet, "painter", name, weights)


def require_output_size(size: int, diffusion: DiffusionModel, controlnet: nn.Module, patches: int) -> None:
    """RecipeError BF-RECIPE-005 unless an image of `size` pixels a side has the image tokens that the ControlNet makes
    of so many patches."""
    side, wanted = size // (2 * diffusion.factor), image_tokens(controlnet, patches)
    if wanted not in (None, side * side):
        raise RecipeError(
            f"images.output_size {size} makes {side * side} image tokens; the ControlNet gives {wanted}",
            fix=f"--set images.output_size={2 * math.isqrt(wanted) * diffusion.factor}",
            code="BF-RECIPE-005",
        )


def described(artifact: Artifact) -> str:
    """Encoder, weights, grid and channels in one line."""
    shared = trained_on(artifact)
    grid = "x".join(map(str, shared["grid"]))
    return f"{_encoder(shared['encoder'])}, grid {grid}, {shared['channels']} channels"


def _encoder(identity: dict[str, Any]) -> str:
    return f"encoder {identity.get('name')}, weights {str(identity.get('weights'))[:12]}"


# ---- latents stores and trainings -----------------------------------------------------------------------------------


def require_latents_named(store: LatentsStore, name: str, recipe: str) -> None:
    """ArtifactError BF-ART-004 unless the store's encoder has this name: known before any weight is loaded."""
    if store.encoder.get("name") != name:
        raise _other_latents(store, "latents of another encoder than that", recipe,
                             f"encoder {store.encoder.get('name')}, not {name}")  # fmt: skip


def require_latents_of(store: LatentsStore, encoder: dict[str, Any], recipe: str) -> None:
    """ArtifactError BF-ART-004 unless the store's encoder has the same weights and preprocessing, too."""
    if store.encoder != encoder:
        raise _other_latents(store, "latents of another encoder than that", recipe, _unlike(store.encoder, encoder))


def require_vae_latents(store: LatentsStore, vae: dict[str, Any], recipe: str) -> None:
    """ArtifactError BF-ART-004 unless the store's VAE latents are of this VAE, at this size."""
    if (recorded := store.attributes["painter"]) != vae:
        raise _other_latents(store, "VAE latents of another diffusion model than that", recipe,
                             _unlike(recorded or {}, vae))  # fmt: skip


def control_ratio(store: LatentsStore, diffusion: DiffusionModel) -> int:
    """Image tokens a side for each patch: 2 in the paper. ArtifactError BF-ART-004 when that is no whole number."""
    assert store.vae_shape is not None  # the ControlNet's training asked for a store with VAE latents
    (channels, height, width), (rows, columns) = store.vae_shape, store.grid
    ratio = height // (2 * rows)
    if ratio and (channels, height, width) == (diffusion.latent_channels, 2 * ratio * rows, 2 * ratio * columns):
        return ratio
    raise ArtifactError(
        f"the VAE latents of {store.artifact.path} do not fit its patch latents in this diffusion model",
        at=f"they are {(channels, height, width)}; a {rows}x{columns} grid needs "
        f"{(diffusion.latent_channels, 4 * rows, 4 * columns)}, or another whole number of image tokens for each patch",
        fix=f"extract again with --set images.output_size={4 * rows * diffusion.factor}",
        code="BF-ART-004",
    )


def require_tuning(branch: Branch, layers: int) -> None:
    """RecipeError BF-RECIPE-005 for a `branch.tune` that an MLLM of so many layers cannot have."""
    if branch.tune != "full" and branch.init == "random":
        raise RecipeError(f"branch.init random with tune {branch.tune} would freeze random layers",
                          fix="--set branch.tune=full, or init mllm", code="BF-RECIPE-005")  # fmt: skip
    if branch.tune == "layers" and branch.layers is not None and branch.layers > layers:
        raise RecipeError(f"branch.layers is {branch.layers}; the MLLM has {layers} layers", code="BF-RECIPE-005",
                          fix=f"--set branch.layers={layers}, or tune full")  # fmt: skip


def require_precision(section: str, train: Train, models: Models) -> None:
    """RecipeError BF-RECIPE-005 for fp32 whose gradient passes through frozen weights of another type."""
    if train.precision == "fp32" and models.dtype != "float32":
        raise RecipeError(f"{section}.train.precision fp32 cannot run through frozen weights of {models.dtype}",
                          fix="--set models.dtype=float32, or precision bf16", code="BF-RECIPE-005")  # fmt: skip


def _other_latents(store: LatentsStore, what: str, recipe: str, at: str) -> ArtifactError:
    return ArtifactError(
        f"{store.artifact.path} holds {what} of recipe {recipe}",
        at=at,
        fix=f"give the store's own recipe: --recipe {quote(str(store.artifact.path))}, or extract again",
        code="BF-ART-004",
    )


def _unlike(recorded: dict[str, Any], now: dict[str, Any]) -> str:
    return differences(*({"kind": "latents", "parents": [], "identity": side} for side in (recorded, now)))
