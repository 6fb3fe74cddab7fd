"""Plans and questions: what is written reads back, garbage is refused, answers are true."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from fixtures_plans import read_plan

from bifrost_cli.shapes.captions import plural, sample_prompt, sample_scene
from bifrost_cli.shapes.draw import crowded_scene
from bifrost_cli.shapes.scene import Scene, Thing
from bifrost_cli.shapes.words import (
    CELL_WORDS,
    NUMBERS,
    THING_WORDS,
    cell_classes,
    describe,
    fill_cells,
    sample_question,
    write_plan,
)

SCENE = Scene("white", (Thing("square", "blue", 2, 3, 1, -1), Thing("circle", "red", 0, 1)))


def scenes(n: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [crowded_scene(rng) if i % 4 == 0 else sample_scene(rng, sample_prompt(rng)) for i in range(n)]


def test_a_plan_is_one_line_in_reading_order():
    assert write_plan(SCENE) == "white ab redcircle cd bluesquare"
    assert read_plan("white cd bluesquare ab redcircle") == read_plan(write_plan(SCENE))


def test_words():
    assert CELL_WORDS[:5] == ("aa", "ab", "ac", "ad", "ba") and len(set(CELL_WORDS)) == 16
    assert len(set(THING_WORDS)) == 30
    assert not set(CELL_WORDS) & set(THING_WORDS)


def test_plans_round_trip():
    for scene in scenes(1000):
        still = Scene(scene.tone, tuple(Thing(t.shape, t.colour, t.row, t.col) for t in scene.things))
        assert read_plan(write_plan(scene)) == still


def test_filled_cells_follow_the_order_given():
    order = np.random.default_rng(0).permutation(16).tolist()
    words = fill_cells(SCENE, order).split()
    assert words[::2] == [CELL_WORDS[cell] for cell in order]
    filled = dict(zip(words[::2], words[1::2], strict=True))
    assert {cell: word for cell, word in filled.items() if word != "none"} == {"ab": "redcircle", "cd": "bluesquare"}


def test_cell_classes_agree_with_the_plan():
    for scene in scenes(200):
        classes = cell_classes(scene)
        pairs = [(CELL_WORDS[cell], THING_WORDS[classes[cell] - 1]) for cell in np.flatnonzero(classes)]
        assert " ".join([scene.tone, *(word for pair in pairs for word in pair)]) == write_plan(scene)


def test_scenes_are_checked():
    with pytest.raises(ValueError, match="one cell"):
        Scene("white", (Thing("circle", "red", 0, 0), Thing("star", "red", 0, 0)))
    for wrong in (("heart", "red", 0, 0), ("star", "pink", 0, 0), ("star", "red", 4, 0), ("star", "red", 0, 0, 2)):
        with pytest.raises(ValueError):
            Thing(*wrong)
    with pytest.raises(ValueError, match="tone"):
        Scene("black", ())


def _true_answer(question: str, scene: Scene) -> str:
    """The answer worked out again from the question's words."""
    words = question.rstrip("?.").split()
    named = {f"{t.colour} {t.shape}": t for t in scene.things}
    if question.startswith("how many"):
        count = sum(words[2] in ("things", plural(t.shape)) for t in scene.things)
        return NUMBERS[count] if count < len(NUMBERS) else str(count)
    if question.startswith("is there"):
        return "yes" if " ".join(words[-2:]) in named else "no"
    if question.startswith("where"):
        thing = named[" ".join(words[-2:])]
        return f"{('top', 'bottom')[thing.row // 2]} {('left', 'right')[thing.col // 2]}"
    if question.startswith("what is at"):
        return describe(Scene(scene.tone, tuple(t for t in scene.things if CELL_WORDS[t.cell] == words[-1])))
    if question == "what colour is the background?":
        return scene.tone
    if question.startswith("what colour"):
        (colour,) = [t.colour for t in scene.things if t.shape == words[-1]]
        return colour
    return describe(scene)


def test_answers_are_true_and_yes_is_as_common_as_no():
    rng, yes = np.random.default_rng(5), Counter()
    for scene in scenes(4000, seed=5):
        question, answer = sample_question(rng, scene)
        assert answer == _true_answer(question, scene), question
        yes[answer] += 1
    assert 0.85 < yes["yes"] / yes["no"] < 1.15


def test_description():
    assert describe(SCENE) == "a red circle and a blue square"
    assert describe(Scene("grey", ())) == "nothing"
    three = Scene("grey", (*SCENE.things, Thing("star", "orange", 3, 0)))
    assert describe(three) == "a red circle, a blue square and an orange star"


def test_an_empty_picture_has_questions_too():
    rng = np.random.default_rng(6)
    answers = {sample_question(rng, Scene("cream", ()))[1] for _ in range(200)}
    assert answers == {"nothing", "no", "zero", "cream"}
