"""data check: everything that is wrong with a source, before any model is loaded. Writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bifrost_cli.config.schema import Recipe
from bifrost_cli.data.sources.item import Problem, SourceError
from bifrost_cli.data.sources.scan import refuse_problems, scan
from bifrost_cli.errors import DataError
from bifrost_cli.runtime.ui import Ui


@dataclass(frozen=True)
class Checked:
    """What a source gives: the funnel and other counts ({} when it cannot be listed), every problem, and the error with
    which an extraction would stop, if any."""

    problems: tuple[Problem, ...]
    stops: DataError | None
    funnel: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)


def check_source(recipe: Recipe, source: str, *, ui: Ui | None = None) -> Checked:
    """Scan `source` under the recipe's rules, going on where an extraction stops. Errors that are not the data's own
    (2, 3) are raised."""
    ui, rules = ui or Ui(), recipe.latents
    milder: dict[str, Any] = {"bad_image": "skip", "max_bad": 1.0}
    if rules.missing_caption == "stop":
        milder["missing_caption"] = "skip"
    try:
        scanned = scan(source, rules.model_copy(update=milder), recipe.images, ui.progress, stop=False)
    except DataError as error:
        return Checked(error.problems if isinstance(error, SourceError) else (), error)
    for line in scanned.said:
        ui.say(line)
    stops = None
    try:
        refuse_problems(scanned, source, rules)
    except SourceError as error:
        stops = error
    return Checked(scanned.events, stops, scanned.funnel, scanned.counts)
