"""A metric is one class: a small package adds one, and flag, help, --explain, gate, needs and report row follow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import bifrost_cli
from bifrost_cli.cli.app import run
from bifrost_cli.config.load import load_recipe
from bifrost_cli.data.image_sets import drawn
from bifrost_cli.data.png import png_bytes
from bifrost_cli.errors import DataError, EnvironmentProblem, UsageError
from bifrost_cli.evaluation.evaluate import evaluate
from bifrost_cli.evaluation.registry import BUILTIN, metric_class, metric_flags

METRIC = '''
from bifrost_cli.evaluation.metrics.metric import Metric, MetricOption, row


class Brightness(Metric):
    name, help, protocol = "brightness", "Mean of all pixels.", "The mean of all pixels, divided by --white."
    gates, needs_prompts, keys = ("mean_pixel",), True, ("clip",)
    options = (MetricOption("white", "The value of white.", "NUMBER", "255"),)

    def __init__(self, white):
        self.white, self.identity = white, {"brightness": 1, "white": white}

    @classmethod
    def load(cls, inputs):
        return cls(float(inputs.options["white"]))

    def compute(self, images, lines, ui):
        means = [float(entry.load().mean()) / self.white for entry in images.entries]
        value = sum(means) / len(means)
        return [row("mean_pixel", "Brightness", value, n_gen=len(means), standard_error=0.001, spread="no spread",
                    sentence="The mean.")]

    def settings(self):
        return {"white": str(self.white)}

    def warnings(self, images, lines):
        return ["Brightness is no quality."]
'''  # fmt: skip


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a package with entry points of metrics on the path, as an installation would."""

    def installed(package: str, entries: str, source: str) -> None:
        place = tmp_path / package
        (place / f"{package}-1.0.dist-info").mkdir(parents=True)
        (place / f"{package}-1.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\n")
        (place / f"{package}-1.0.dist-info" / "entry_points.txt").write_text(f"[bifrost.metrics]\n{entries}\n")
        (place / f"{package}.py").write_text(source)
        monkeypatch.syspath_prepend(str(place))
        monkeypatch.delitem(sys.modules, package, raising=False)

    return installed


@pytest.fixture
def brightness(install):
    install("shiny", "brightness = shiny:Brightness", METRIC)


@pytest.fixture
def samples(tmp_path) -> Path:
    (tmp_path / "samples").mkdir()
    for index, entry in enumerate(drawn(3).entries):
        (tmp_path / "samples" / f"{index}.png").write_bytes(png_bytes(entry.load()))
    return tmp_path / "samples"


def test_a_package_adds_a_metric_with_flag_help_protocol_gate_and_row(brightness, samples, tmp_path, capsys):
    assert run(["eval", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--brightness" in shown and "Mean of all pixels." in shown and "--white" in shown
    assert run(["eval", "--brightness", "--explain"]) == 0
    assert "divided by --white" in capsys.readouterr().out
    words = ["eval", "--brightness", "--samples", str(samples), "-w", str(tmp_path / "runs"), "--white", "510"]
    assert run([*words, "--gate", "brightness<0.5", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    report = json.loads((Path(printed["path"]) / "report.json").read_text())
    (result,) = report["results"]
    expected = sum(entry.load().mean() for entry in drawn(3).entries) / 3 / 510
    assert result["metric"] == "mean_pixel" and result["value"] == pytest.approx(expected)
    assert printed["gates"][0]["holds"] and report["warnings"] == ["Brightness is no quality."]
    assert report["settings"]["white"] == "510.0" and "evaluate.clip=" in report["command"]
    assert report["command"].startswith("bifrost eval --brightness") and report["command"].endswith("--white 510")
    assert "Brightness" in (Path(printed["path"]) / "report.html").read_text()
    assert run([*words, "--gate", "brightness>0.5"]) == 8


def test_what_it_needs_holds(brightness, samples, tmp_path):
    """It judges prompts: images with and without a plan are not mixed."""
    from bifrost_cli.artifacts import Draft

    with Draft.open(tmp_path / "runs" / "samples-a", "samples", {"a": 1}) as draft:
        lines = [{"index": i, "prompt": "a red circle", "plan": "x" if i else None, "seed": i} for i in range(2)]
        for line, entry in zip(lines, drawn(2).entries, strict=True):
            (draft.path / f"{line['index']:05d}.png").write_bytes(png_bytes(entry.load()))
        (draft.path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        made = draft.commit()
    with pytest.raises(DataError, match="1 of 2 images were generated from a plan"):
        evaluate(load_recipe("tiny"), metrics=["brightness"], samples=made.path, workspace=tmp_path / "runs")


def test_options_belong_to_a_metric(brightness, samples, tmp_path):
    options = {"samples": samples, "workspace": tmp_path / "runs"}
    with pytest.raises(UsageError, match="--white is an option of --brightness, which is not measured"):
        evaluate(load_recipe("tiny"), metrics=["shapes"], white="3", **options)
    with pytest.raises(UsageError, match="no metric has an option colour"):
        evaluate(load_recipe("tiny"), metrics=["shapes"], colour="3", **options)


def test_an_unknown_metric_is_named_with_those_there_are(tmp_path):
    with pytest.raises(UsageError, match="beauty") as caught:
        evaluate(load_recipe("tiny"), metrics=["beauty"], workspace=tmp_path)
    assert caught.value.code == "BF-USE-003" and "reconstruction" in caught.value.at


@pytest.mark.parametrize(
    ("entries", "source", "code"),
    [("fid = other:Brightness", METRIC, "BF-ENV-003"), ("fid2 = other:Brightness", METRIC, "BF-ENV-004"),
     ("fid2 = other:nothing", METRIC, "BF-ENV-004"), ("fid2 = other:x", "x = 3", "BF-ENV-004"),
     ("fid2 = other:x", "import not_installed_anywhere", "BF-ENV-004"), ("fid2 = other:x", "1 / 0", "BF-ENV-004")],
    ids=["two-of-a-name", "another-name", "no-such-class", "no-metric", "import", "raises"],
)  # fmt: skip
def test_a_broken_plug_in_fails_its_own_flag_and_no_other(install, entries, source, code, samples, tmp_path, capsys):
    install("other", entries, source)
    name = entries.split()[0]
    with pytest.raises(EnvironmentProblem) as caught:
        metric_class(name)
    assert caught.value.code == code
    assert run(["eval", "--help"]) == 0
    assert f"--{name}" in capsys.readouterr().out
    assert run(["eval", f"--{name}", "--samples", str(samples), "-w", str(tmp_path / "runs")]) == 3
    assert run(["eval", "--shapes", "--explain"]) == 0


def test_a_flag_of_eval_is_not_taken_by_a_metric(install, samples, capsys):
    source = METRIC.replace("Brightness", "Samples").replace('"brightness"', '"samples"')
    install("sly", "samples = sly:Samples", source)
    assert run(["eval", "--explain", "--samples", str(samples)]) == 0
    assert "fid" in capsys.readouterr().out.splitlines()[0], "--samples is still where the images are"


def test_every_builtin_metric_describes_itself_without_numpy():
    script = (
        "import sys; from bifrost_cli.evaluation.registry import metric_flags, metric_class; flags = metric_flags(); "
        "assert all(text and not text.startswith('(') for _, text, _ in flags); "
        "print(sorted({'numpy', 'torch', 'pydantic'} & set(sys.modules)), len(flags))"
    )
    root = Path(bifrost_cli.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ") and int(done.stdout.split()[-1]) >= len(BUILTIN) == 10
    assert {name for name, _, _ in metric_flags()} >= set(BUILTIN)
