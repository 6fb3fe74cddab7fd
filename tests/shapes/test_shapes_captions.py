"""Prompts of the built-in world: every one parses to itself, the split holds, sampled scenes show what was asked."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from bifrost_cli.shapes.captions import (
    CATEGORIES,
    grammar,
    held_out,
    held_out_prompts,
    parse,
    sample_prompt,
    sample_scene,
)
from bifrost_cli.shapes.scene import GRID, TONES


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_prompt_parses_back_to_itself(category):
    texts = set()
    for index, prompt in enumerate(grammar(category)):
        texts.add(prompt.text)
        if index % 5 == 0 or category not in ("position", "color_attribution"):
            assert parse(prompt.text) == prompt
    assert len(texts) == sum(1 for _ in grammar(category))


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_split_holds_out_a_fifth_and_at_least_twenty(category):
    held = [held_out(prompt.text) for prompt in grammar(category)]
    assert sum(held) >= 20
    assert abs(np.mean(held) - 0.2) < 0.05


def test_the_split_does_not_move():
    assert not held_out("a red circle above a blue square")
    assert held_out("a green star left of a yellow circle")
    assert held_out("  A green STAR left of a yellow circle. ")


def test_no_training_prompt_is_held_out():
    rng = np.random.default_rng(0)
    train = {sample_prompt(rng).text for _ in range(5000)}
    assert not any(held_out(text) for text in train)
    assert not train & {prompt.text for prompt in held_out_prompts(600)}
    assert all(held_out(sample_prompt(rng, "held_out").text) for _ in range(500))


def test_held_out_prompts_are_distinct_balanced_and_repeatable():
    prompts = held_out_prompts(120)
    assert prompts == held_out_prompts(120) != held_out_prompts(120, seed=1)
    assert len({prompt.text for prompt in prompts}) == 120
    assert Counter(prompt.category for prompt in prompts) == dict.fromkeys(CATEGORIES, 20)
    assert len(held_out_prompts(601)) == 601


def test_half_of_the_prompts_are_about_place_or_attribution():
    rng = np.random.default_rng(1)
    prompts = [sample_prompt(rng, "all") for _ in range(4000)]
    counts = Counter(prompt.category for prompt in prompts)
    assert 0.45 < (counts["position"] + counts["color_attribution"]) / 4000 < 0.55
    assert min(counts[category] for category in CATEGORIES) > 300
    assert 0.2 < np.mean([prompt.spec.tone is not None for prompt in prompts]) < 0.3


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("A red circle above a blue square.", "position"),
        ("a green star left of a yellow circle", "position"),
        ("a green star to the left of a yellow circle", "position"),
        ("an orange cross and a red cross on a cream background", "color_attribution"),
        ("a picture of  four crosses", "counting"),
        ("AN IMAGE OF A STAR", "single_object"),
    ],
)
def test_prompts_as_people_write_them(text, category):
    assert parse(text).category == category


@pytest.mark.parametrize("text", ["", ".", "a cat", "five circles", "a circle above", "a star on a black background"])
def test_what_is_not_understood_is_named(text):
    with pytest.raises(ValueError, match="Understood are one thing"):
        parse(text)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="no such split"):
        sample_prompt(np.random.default_rng(0), "test")


def test_scenes_hold_the_wanted_things_and_nothing_else():
    rng = np.random.default_rng(2)
    for _ in range(3000):
        prompt = sample_prompt(rng, "all")
        scene, spec = sample_scene(rng, prompt), prompt.spec
        assert spec.tone in (None, scene.tone)
        assert Counter(t.shape for t in scene.things) == Counter(w.shape for w in spec.things)
        named = Counter((w.shape, w.colour) for w in spec.things if w.colour)
        assert not named or named == Counter((t.shape, t.colour) for t in scene.things)


def test_relations_lie_on_the_named_axis():
    rng = np.random.default_rng(3)
    seen = Counter()
    for _ in range(4000):
        prompt = sample_prompt(rng, "all", "position")
        first, second = prompt.spec.things
        things = {(t.shape, t.colour if first.colour else None): t for t in sample_scene(rng, prompt).things}
        a, b = things[first.shape, first.colour], things[second.shape, second.colour]
        rows, cols = b.row - a.row, b.col - a.col
        along = {"above": rows, "below": -rows, "left": cols, "right": -cols}[prompt.spec.relation]
        across = cols if prompt.spec.relation in ("above", "below") else rows
        assert along > abs(across)
        seen[prompt.spec.relation, a.cell, b.cell] += 1
    assert len(seen) == 4 * 46  # every allowed pair of cells comes up
    named = Counter(relation for relation, *_ in seen.elements())
    assert min(named.values()) > 0.9 * 1000


def test_free_cells_and_tones_are_even():
    rng = np.random.default_rng(4)
    scenes = [sample_scene(rng, parse("a red circle")) for _ in range(4000)]
    cells = Counter(scene.things[0].cell for scene in scenes)
    assert len(cells) == GRID**2 and max(cells.values()) < 1.4 * 4000 / GRID**2
    assert len({scene.tone for scene in scenes}) == len(TONES)
