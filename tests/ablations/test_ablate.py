"""ablate: files that are refused, cells that are made once, the table's arithmetic, and one that runs for real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bifrost_cli.ablations.run_ablation import ablate, table
from bifrost_cli.ablations.schema import Ablation, ablation_names, load_ablation, measured_values
from bifrost_cli.cli.app import run
from bifrost_cli.config.load import load_recipe
from bifrost_cli.errors import RecipeError
from bifrost_cli.stats import seed_interval, share_interval, wilson

ROOT = Path(__file__).parents[2]
TINY = {
    "question": "does it matter?",
    "controlnet": "builtin",
    "prompts": 4,
    "keys": {"shapes.rows": 96, "branch.train.steps": 2, "branch.train.batch_size": 8, "branch.train.warmup": 1,
             "branch.train.sample_every": 0, "branch.train.validate_every": 0, "generate.steps": 1},
    "variants": {"one": {"generate.decode_steps": 1}, "two": {"generate.decode_steps": 2}},
}  # fmt: skip


@pytest.mark.parametrize("name", ablation_names())
def test_every_shipped_ablation_makes_recipes(name):
    ablation = load_ablation(name)
    cells = [(row, seed) for row in ablation.rows() for seed in (0, 1)]
    seen = [load_recipe(ablation.base, ablation.sets(*cell)) for cell in cells]
    assert len({recipe.model_dump_json() for recipe in seen}) == len(cells)
    assert seen[1].branch.train.seed == 1 and ablation.question and ablation.reading


@pytest.mark.parametrize(("change", "why"), [
    ({"seeds": [0, 1]}, "at least 3"),
    ({"seeds": [0, 1, 1]}, "twice"),
    ({"variants": {"one": {}}}, "at least 2"),
    ({"variants": {"one": {"branch.head": "flow"}, "two": {"branch.head": "flow"}}}, "the same"),
    ({"question": None}, "question"),
])  # fmt: skip
def test_ablations_that_answer_nothing_are_refused(tmp_path, change, why):
    path = tmp_path / "a.yaml"
    path.write_text(json.dumps({**TINY, **change}))
    with pytest.raises(RecipeError, match=why):
        load_ablation(str(path))


def test_a_name_that_is_none_lists_those_that_are():
    with pytest.raises(RecipeError, match="no ablation plans") as caught:
        load_ablation("plans")
    assert "plan" in caught.value.at


def test_a_key_that_is_none_is_found_before_anything_is_trained(tmp_path):
    ablation = Ablation(**{**TINY, "variants": {"one": {}, "two": {"branch.heads": "flow"}}})
    with pytest.raises(RecipeError, match="branch.heads"):
        ablate("test", ablation, workspace=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_interval_over_seeds_is_students():
    low, high = seed_interval([0.2, 0.4, 0.6])
    assert (low, high) == pytest.approx((0.4 - 4.302653 * 0.2 / 3**0.5, 0.4 + 4.302653 * 0.2 / 3**0.5), rel=1e-6)
    assert seed_interval([1.0, 1.0, 0.9], low=0.0, high=1.0)[1] == 1.0
    with pytest.raises(ValueError):
        seed_interval([0.5])


def test_seeds_that_agree_are_no_certainty():
    """0 of 64: the bound is the share at which 64 trials give none in one case of twenty."""
    low, high = share_interval([0.0, 0.0, 0.0], 64)
    assert low == 0.0 and (1 - high) ** 64 == pytest.approx(0.05) and high == pytest.approx(0.0457, abs=1e-4)
    assert share_interval([1.0, 1.0], 64) == (1 - high, 1.0)
    assert share_interval([0.5, 0.5, 0.5], 64) == wilson(32, 64)
    assert share_interval([0.2, 0.4, 0.6], 64) == seed_interval([0.2, 0.4, 0.6], low=0.0, high=1.0)


def test_the_table_says_a_bound_where_all_seeds_agree():
    rows = [
        {"name": name, "value": value, "seeds": [value] * 3} for name, value in (("a", 0.0), ("b", 1.0), ("c", 0.5))
    ]
    text = table({"name": "x", "question": "?", "prompts": 64, "rows": rows})
    assert "| a | 0.000 | at most 0.046 |" in text and "| b | 1.000 | at least 0.954 |" in text
    assert "| c | 0.500 | 0.381 to 0.619 |" in text


def test_an_ablation_runs_continues_and_is_made_once(tmp_path, monkeypatch):
    ablation = Ablation(**TINY)
    plan = ablate("test", ablation, workspace=tmp_path, device="cpu", dry_run=True)
    assert plan["cells"] == 6 and not list(tmp_path.iterdir())

    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("bifrost_cli.ablations.run_ablation.table", stop)
    with pytest.raises(KeyboardInterrupt):
        ablate("test", ablation, workspace=tmp_path, device="cpu")
    monkeypatch.undo()
    kinds = [path.name.split("-")[0] for path in (tmp_path / "ablations").iterdir()]
    assert (kinds.count("latents"), kinds.count("branch"), kinds.count("samples")) == (1, 3, 6)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "ablations").glob("*/manifest.json")}
    made = ablate("test", ablation, workspace=tmp_path, device="cpu")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "ablations").glob("*/manifest.json")}
    report = json.loads(made.file("report.json").read_text())
    rows = report["results"][0]["categories"]
    assert [row["name"] for row in rows] == ["one", "two"] and all(row["count"] == 12 for row in rows)
    assert [seed["seed"] for seed in rows[0]["seeds"]] == [0, 1, 2]
    assert rows[0]["value"] == pytest.approx(sum(seed["value"] for seed in rows[0]["seeds"]) / 3)
    assert made.file("table.md").read_text().count("\n") == 4
    kept = json.loads(made.file("measured.json").read_text())
    assert table(kept) == made.file("table.md").read_text() and "seconds" not in kept["rows"][0]
    assert "<table" in made.file("report.html").read_text()
    again = ablate("test", ablation, workspace=tmp_path, device="cpu")
    assert again.manifest == made.manifest


def test_a_curve_is_a_training_for_each_budget(tmp_path):
    curve = {**TINY, "budgets": [1, 2], "prompts": 2, "variants": {"one": {}, "two": {"branch.head": "flow"}}}
    made = ablate("curve", Ablation(**curve), workspace=tmp_path, device="cpu")
    report = json.loads(made.file("report.json").read_text())
    assert [row["name"] for row in report["results"][0]["categories"]] == [
        "one, 1 steps", "one, 2 steps", "two, 1 steps", "two, 2 steps"]  # fmt: skip
    (_, lines) = report["plots"]
    assert list(lines["series"]) == ["one", "two"] and all(len(points) == 2 for points in lines["series"].values())
    assert "What training time buys" in made.file("report.html").read_text()
    kept = json.loads(made.file("measured.json").read_text())
    assert table(kept).count(" s |\n") == 4 and all(row["seconds"] >= 0 for row in kept["rows"])


def test_reconstructions_need_no_branch_and_a_controlnet_once_serves_all_seeds(tmp_path):
    training = {"steps": 1, "batch_size": 4, "warmup": 1, "sample_every": 0, "validate_every": 0}
    keys = {"shapes.rows": 64, "generate.steps": 1, **{f"controlnet.train.{name}": x for name, x in training.items()}}
    again = {**TINY, "keys": keys, "prompts": 2, "judge": "reconstructions", "controlnet": "once",
             "variants": {"ControlNet": {}, "input": {"controlnet.control": "concat"},
                          "tokens": {"controlnet.control": "cross_attention"},
                          "4 tokens": {"images.input_size": 32}}}  # fmt: skip
    made = ablate("again", Ablation(**again), workspace=tmp_path, device="cpu")
    kinds = [path.name.split("-")[0] for path in (tmp_path / "ablations").iterdir()]
    assert kinds.count("branch") == 0 and kinds.count("controlnet") == 4 and kinds.count("samples") == 4
    result = json.loads(made.file("report.json").read_text())["results"][0]
    assert "2 held-out images of the built-in world, reconstructed" in result["sentence"]
    rows = result["categories"]
    assert all(row["count"] == 6 and "controlnet_seconds" in row["seeds"][0] for row in rows)


def test_the_readme_has_the_tables_that_were_measured(capsys):
    readme = (ROOT / "recipes" / "README.md").read_text("utf-8")
    shown = readme.split("<!-- measured -->\n")[1].split("<!-- /measured -->")[0]
    assert run(["ablate", "--tables"]) == 0
    assert shown == "".join(table(one) + "\n" for one in measured_values())
    assert capsys.readouterr().out.strip() == "\n".join(table(one) for one in measured_values()).strip()
    assert {one["name"] for one in measured_values()} <= set(ablation_names())
    for one in measured_values():
        assert [row["name"] for row in one["rows"]] == list(load_ablation(one["name"]).rows())
        assert all(len(row["seeds"]) >= 3 for row in one["rows"])
