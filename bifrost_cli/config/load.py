"""Loading a recipe: from a name, a YAML file or an artifact, with `--set` values on top, to a validated `Recipe`.

Errors name file:line:column and, for an unknown key, what it is called today or the nearest known one. Recipes and
artifacts of older formats are read with today's names.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from bifrost_cli.artifacts.manifest import MANIFEST, Artifact
from bifrost_cli.config.strict_yaml import Document, Key, parse, parse_file
from bifrost_cli.errors import RecipeError

if TYPE_CHECKING:
    from bifrost_cli.config.schema import Recipe

DEFAULT = "tiny"
_TRAININGS = ("branch.train", "controlnet.train", *(f"shapes.{part}" for part in ("vae", "mllm", "open_clip", "flux")))
# Format -> key of the format before -> what it is called since (more than one: the value goes to each).
RENAMED: dict[int, dict[str, tuple[str, ...]]] = {
    2: {
        "models.flux": ("models.painter",),
        "generate.flux_guidance": ("generate.painter_guidance",),
        "generate.max_flux_tokens": ("generate.painter_tokens",),
    },
    3: {
        "models.painter": ("models.diffusion",),
        "models.revision": ("models.mllm_revision", "models.diffusion_revision"),
        "latents.image_size": ("images.input_size",),
        "latents.paint_size": ("images.output_size",),
        "latents.background": ("images.background",),
        "latents.max_pixels": ("images.max_pixels",),
        "latents.min_side": ("images.min_side",),
        "latents.animated": ("images.animated",),
        "generate.guidance": ("generate.branch_guidance",),
        "generate.painter_guidance": ("generate.guidance_scale",),
        "generate.painter_tokens": ("models.diffusion_text_tokens",),
        **{f"{section}.tensorboard": (f"{section}.report_to",) for section in _TRAININGS},
    },
}
_SHOWN = 5


def recipes_folder() -> Path:
    """The folder of the shipped recipes: inside the package in a wheel, beside it in a checkout."""
    inside = Path(__file__).parents[1] / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def recipe_names() -> list[str]:
    """The names of the shipped recipes."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a shipped recipe. RecipeError BF-RECIPE-004: there is none of this name."""
    if name not in recipe_names():
        raise RecipeError(
            f"there is no recipe {name}{_did_you_mean(name, recipe_names())}",
            at=f"shipped: {', '.join(recipe_names())}",
            fix="give one of these, a YAML file, or an artifact folder",
            code="BF-RECIPE-004",
        )
    return recipes_folder() / f"{name}.yaml"


def load_recipe(ref: str | Path | None = None, sets: Sequence[str] = ()) -> Recipe:
    """Load and validate a recipe.

    Args:
        ref: the name of a shipped recipe, a YAML file, or an artifact folder, whose manifest holds its recipe; None is
            the tiny recipe.
        sets: `section.key=value` settings that override it.

    Raises:
        RecipeError: there is no such recipe, or it is invalid.
    """
    from bifrost_cli.config.schema import Recipe  # the schema imports this file for its readers' convenience

    document = _read(ref)
    if not isinstance(document.data, dict):
        raise RecipeError(
            "a recipe consists of sections, each with key: value lines", at=document.place(()), code="BF-RECIPE-001"
        )
    written = document.data.get("format")  # a recipe without it is of today's
    for format_, names in RENAMED.items():
        if type(written) is int and 1 <= written < format_:
            for old, now in names.items():
                _rename(document, tuple(old.split(".")), now)
            document.data["format"] = written = format_
    for entry in sets:
        name = f"--set {entry}"
        key, equals, text = entry.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path) or not text.strip():
            raise RecipeError(f"{entry!r} is not key=value", at=name, fix="for example --set branch.train.lr=1e-4")
        _section_at(document, path[:-1], name)[path[-1]] = parse(text.encode(), name).data
        document.places[path] = name
    return validate(Recipe, document)


def validate(schema: type[BaseModel], document: Document) -> Any:
    """The document as an instance of `schema`. RecipeError: the first problems, each with its place."""
    try:
        return schema.model_validate(document.data)
    except ValidationError as error:
        raise _recipe_error(schema, document, error.errors(include_url=False)) from error


