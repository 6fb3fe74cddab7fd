"""Which artifacts, models, stores and settings fit together: every such check, as early as what it compares is known.

ArtifactError BF-ART-004 names two that do not fit; RecipeError BF-RECIPE-005, settings that contradict a model.
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

SHARED = ("encoder", "grid", "channels")


def has_own_conditioner(branch: Artifact) -> bool:
    """True for learned queries, whose artifact holds the control that they were trained with."""
    return branch.kind == "branch" and "painter" in branch.identity


def require_one_step(branch: Artifact, steps: int) -> None:
    """Learned queries were never trained to read those that are known already."""
    if has_own_conditioner(branch) and steps != 1:
        raise _contradiction(f"generate.decode_steps is {steps}; learned queries are decoded in one",
                             "--set generate.decode_steps=1")  # fmt: skip


def trained_on(artifact: Artifact) -> dict[str, Any]:
    """The encoder's identity, the grid and the channels that a branch or a ControlNet was trained on."""
    missing = [key for key in SHARED if key not in artifact.identity]
    if missing:
        raise ArtifactError(f"{artifact.path} does not say its {', '.join(missing)}", fix="train it again",
                            code="BF-ART-005")  # fmt: skip
    return {key: artifact.identity[key] for key in SHARED}


def require_fit(branch: Artifact, controlnet: Artifact) -> None:
    """Both were trained on the same kind of latents."""
    if trained_on(branch) != trained_on(controlnet):
        at = f"branch {branch.path}: {_described(branch)}\ncontrolnet {controlnet.path}: {_described(controlnet)}"
        fix = "give two that were trained on the same store: bifrost artifacts lineage shows it"
        raise _misfit(f"branch {branch.id} and controlnet {controlnet.id} were made from different latents", at, fix)


def require_encoder(controlnet: Artifact, encoder: dict[str, Any]) -> None:
    """The ControlNet was trained on latents of this encoder."""
    if controlnet.identity.get("encoder") != encoder:
        at = f"controlnet {controlnet.path}: {_described(controlnet)}\nencoder now: {_encoder(encoder)}"
        fix = f"give the recipe that the ControlNet was trained with: --recipe {controlnet.path}"
        raise _misfit(f"controlnet {controlnet.id} was trained on latents of another encoder", at, fix)


def require_base(trained: Artifact, base: str, name: str, weights: str, files: str | None = None) -> None:
    """`trained` was made on the base (`mllm`, `painter`) with these weights, and files beside them if it says so."""
    recorded = trained.identity.get(base)
    if recorded is None and base == "painter":
        recorded = trained.identity.get("flux")  # the name of artifacts made before format 2 of the recipe
    if recorded != weights:
        at = f"{trained.path}: weights {str(recorded)[:12]}\n{name}: weights {weights[:12]}"
        raise _misfit(
            f"{trained.kind} {trained.id} was trained on another {base} than {name}", at, _own_recipe(trained)
        )
    if files and (known := trained.identity.get(f"{base}_files")) not in (None, files):
        said = (
            f"{trained.kind} {trained.id} was trained with another tokenizer, chat template or config than {name} has"
        )
        raise _misfit(
            said, f"{trained.path}: files {str(known)[:12]}\n{name}: files {files[:12]}", _own_recipe(trained)
        )


def require_diffusion(controlnet: Artifact, name: str, diffusion: DiffusionModel, weights: str) -> None:
    """The ControlNet was made for this family, and on these weights (their hash)."""
    family = config_family(read_json(controlnet.file("config.json")))
    if family != diffusion.family:
        at = f"{controlnet.path}: {family}\n{name}: {diffusion.family}"
        said = f"controlnet {controlnet.id} is for {family}, and {name} is {diffusion.family}"
        raise _misfit(said, at, _own_recipe(controlnet))
    require_base(controlnet, "painter", name, weights)


def _own_recipe(trained: Artifact) -> str:
    return f"give the recipe that it was trained with: --recipe {quote(str(trained.path))}"


def _described(artifact: Artifact) -> str:
    shared = trained_on(artifact)
    grid = "x".join(map(str, shared["grid"]))
    return f"{_encoder(shared['encoder'])}, grid {grid}, {shared['channels']} channels"


def _encoder(identity: dict[str, Any]) -> str:
    return f"encoder {identity.get('name')}, weights {str(identity.get('weights'))[:12]}"


# ---- settings -------------------------------------------------------------------------------------------------------


