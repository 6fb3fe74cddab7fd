"""Trackers beside the CSV tables: what they are given, and that none of them can stop a training."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from fixtures_training import SmallTask, settings

from bifrost_cli.errors import EnvironmentProblem
from bifrost_cli.training.loop import fit


class Run:
    def __init__(self, fails: bool) -> None:
        self.rows, self.finished, self.fails = [], False, fails

    def log(self, values, step=None) -> None:
        if self.fails:
            raise ConnectionError("server is down")
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A module that stands for wandb; accelerate's own tracker calls it."""
    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.run, module.options, module.config = Run(fails=False), {}, {}
    module.init = lambda **options: (module.options.update(options), module.run)[1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return module


def test_a_tracker_is_given_what_the_tables_hold_and_changes_no_byte(wandb, tmp_path):
    train = settings(report_to=("wandb",), log_every=5)
    fit(SmallTask(train), train, tmp_path / "tracked" / "work")
    fit(SmallTask(settings()), settings(), tmp_path / "plain" / "work")
    assert wandb.options["mode"] == "offline", "nothing is sent unless the user sets WANDB_MODE"
    assert wandb.options["name"] == "tracked" and wandb.config["lr"] == 1e-2 and wandb.run.finished
    trained = [(step, row) for step, row in wandb.run.rows if "train/loss" in row]
    assert [step for step, _ in trained] == [5, 10, 15, 20]
    assert [step for step, row in wandb.run.rows if "validation/loss" in row] == [10, 20]
    table = (tmp_path / "tracked" / "work" / "losses.csv").read_text()
    assert float(table.splitlines()[5].split(",")[1]) == pytest.approx(trained[0][1]["train/loss"], rel=1e-8)
    assert table == (tmp_path / "plain" / "work" / "losses.csv").read_text()


def test_the_mode_of_the_environment_is_kept(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    train = settings(report_to=("wandb",), steps=1)
    fit(SmallTask(train), train, tmp_path / "work")
    assert wandb.options["mode"] == "online"


def test_a_tracker_that_fails_is_named_once_and_left_out(wandb, tmp_path):
    wandb.run = Run(fails=True)
    train = settings(report_to=("wandb",), log_every=1)
    result = fit(SmallTask(train), train, tmp_path / "work")
    log = (tmp_path / "work" / "train.log").read_text()
    assert result.step == 20 and log.count("wandb is left out from here: ConnectionError: server is down") == 1


@pytest.mark.parametrize(("name", "command"), [("wandb", "pip install wandb"), ("mlflow", "pip install mlflow"),
                                               ("trackio", "pip install trackio"),
                                               ("tensorboard", "pip install 'bifrost-cli[tensorboard]'")])  # fmt: skip
def test_a_missing_package_is_named_with_the_command(name, command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EnvironmentProblem, match=name) as missing:
        fit(SmallTask(settings()), settings(report_to=(name,)), tmp_path / "work")
    assert missing.value.code == "BF-ENV-002" and missing.value.fix.startswith(command)


def test_a_tracker_that_does_not_start_is_named(wandb, tmp_path):
    def refuse(**options):
        raise ValueError("no key")

    wandb.init = refuse
    with pytest.raises(EnvironmentProblem, match="wandb does not start: ValueError: no key"):
        fit(SmallTask(settings()), settings(report_to=("wandb",)), tmp_path / "work")


def test_tensorboard_writes_its_events(tmp_path):
    pytest.importorskip("tensorboard")
    train = settings(report_to=("tensorboard",), log_every=5)
    fit(SmallTask(train), train, tmp_path / "work")
    assert list((tmp_path / "work" / "tensorboard").glob("events.*"))