def _read(ref: str | Path | None) -> Document:
    path = recipe_path(str(ref or DEFAULT)) if ref is None or str(ref) in recipe_names() else Path(ref)
    if path.is_dir() and (path / MANIFEST).exists():
        artifact = Artifact.open(path)
        if not isinstance(artifact.info.get("recipe"), dict):
            raise RecipeError(f"{path} ({artifact.kind}) has no recipe", fix="give a recipe", code="BF-RECIPE-004")
        return Document(str(path / MANIFEST), artifact.info["recipe"])
    if path.is_file():
        return parse_file(path)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise RecipeError(
            f"there is no recipe file {path}", fix="see the shipped ones: bifrost recipes ls", code="BF-RECIPE-004"
        )
    return parse(recipe_path(str(ref)).read_bytes(), str(ref))


def _section_at(document: Document, path: Key, place: str) -> dict[str, Any]:
    """A section, made at `place` where there is none."""
    section = document.data
    for depth, part in enumerate(path, start=1):
        if section.get(part) is None:
            section[part] = {}
            document.places[path[:depth]] = place
        section = section[part]
        if not isinstance(section, dict):
            raise RecipeError(f"{part} is not a section", at=place, code="BF-RECIPE-002")
    return section


def _rename(document: Document, old: Key, now: Sequence[str]) -> None:
    section = document.data
    for part in old[:-1]:
        section = section.get(part) if isinstance(section, dict) else None
    if not isinstance(section, dict) or old[-1] not in section:
        return
    value, place = section.pop(old[-1]), document.place(old)
    if old[-1] == "tensorboard" and isinstance(value, bool):
        value = ["tensorboard"] if value else []
    for key in (tuple(name.split(".")) for name in now):
        with suppress(RecipeError):  # of what is no section the validation tells
            section = _section_at(document, key[:-1], place)
            if key[-1] not in section:
                section[key[-1]], document.places[key] = value, place


def _recipe_error(schema: type[BaseModel], document: Document, problems: list[Any]) -> RecipeError:
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    lines = [_sentence(schema, problem) for problem in problems[:_SHOWN]]
    places = [document.place(problem["loc"]) for problem in problems[:_SHOWN]]
    kind = problems[0]["type"]
    code = {"extra_forbidden": "BF-RECIPE-002", "value_error": "BF-RECIPE-005"}.get(kind, "BF-RECIPE-003")
    if problems[0]["loc"] == ("format",) and kind == "less_than_equal":
        return RecipeError("the recipe is of a newer format", at=places[0], fix="update bifrost", code="BF-RECIPE-006")
    rest = [f"{place}  {line}" for place, line in zip(places[1:], lines[1:], strict=True)]
    more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    fix = "see every key and its meaning: bifrost recipes show --keys"
    return RecipeError(lines[0], at="\n".join([places[0], *rest, *more]), fix=fix, code=code)


def _sentence(schema: type[BaseModel], problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    name = ".".join(path)
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key {name}{_hint([key for key, _ in all_keys(schema)], path)}"
        case "value_error":
            return f"{name}: {problem['ctx']['error']}" if name else str(problem["ctx"]["error"])
        case "model_type":
            return f"{name} is a section; it needs keys under it"
        case "string_pattern_mismatch":
            return f"{name} is {problem['input']!r}; it should be {dict(all_keys(schema))[name].description}"
    wanted = problem["msg"].removeprefix("Input should be ")
    return f"{name} is {json.dumps(problem['input'], default=str)[:60]}; it should be {wanted}"


def _hint(keys: Sequence[str], path: Sequence[str]) -> str:
    """Today's name of an old key; else the nearest key of the same section; else the same key in another section."""
    since, names = 0, [".".join(path)]
    for format_, renamed in RENAMED.items():
        following = [new for name in names for new in renamed.get(name, (name,))]
        since, names = (format_ if following != names else since), following
    if since:
        return f"; since format {since} it is {' and '.join(names)}"
    section = "".join(f"{part}." for part in path[:-1])
    here = dict.fromkeys(key.removeprefix(section).partition(".")[0] for key in keys if key.startswith(section))
    if near := difflib.get_close_matches(path[-1], here, n=1):
        return f"; did you mean {section}{near[0]}?"
    if elsewhere := [key for key in keys if key.rpartition(".")[2] == path[-1]]:
        return f"; did you mean {elsewhere[0]}?"
    return _did_you_mean(".".join(path), keys) or f"; known here: {', '.join(here)}"


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


@cache
def all_keys(schema: type[BaseModel], prefix: str = "") -> tuple[tuple[str, Any], ...]:
    """Every key that is not a section, dotted, with its pydantic field (description, default)."""
    keys: list[tuple[str, Any]] = []
    for name, info in schema.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys += all_keys(info.annotation, f"{prefix}{name}.")
        else:
            keys.append((f"{prefix}{name}", info))
    return tuple(keys)
