"""What `generate` uses when nothing is named, and that it says so: a short training must not go unseen."""

from __future__ import annotations

from pathlib import Path

import pytest

from bifrost_cli.artifacts import Artifact, Draft
from bifrost_cli.generation.choose_models import choose_controlnet, choose_models
from bifrost_cli.loading.resolve import builtin


def train(runs: Path, kind: str, steps: int) -> Artifact:
    """An artifact as a training of `steps` leaves it, without its weights."""
    shared = {key: builtin(kind).identity[key] for key in ("encoder", "grid", "channels")}
    with Draft.open(runs / f"{kind}-{steps}", kind, {**shared, "steps": steps}) as draft:
        return draft.commit({"recipe": {kind: {"train": {"steps": steps}}}})


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def test_a_training_of_ones_own_is_named_with_its_steps_and_the_way_back(runs):
    branch, controlnet = train(runs, "branch", 40), train(runs, "controlnet", 1)
    chosen = choose_models(None, None, runs)
    assert (chosen.branch.id, chosen.controlnet.id) == (branch.id, controlnet.id)
    pair = f"{branch.id} of 40 steps and {controlnet.id} of 1 step"
    assert chosen.why == f"using {pair}, the newest from {runs}; --branch builtin goes back"
    assert choose_controlnet(None, controlnet.identity["encoder"], runs)[1] == (
        f"using {controlnet.id} of 1 step, the newest from {runs} that fits; --controlnet builtin goes back"
    )


@pytest.mark.parametrize("branch", ["builtin", "builtin:branch"])
def test_the_way_back_is_the_built_in_pair(runs, branch):
    train(runs, "branch", 40), train(runs, "controlnet", 40)
    for controlnet in (None, "builtin", "builtin:controlnet"):
        chosen = choose_models(branch, controlnet, runs)
        assert (chosen.branch.id, chosen.controlnet.id) == (builtin("branch").id, builtin("controlnet").id)
        assert "as given" in chosen.why
