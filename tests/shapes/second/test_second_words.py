"""Plans and questions of the second world: they say what the scene holds, and every word is known."""

import re
from collections import Counter

import numpy as np

from bifrost_cli.shapes.second.captions import parse, sample_prompt, sample_scene
from bifrost_cli.shapes.second.draw import crowded_scene
from bifrost_cli.shapes.second.scene import Scene, Thing
from bifrost_cli.shapes.second.words import describe, place, sample_question, words, write_plan
from bifrost_cli.toy_system.curricula import CURRICULA, by_place, covered, said_again

SCENE = Scene("mint", (Thing("square", "blue", "small", 100, 60), Thing("circle", "red", "large", 30, 30)))


def test_a_plan_says_where_everything_is_in_the_prompts_order():
    assert write_plan(SCENE) == "mint background, top left large red circle, right small blue square"
    prompt = parse("a blue square and a circle")
    assert write_plan(SCENE, prompt) == "mint background, right small blue square, top left large red circle"
    assert describe(SCENE) == "a large red circle and a small blue square"


def test_answers_are_true():
    rng = np.random.default_rng(0)
    for _ in range(1500):
        scene = crowded_scene(rng)
        question, answer = sample_question(rng, scene)
        things = scene.things
        if found := re.fullmatch(r"what is at the (.+)\?", question):
            assert [describe(Scene(scene.tone, (t,))) for t in things if place(t) == found[1]] == [answer]
        elif found := re.fullmatch(r"is there an? (\w+) (\w+)\?", question):
            assert (answer == "yes") == any((t.colour, t.shape) == found.groups() for t in things)
        elif found := re.fullmatch(r"how big is the (\w+) (\w+)\?", question):
            assert [t.size for t in things if (t.colour, t.shape) == found.groups()] == [answer]
        elif question == "how many things are there?":
            assert answer == "five"


def test_every_word_of_prompts_plans_and_questions_is_known():
    known, rng = set(words()), np.random.default_rng(5)
    for _ in range(2000):
        prompt = sample_prompt(rng, "all")
        scene = sample_scene(rng, prompt)
        texts = [prompt.text, write_plan(scene, prompt), *sample_question(rng, scene)]
        assert set(re.findall(r"[A-Za-z]+", " ".join(texts))) <= known


def test_the_mllm_reads_a_prompt_back_in_one_wording():
    assert (
        said_again(parse("two violet discs on a gray background").spec)
        == "purple circle and purple circle grey background"
    )
    assert said_again(parse("a tiny box over a star").spec) == "small square above star"
    assert said_again(parse("a box between a hoop and a star").spec) == "square between ring and star"
    told = by_place(np.random.default_rng(0), SCENE, parse("a blue square and a circle"))
    assert "right small blue square" in told and "top left large red circle" in told


def test_the_probe_is_taught_what_covers_a_cell():
    kinds, sizes, offsets = covered(SCENE)
    assert Counter(kinds.tolist()).keys() == {0, 1, 1 + 4 * 8 + 1}  # nothing, a red circle, a blue square
    assert sizes[kinds == 1].all() and not sizes[kinds > 1].any()
    cell = 8 * 1 + 1  # x, y in 16 to 31: its centre (24, 24) is 6 px from the circle's
    assert kinds[cell] == 1 and np.allclose(offsets[cell], 6 / 16)


def test_no_row_of_the_mllm_holds_a_prompt_that_is_held_out():
    rng, curriculum = np.random.default_rng(0), CURRICULA["shapes-2"]
    from bifrost_cli.shapes.second.captions import split_of

    for _ in range(500):
        prompt, scene = curriculum.sample(rng)
        assert split_of(prompt.spec) == "train" and curriculum.draw(scene).shape == (128, 128, 3)
