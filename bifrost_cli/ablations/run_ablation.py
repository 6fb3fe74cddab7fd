"""ablate: one question of the paper, answered on the built-in world: every variant under every seed, and a table. Each
cell is made by the stages themselves, whose artifacts stay in the workspace, so that a stopped ablation continues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bifrost_cli.ablations.schema import Ablation
from bifrost_cli.artifacts import Artifact, Draft, default_path, identity_id
from bifrost_cli.artifacts.files import write_bytes, write_json
from bifrost_cli.config.load import load_recipe
from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.image_sets import ImageSet, drawn, from_samples
from bifrost_cli.evaluation.metrics.image_metrics import judge
from bifrost_cli.extraction.extract import extract_latents
from bifrost_cli.generation.generate import generate
from bifrost_cli.generation.reconstruct import reconstruct_set
from bifrost_cli.loading.resolve import builtin
from bifrost_cli.reports.page import report_html, thumbnails
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.shapes.world import world
from bifrost_cli.stats import clustered_error, share_interval
from bifrost_cli.training.train_branch import train_branch
from bifrost_cli.training.train_controlnet import train_controlnet

SCHEMA, MEASURED = "bifrost.ablation/1", "bifrost.measured/1"
PROMPT_SEED = 3  # 0 and 1 chose and measured the built-in weights
SHOWN = 12  # images of a variant in the report
JUDGED = {
    "pictures": "prompts of the built-in world, one image each,",
    "reconstructions": "images of the built-in world, reconstructed from their latents,",
}


@dataclass(frozen=True)
class _Cell:
    """One variant under one seed: what was generated, how it was judged, what the trainings cost."""

    variant: str
    seed: int
    images: ImageSet
    verdicts: list[dict[str, Any]]
    cost: dict[str, float]

    @property
    def right(self) -> int:
        return sum(bool(verdict["right"]) for verdict in self.verdicts)


def ablate(
    name: str, ablation: Ablation, *, output: Path | str | None = None, workspace: Path | str = "runs",
    device: str = "auto", dry_run: bool = False, ui: Ui | None = None,
) -> Artifact | dict[str, Any]:  # fmt: skip
    """Train, generate and judge every variant under every seed; returns the report artifact, or the plan of a dry run.
    RecipeError when a variant's keys make no recipe, before anything is trained."""
    ui, workspace = ui or Ui(), Path(workspace)
    recipes = {(variant, seed): load_recipe(ablation.base, ablation.sets(variant, seed))
               for variant in ablation.rows() for seed in ablation.seeds}  # fmt: skip
    if dry_run:
        return {
            "ablation": name,
            "question": ablation.question,
            "variants": list(ablation.rows()),
            "seeds": ablation.seeds,
            "cells": len(recipes),
            "pictures": len(recipes) * ablation.prompts,
            "branch_steps": {variant: recipe.branch.train.steps for (variant, _), recipe in recipes.items()},
            "controlnet": ablation.controlnet,
        }
    identity = {"schema": SCHEMA, "name": name, "ablation": ablation.model_dump(mode="json"), "prompts": PROMPT_SEED}
    path = Path(output) if output else default_path(workspace, "report", identity_id("report", identity, []))
    with Draft.open(path, "report", identity) as draft:
        if draft.complete:
            ui.say(f"{path} holds this ablation already")
            return draft.complete
        cells = []
        for (variant, seed), recipe in recipes.items():
            cells.append(_cell(variant, seed, recipe, ablation, workspace / "ablations", device, ui))
            ui.say(f"{name}: {variant}, seed {seed}: {cells[-1].right} of {len(cells[-1].verdicts)} right")
        rows = [_row(variant, [cell for cell in cells if cell.variant == variant]) for variant in ablation.rows()]
        shown = [cell for cell in cells if cell.seed == ablation.seeds[0]]
        report, kept = _report(name, ablation, rows, shown), _measured(name, ablation, rows)
        images = {f"{cell.variant}: {entry}": image for cell in shown
                  for entry, image in thumbnails(cell.images.entries[:SHOWN]).items()}  # fmt: skip
        write_json(draft.path / "report.json", report)
        write_json(draft.path / "measured.json", kept)
        write_bytes(draft.path / "table.md", table(kept).encode("utf-8"))
        write_bytes(draft.path / "report.html", report_html(report, images).encode("utf-8"))
        info = {"ablation": name, "headline": [f"{row['name']}: {row['value']:.3f}" for row in rows]}
        return draft.commit(info, cost={"samples": sum(len(cell.verdicts) for cell in cells)})


def table(measured: Mapping[str, Any]) -> str:
    """What is kept of an ablation, as Markdown: mean over seeds with its interval, the values of the seeds; of a curve
    the seconds of training a seed, too."""
    timed = "seconds" in measured["rows"][0]
    asked = f"`{measured['name']}`: {measured['question']}"
    heads = [asked, "right", "95 % over seeds", "seeds", *(["trained"] if timed else [])]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in measured["rows"]:
        low, high = share_interval(row["seeds"], measured["prompts"])
        interval = f"{low:.3f} to {high:.3f}"
        if set(row["seeds"]) <= {row["value"]} & {0.0, 1.0}:  # no width: a one-sided bound
            interval = f"at most {high:.3f}" if row["value"] == 0 else f"at least {low:.3f}"
        seeds = ", ".join(f"{value:.3f}" for value in row["seeds"])
        last = f" {row['seconds']} s |" if timed else ""
        lines.append(f"| {row['name']} | {row['value']:.3f} | {interval} | {seeds} |{last}")
    return "\n".join(lines) + "\n"


