"""An ablation: one question, several recipes that differ in it, several seeds; the schema of `recipes/ablations`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bifrost_cli.config.load import recipes_folder, validate
from bifrost_cli.config.section import Count, Every, Section
from bifrost_cli.config.strict_yaml import parse_file
from bifrost_cli.errors import RecipeError

Value = bool | int | float | str
Keys = dict[str, Value]


class Ablation(Section):
    """What differs and what does not; every variant sees the same data, seeds and budget."""

    question: str = Field(description="what the variants answer")
    reading: str = Field("", description="how the table is to be read: what the paper says, and what may differ here")
    base: str = Field("tiny", description="the recipe that all variants start from")
    controlnet: Literal["train", "once", "builtin"] = Field(
        "train", description="train one a variant and seed, one a variant (under the first seed), or share the built-in"
    )
    judge: Literal["pictures", "reconstructions"] = Field(
        "pictures", description="what is judged: images of prompts, or images reconstructed without a branch"
    )
    seeds: Annotated[list[Every], Field(min_length=3)] = Field([0, 1, 2], description="seeds of the trainings")
    prompts: Count = Field(192, description="held-out prompts generated and judged, one image each")
    budgets: list[Count] = Field([], description="steps of the branch: each variant is trained for each, as a curve")
    keys: Keys = Field({}, description="recipe keys of all variants")
    variants: Annotated[dict[str, Keys], Field(min_length=2)] = Field(description="recipe keys of each variant")

    @model_validator(mode="after")
    def _differ(self) -> Ablation:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is given twice")
        variants = list(self.variants.items())
        for place, (name, keys) in enumerate(variants):
            if same := [other for other, others in variants[:place] if others == keys]:
                raise ValueError(f"variants {same[0]} and {name} are the same")
        return self

    def rows(self) -> dict[str, tuple[str, Keys]]:
        """Rows of the table by name: the variant, and its own keys; with budgets one for each of them."""
        if not self.budgets:
            return {name: (name, keys) for name, keys in self.variants.items()}
        return {f"{name}, {steps} steps": (name, {**keys, "branch.train.steps": steps})
                for name, keys in self.variants.items() for steps in self.budgets}  # fmt: skip

    def sets(self, row: str, seed: int) -> list[str]:
        """The `--set` values of one cell of the table, the row's own last."""
        diffusion_seed = self.seeds[0] if self.controlnet == "once" else seed
        seeds = {"branch.train.seed": seed, "controlnet.train.seed": diffusion_seed}
        values = {**self.keys, **seeds, **self.rows()[row][1]}
        return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]


def ablation_names() -> list[str]:
    return sorted(path.stem for path in (recipes_folder() / "ablations").glob("*.yaml"))


def measured_values() -> list[dict[str, Any]]:
    """What was measured of the shipped ablations, as `measured.json` of their reports."""
    folder = recipes_folder() / "ablations" / "measured"
    return [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]


def load_ablation(ref: str) -> Ablation:
    """A shipped name or a YAML file. RecipeError BF-RECIPE-004 when there is neither."""
    path = recipes_folder() / "ablations" / f"{ref}.yaml" if ref in ablation_names() else Path(ref)
    if not path.is_file():
        raise RecipeError(f"there is no ablation {ref}", at=f"shipped: {', '.join(ablation_names())}",
                          fix="give one of these, or a YAML file", code="BF-RECIPE-004")  # fmt: skip
    return validate(Ablation, parse_file(path))
