"""Configurations of models that ship beside the recipes, and what can be planned from them.

Reads JSON files alone and imports no model library, so that a refusal takes no longer than reading a recipe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bifrost_cli.artifacts.files import read_json
from bifrost_cli.artifacts.workspace import BUILTIN
from bifrost_cli.config.load import recipes_folder
from bifrost_cli.config.schema import Recipe
from bifrost_cli.errors import RecipeError

DIFFUSION_PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")


def configs(ref: str) -> Path:
    """The folder with a model's configuration: the model's own, or the copy kept beside the recipes. RecipeError
    BF-RECIPE-004: there is neither."""
    for place in (own_folder(ref), _shipped(ref)):
        if place.is_dir():
            return place
    known = ", ".join(sorted(path.name.replace("--", "/") for path in _shipped("").iterdir()))
    raise RecipeError(f"the configuration of {ref} does not ship with Bifrost, so it cannot be planned",
                      at=f"shipped: {known}", fix="download the model and give its folder",
                      code="BF-RECIPE-004")  # fmt: skip


def own_folder(ref: str) -> Path:
    """Where a model lies that is named by a folder or as builtin:NAME."""
    return BUILTIN / ref.removeprefix("builtin:") if ref.startswith("builtin:") else Path(ref).expanduser()


def _shipped(ref: str) -> Path:
    return recipes_folder() / "configs" / ref.replace("/", "--")


def about(ref: str) -> dict[str, Any]:
    """Licence and gate of a model on the hub; empty for a local folder."""
    file = _shipped(ref) / "about.json"
    return read_json(file) if file.is_file() else {}


def require_plannable(recipe: Recipe) -> None:
    """Refuse what has no measured memory: other conditioning than a ControlNet, learned queries, other than FLUX.
    RecipeError: BF-RECIPE-005 a setting, BF-RECIPE-004 a model that is not FLUX or whose configuration is not here."""
    control, target = recipe.controlnet.control, recipe.branch.target
    for key, value, usual in (("controlnet.control", control, "controlnet"), ("branch.target", target, "latents")):
        if value != usual:
            raise RecipeError(f"{key} {value} cannot be planned: its memory has not been measured",
                              fix=f"plan with --set {key}={usual}", code="BF-RECIPE-005")  # fmt: skip
    configs(recipe.models.mllm)
    folder = configs(recipe.models.diffusion)
    kind = read_json(folder / "transformer" / "config.json").get("_class_name")
    if kind != "FluxTransformer2DModel":
        raise RecipeError(f"the diffusion model {folder.name} is a {kind}, which cannot be planned",
                          fix="plan with a FLUX", code="BF-RECIPE-004")  # fmt: skip