def check_settings(recipe: Recipe, diffusion: DiffusionModel, ui: Ui) -> None:
    """No more text tokens than the model reads; a line for guidance that it ignores."""
    settings, models, name = recipe.generate, recipe.models, recipe.models.diffusion
    if models.diffusion_text_tokens > (most := diffusion.most_tokens):
        said = f"models.diffusion_text_tokens is {models.diffusion_text_tokens}; {name} reads at most {most}"
        raise _contradiction(said, f"--set models.diffusion_text_tokens={most}")
    if "guidance_scale" in settings.model_fields_set and not diffusion.reads_guidance:
        ui.say(f"generate.guidance_scale {settings.guidance_scale:g} changes nothing: {name} has no guidance")


def require_output_size(size: int, diffusion: DiffusionModel, controlnet: nn.Module, patches: int) -> None:
    """An image of `size` pixels a side has the image tokens that the ControlNet makes of so many patches."""
    side, wanted = size // (2 * diffusion.factor), image_tokens(controlnet, patches)
    if wanted not in (None, side * side):
        said = f"images.output_size {size} makes {side * side} image tokens; the ControlNet gives {wanted}"
        raise _contradiction(said, f"--set images.output_size={2 * math.isqrt(wanted) * diffusion.factor}")


def require_tuning(branch: Branch, layers: int) -> None:
    """An MLLM of so many layers can have this `branch.tune`."""
    if branch.tune != "full" and branch.init == "random":
        raise _contradiction(f"branch.init random with tune {branch.tune} would freeze random layers",
                             "--set branch.tune=full, or init mllm")  # fmt: skip
    if branch.tune == "layers" and branch.layers is not None and branch.layers > layers:
        raise _contradiction(f"branch.layers is {branch.layers}; the MLLM has {layers} layers",
                             f"--set branch.layers={layers}, or tune full")  # fmt: skip


def require_precision(section: str, train: Train, models: Models) -> None:
    """No gradient in fp32 passes through frozen weights of another type."""
    if train.precision == "fp32" and models.dtype != "float32":
        raise _contradiction(f"{section}.train.precision fp32 cannot run through frozen weights of {models.dtype}",
                             "--set models.dtype=float32, or precision bf16")  # fmt: skip


# ---- latents stores -------------------------------------------------------------------------------------------------


def require_latents(
    store: LatentsStore, recipe: str, *, name: str | None = None, encoder: dict | None = None, vae: dict | None = None
) -> None:
    """The store's encoder has this name (known before any weight is loaded), these weights and preprocessing; its VAE
    latents are of this VAE, at this size. What is None is not compared."""
    what, at = "latents of another encoder than that", ""
    if name not in (None, store.encoder.get("name")):
        at = f"encoder {store.encoder.get('name')}, not {name}"
    elif encoder not in (None, store.encoder):
        at = _unlike(store.encoder, encoder)
    elif vae not in (None, recorded := store.attributes.get("painter")):
        what, at = "VAE latents of another diffusion model than that", _unlike(recorded or {}, vae)
    if at:
        fix = f"give the store's own recipe: --recipe {quote(str(store.artifact.path))}, or extract again"
        raise _misfit(f"{store.artifact.path} holds {what} of recipe {recipe}", at, fix)


def control_ratio(store: LatentsStore, diffusion: DiffusionModel) -> int:
    """Image tokens a side for each patch: 2 in the paper; that is a whole number."""
    assert store.vae_shape is not None  # the ControlNet's training asked for a store with VAE latents
    (channels, height, width), (rows, columns) = store.vae_shape, store.grid
    ratio = height // (2 * rows)
    if ratio and (channels, height, width) == (diffusion.latent_channels, 2 * ratio * rows, 2 * ratio * columns):
        return ratio
    raise _misfit(
        f"the VAE latents of {store.artifact.path} do not fit its patch latents in this diffusion model",
        f"they are {(channels, height, width)}; a {rows}x{columns} grid needs "
        f"{(diffusion.latent_channels, 4 * rows, 4 * columns)}, or another whole number of image tokens for each patch",
        f"extract again with --set images.output_size={4 * rows * diffusion.factor}",
    )


def _unlike(recorded: dict[str, Any], now: dict[str, Any] | None) -> str:
    return differences(*({"kind": "latents", "parents": [], "identity": side} for side in (recorded, now)))


def _misfit(message: str, at: str, fix: str) -> ArtifactError:
    return ArtifactError(message, at=at, fix=fix, code="BF-ART-004")


def _contradiction(message: str, fix: str) -> RecipeError:
    return RecipeError(message, fix=fix, code="BF-RECIPE-005")
