"""DPG-Bench: scores known by hand, every question of the file, and the built-in MLLM as a judge."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from bifrost_cli.artifacts import Artifact, Draft
from bifrost_cli.cli.app import run
from bifrost_cli.config.load import load_recipe
from bifrost_cli.data.image_sets import EvalImage, ImageSet, from_folder, from_samples, quartered
from bifrost_cli.data.png import png_bytes
from bifrost_cli.errors import DataError, UsageError
from bifrost_cli.evaluation.evaluate import evaluate
from bifrost_cli.evaluation.judges import VqaJudge
from bifrost_cli.evaluation.metrics.dpg import Dpg, Question, depending, questions_of, read_questions, score
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.shapes.draw import draw
from bifrost_cli.shapes.scene import Scene, Thing

# ---- the arithmetic -------------------------------------------------------------------------------------------------


def graph(*parents: tuple[int, ...]) -> list[Question]:
    return [Question(number, f"q{number}?", one, "entity", "entity - whole") for number, one in enumerate(parents, 1)]


@pytest.mark.parametrize(
    ("parents", "answers", "counted"),
    [
        (((), (1,), (1,)), (True, True, False), (True, True, False)),
        (((), (1,), (1,)), (False, True, True), (False, False, False)),
        (((), (1,), (2,)), (False, True, True), (False, False, False)),  # a grandchild falls with its grandparent
        (((), (), (1, 2)), (True, False, True), (True, False, False)),  # every parent must hold
        (((), (), ()), (True, False, True), (True, False, True)),
    ],
)
def test_a_child_counts_only_with_its_parents(parents, answers, counted):
    questions = graph(*parents)
    given = dict(enumerate(answers, 1))
    assert tuple(depending(questions, given).values()) == counted
    assert score(questions, given) == pytest.approx(sum(counted) / len(counted))


def test_nothing_asked_has_no_score():
    with pytest.raises(ValueError, match="without questions"):
        score([], {})


# ---- the file -------------------------------------------------------------------------------------------------------

COLUMNS = ("item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed",
           "tuple", "question_natural_language")  # fmt: skip
ROWS = [
    ("a", "a red circle", "", "1", "0", "entity", "whole", "entity - whole (circle)", "is there a circle?"),
    ("a", "a red circle", "", "2", "1", "attribute", "color", "attribute - color (circle, red)",
     "is there a red circle?"),
    ("b", "two, blue squares", "", "1", "0", "entity", "whole", "entity - whole (squares)", "is there a square?"),
    ("b", "two, blue squares", "", "2", "1", "attribute", "color", "attribute - color (squares, blue)",
     "is there a blue square?"),
    ("b", "two, blue squares", "", "3", "1,2", "other", "count", "other - count (squares, 2)", "is there a blue star?"),
]  # fmt: skip


def table(path: Path, rows=ROWS, columns=COLUMNS, twice=False) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *([columns] if twice else []), *rows])
    return path


@pytest.mark.parametrize("twice", [False, True])
def test_every_question_is_read_with_and_without_a_second_header(tmp_path, twice):
    items = read_questions(table(tmp_path / "dpg.csv", twice=twice))
    assert list(items) == ["a red circle", "two, blue squares"]
    assert [len(item.questions) for item in items.values()] == [2, 3]
    last = items["two, blue squares"].questions[2]
    assert last == Question(3, "is there a blue star?", (1, 2), "other", "other - count")


@pytest.mark.parametrize(
    ("rows", "columns", "why"),
    [([], COLUMNS, "no question"), (ROWS, (*COLUMNS[:-1], "question"), "no column question_natural_language"),
     ([ROWS[0], ROWS[0]], COLUMNS, "a question twice"), ([ROWS[1]], COLUMNS, "depends on 1"),
     ([(*ROWS[0][:3], "one", *ROWS[0][4:])], COLUMNS, ":2 is no question"),
     ([ROWS[0][:-1]], COLUMNS, ":2 cannot be read")],
)  # fmt: skip
def test_files_that_are_none_of_the_benchmarks(tmp_path, rows, columns, why):
    with pytest.raises(DataError, match=why):
        read_questions(table(tmp_path / "dpg.csv", rows, columns))


# ---- a judge --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mllm():
    import torch
    from fixtures_loading import load_mllm

    return load_mllm("builtin:mllm", torch.device("cpu"), torch.float32)


def image(shape: str, colour: str) -> np.ndarray:
    return draw(Scene("white", (Thing(shape, colour, 1, 1),)))


def test_a_judge_weighs_yes_against_no(mllm):
    judge = VqaJudge(mllm, "built-in")
    share = judge.yes(image("circle", "red"), "is there a red circle?")
    assert 0.0 <= share <= 1.0 and share == judge.yes(image("circle", "red"), "is there a red circle?")
    inputs = mllm.question(image("circle", "red"), "is there a red circle? Answer yes or no.")
    last = mllm.logits(**inputs)[0, -1].double().softmax(0)
    yes, no = (float(last[mllm.tokenizer(word, add_special_tokens=False)["input_ids"][0]]) for word in ("yes", "no"))
    assert share == pytest.approx(yes / (yes + no), rel=1e-6)


def test_an_answer_that_is_no_number_is_an_error_not_a_no(mllm, monkeypatch):
    judge, logits = VqaJudge(mllm, "built-in"), mllm.logits
    monkeypatch.setattr(mllm, "logits", lambda **inputs: logits(**inputs) * float("nan"))
    with pytest.raises(DataError, match="built-in gives no number for 'is there a circle") as caught:
        judge.yes(image("circle", "red"), "is there a circle?")
    assert caught.value.code == "BF-DATA-009"


# ---- from images to a report --------------------------------------------------------------------------------------


def rendered(path: Path, prompts, plans=None) -> Artifact:
    recipe = load_recipe("tiny").model_dump(mode="json")
    with Draft.open(path, "samples", {"name": path.name}) as draft:
        lines = []
        for index, prompt in enumerate(prompts):
            rgb = image("square" if "square" in prompt else "circle", "blue" if index % 2 else "red")
            (draft.path / f"{index:05d}.png").write_bytes(png_bytes(rgb))
            lines.append({"index": index, "prompt": prompt, "plan": plans, "seed": index})
        (draft.path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return draft.commit({"recipe": recipe})


@pytest.fixture
def samples(tmp_path) -> Artifact:
    return rendered(tmp_path / "runs" / "samples-a", ["a red circle", "two, blue squares"] * 2)


class Oracle:
    """Answers by what is truly in the image."""

    identity, device = {"name": "oracle", "weights": "0" * 64}, "cpu"

    def yes(self, rgb, question):
        shape = "square" if "square" in question else "circle" if "circle" in question else "star"
        colours = [colour for colour in ("red", "blue") if colour in question] or ["red", "blue"]
        return float(any(np.array_equal(rgb, image(shape, colour)) for colour in colours if shape != "star"))


def test_scores_of_an_oracle_by_hand(samples, tmp_path):
    """Circles are red, red; squares blue, blue: 2 of 2 twice, and 2 of 3 twice."""
    recipe = load_recipe("tiny")
    images = from_samples(samples, recipe.images)
    items = questions_of(images, read_questions(table(tmp_path / "dpg.csv")), tmp_path / "dpg.csv")
    lines = [{"name": entry.name, "prompt": entry.prompt} for entry in images.entries]
    (result,) = Dpg(Oracle(), items).compute(images, lines, Ui())
    assert result["value"] == pytest.approx((1 + 2 / 3) / 2) and result["label"] == "DPG-Bench by oracle"
    assert {row["name"]: row["value"] for row in result["categories"]} == {"attribute": 1, "entity": 1, "other": 0}
    assert [line["right"] for line in lines] == [True, False, True, False] and "blue star" in lines[1]["why"]
    # two prompts, each a cluster: sums +-2/6 -> sqrt(2 (2/6)^2 2) / 4
    assert result["standard_error"] == pytest.approx(np.sqrt(2 * 2 * (2 / 6) ** 2) / 4)


def test_it_runs_end_to_end_with_the_frozen_mllm(samples, tmp_path, capsys):
    path = table(tmp_path / "dpg.csv")
    code = run(["eval", "--dpg", "--questions", str(path), "--samples", str(samples.path), "-w", str(tmp_path / "runs"),
                "--device", "cpu"])  # fmt: skip
    assert code == 0, capsys.readouterr().err
    (made,) = (tmp_path / "runs").glob("report-*")
    found = json.loads((made / "report.json").read_text())
    (result,) = found["results"]
    assert result["label"] == "DPG-Bench by builtin:mllm" and 0 <= result["value"] <= 1 and result["n_gen"] == 4
    assert "--questions" in found["command"] and result["extractor"]["weights"]


def test_missing_and_rewritten_prompts_are_refused(tmp_path):
    recipe, path = load_recipe("tiny"), table(tmp_path / "dpg.csv")
    items = read_questions(path)
    for name, prompts, why in (
        ("b", ["a red circle"], "not as many"),
        ("c", ["a red circle", "a red circle", "two, blue squares"], "not as many"),
        ("d", ["a red circle, highly detailed", "two, blue squares"], "none of"),
    ):
        made = rendered(tmp_path / "runs" / f"samples-{name}", prompts)
        with pytest.raises(DataError, match=why):
            questions_of(from_samples(made, recipe.images), items, path)
    with pytest.raises(UsageError, match="questions"):
        evaluate(recipe, metrics=["dpg"], workspace=tmp_path / "runs")


# ---- the benchmark's grids ------------------------------------------------------------------------------------------


def grids(folder: Path) -> Path:
    """Two grids by the names of their items: circles are red, red, blue, red; squares all blue."""
    folder.mkdir()
    for name, shape, colours in (("a", "circle", ("red", "red", "blue", "red")), ("b", "square", ("blue",) * 4)):
        four = [image(shape, colour) for colour in colours]
        grid = np.concatenate([np.concatenate(four[:2], 1), np.concatenate(four[2:], 1)])
        (folder / f"{name}.png").write_bytes(png_bytes(grid))
    return folder


def test_grids_are_cut_into_their_own_pictures(tmp_path):
    images = quartered(from_folder(grids(tmp_path / "grids"), load_recipe("tiny").images))
    assert [entry.name for entry in images.entries[:5]] == ["1/a", "2/a", "3/a", "4/a", "1/b"]
    for entry, colour in zip(images.entries, ("red", "red", "blue", "red"), strict=False):
        assert np.array_equal(entry.load(), image("circle", colour))
    assert len({entry.digest for entry in images.entries}) == 8


@pytest.mark.parametrize("shape", [(134, 134), (129, 128), (128, 132)], ids=["lines-between", "odd", "no-picture"])
def test_a_grid_that_cannot_be_cut_exactly_is_refused(shape):
    grid = EvalImage("a.png", "0", lambda: np.zeros((*shape, 3), np.uint8))
    with pytest.raises(DataError, match="no grid of 2x2"):
        quartered(ImageSet("one", (grid,))).entries[0].load()


def test_pictures_without_prompts_are_known_by_the_items_they_are_called_after(tmp_path):
    path, recipe = table(tmp_path / "dpg.csv"), load_recipe("tiny")
    folder = grids(tmp_path / "grids")
    images, items = quartered(from_folder(folder, recipe.images)), read_questions(path)
    lines = [{"name": entry.name, "prompt": entry.prompt} for entry in images.entries]
    measure = Dpg(Oracle(), questions_of(images, items, path))
    (result,) = measure.compute(images, lines, Ui())
    # circles: 1, 1, 1/2, 1; squares: 2/3 each
    assert result["value"] == pytest.approx((3.5 / 4 + 2 / 3) / 2) and "of 2 prompts" in result["details"][0]
    assert "not known" in result["painted_from"] and {line["prompt"] for line in lines} == set(items)
    (folder / "b.png").rename(folder / "c.png")
    with pytest.raises(DataError, match="c is not called as one of the items"):
        questions_of(from_folder(folder, recipe.images), items, path)


def test_grids_run_end_to_end_and_the_command_says_so(tmp_path, capsys):
    options = {"metrics": ["dpg"], "questions": table(tmp_path / "dpg.csv"), "workspace": tmp_path / "runs"}
    made = evaluate(load_recipe("tiny"), samples=grids(tmp_path / "grids"), quarters=True, device="cpu", **options)
    found = json.loads(made.file("report.json").read_text())
    assert found["n_gen"] == 8 and "--quarters --questions" in found["command"]
    with pytest.raises(UsageError, match="none are given"):
        evaluate(load_recipe("tiny"), quarters=True, **options)
    with pytest.raises(UsageError, match="GenEval has no grids"):
        evaluate(load_recipe("tiny"), samples=tmp_path / "grids", quarters=True, **{**options, "metrics": ["geneval"]})


def test_an_item_with_two_prompts_is_refused(tmp_path):
    other = ("a", "a green circle", "", "3", "0", "entity", "whole", "entity - whole (circle)", "is there a circle?")
    with pytest.raises(DataError, match="a has two prompts"):
        read_questions(table(tmp_path / "dpg.csv", [*ROWS, other]))