def _measured(name: str, ablation: Ablation, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is kept of an ablation, small enough to ship: `recipes/ablations/measured/NAME.json`."""
    rows = [{"name": row["name"], "value": row["value"], "interval95": row["interval95"],
             "seeds": [seed["value"] for seed in row["seeds"]],
             **({"seconds": round(_seconds(row))} if ablation.budgets else {})}
            for row in results]  # fmt: skip
    return {"schema": MEASURED, "name": name, "question": ablation.question, "prompts": ablation.prompts, "rows": rows}


def _seconds(row: Mapping[str, Any]) -> float:
    """Device seconds of the trainings of one seed, the mean."""
    each = [sum(value for name, value in seed.items() if name.endswith("_seconds")) for seed in row["seeds"]]
    return sum(each) / len(each)


def _cell(variant: str, seed: int, recipe: Recipe, ablation: Ablation, workspace: Path, device: str, ui: Ui) -> _Cell:
    where: dict[str, Any] = {"workspace": workspace, "device": device, "ui": ui}
    latents, trained = extract_latents(recipe, **where), []
    if ablation.judge == "pictures":
        trained.append(train_branch(recipe, latents=latents.path, **where))
    controlnet: Path | None = builtin("controlnet").path
    if recipe.branch.target == "queries":
        controlnet = None  # it is in the branch
    elif ablation.controlnet != "builtin":
        trained.append(train_controlnet(recipe, latents=latents.path, **where))
        controlnet = trained[-1].path
    if ablation.judge == "pictures":
        prompts = [prompt.text for prompt in world(recipe.shapes.world).held_out_prompts(ablation.prompts, PROMPT_SEED)]
        samples = generate(recipe, prompts, branch=trained[0].path, controlnet=controlnet, **where)
    else:
        true = drawn(ablation.prompts, seed=PROMPT_SEED, of=recipe.shapes.world)
        samples = reconstruct_set(recipe, true, controlnet=controlnet, **where)
    assert isinstance(samples, Artifact)  # several images, and no dry run
    images = from_samples(samples, recipe.images)
    costs = {f"{part.kind}_seconds": part.manifest["cost"]["seconds"] for part in trained}
    return _Cell(variant, seed, images, [judge(entry) for entry in images.entries], costs)


def _row(variant: str, cells: Sequence[_Cell]) -> dict[str, Any]:
    """A variant over its seeds. The images of one prompt under several seeds are one cluster."""
    values = [cell.right / len(cell.verdicts) for cell in cells]
    verdicts = [float(bool(verdict["right"])) for cell in cells for verdict in cell.verdicts]
    prompts = [entry.prompt for cell in cells for entry in cell.images.entries]
    return {
        "name": variant,
        "value": sum(values) / len(values),
        "interval95": list(share_interval(values, len(set(prompts)))),
        "error_by_prompt": clustered_error(verdicts, prompts),
        "right": sum(cell.right for cell in cells),
        "count": len(verdicts),
        "seeds": [
            {"seed": cell.seed, "right": cell.right, "count": len(cell.verdicts), "value": value, **cell.cost}
            for cell, value in zip(cells, values, strict=True)
        ],
    }


def _report(name: str, ablation: Ablation, rows: list[dict[str, Any]], cells: Sequence[_Cell]) -> dict[str, Any]:
    best = max(rows, key=lambda row: row["value"])
    result = {
        "metric": "ablation",
        "label": "Images that show what was asked, best variant",
        "format": "share",
        "value": best["value"],
        "spread": f"{best['name']}; mean of {len(ablation.seeds)} seeds",
        "details": [],
        "categories": rows,
        "sentence": f"By the programmatic checker, {ablation.prompts} held-out {JUDGED[ablation.judge]} a seed. "
        "Intervals are Student's over the seeds; where all seeds agree, of one seed's images.",
    }
    pictures = [
        {
            "name": f"{cell.variant}: {entry.name}",
            "prompt": entry.prompt,
            "plan": entry.plan,
            "seed": entry.seed,
            **verdict,
        }
        for cell in cells
        for entry, verdict in zip(cell.images.entries[:SHOWN], cell.verdicts[:SHOWN], strict=True)
    ]
    return {
        "schema": SCHEMA,
        "title": f"Ablation: {name}",
        "question": ablation.question,
        "summary": " ".join(filter(None, (ablation.question, ablation.reading))),
        "results": [result],
        "pictures": pictures,
        "plots": _plots(ablation, rows),
        "warnings": ["This is the built-in world: what holds here need not hold for photographs."],
        "settings": {"base": ablation.base, "controlnet": ablation.controlnet}
        | {key: str(value) for key, value in ablation.keys.items()}
        | {f"variant {variant}": ", ".join(ablation.sets(variant, ablation.seeds[0])) for variant in ablation.rows()},
        "lineage": [],
        "command": f"bifrost ablate {name}",
        "env": {},
    }


def _plots(ablation: Ablation, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their intervals; with budgets also what is right against the seconds that it cost."""
    told = f"Mean of {len(ablation.seeds)} seeds, Student's 95 % interval; where all agree, one seed's."
    plots: list[dict[str, Any]] = [{"kind": "dots", "title": "Right, by variant", "rows": rows, "caption": told,
                                    "x": "share of images that are right"}]  # fmt: skip
    if ablation.budgets:
        series: dict[str, list[list[float]]] = {}
        for row in rows:
            point = [_seconds(row), row["value"], *row["interval95"]]
            series.setdefault(ablation.rows()[row["name"]][0], []).append(point)
        plots.append({"kind": "lines", "title": "What training time buys", "series": series, "caption": told,
                      "x": "seconds of training", "y": "right", "powers": ""})  # fmt: skip
    return plots
