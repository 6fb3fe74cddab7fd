"""Prompts of the second world: every one parses to itself, the splits hold by meaning, scenes show what was asked."""

from collections import Counter

import numpy as np
import pytest

from bifrost_cli.shapes.second.captions import (
    CATEGORIES,
    NEW_PAIRS,
    between,
    held_out_prompts,
    meaning,
    parse,
    sample_prompt,
    sample_scene,
    split_of,
    training_sample,
    write_prompt,
)
from bifrost_cli.shapes.second.scene import COLOURS, SHAPES


def prompts(n, split="all", seed=0):
    rng = np.random.default_rng(seed)
    return [sample_prompt(rng, split) for _ in range(n)]


def test_every_prompt_parses_back_to_itself():
    drawn = prompts(4000)
    assert {prompt.category for prompt in drawn} == set(CATEGORIES)
    for prompt in drawn:
        assert parse(prompt.text) == prompt
        assert parse(f"  {prompt.text.upper()}. ") == prompt


@pytest.mark.parametrize(
    "text",
    ["a cat", "a red", "red circle", "six circles", "a circle and a circle and a star", "a circle between a star", ""],
)
def test_what_is_no_prompt_is_refused_with_what_is_understood(text):
    with pytest.raises(ValueError, match="not a prompt of the built-in world.*three red circles"):
        parse(text)


def test_the_split_is_on_the_meaning():
    same = ["a red disc above a blue box", "please paint a red circle over a blue square on a mint background",
            "there is a blue box beneath a red circle"]  # fmt: skip
    assert len({meaning(parse(text).spec) for text in same}) == 1
    rng = np.random.default_rng(1)
    for prompt in prompts(1000):
        other = write_prompt(rng, prompt.spec._replace(tone=None))
        assert split_of(parse(other.text).spec) == split_of(prompt.spec)


def test_splits_share_no_meaning_and_new_ones_hold_what_training_never_has():
    by_split = {split: prompts(3000, split) for split in ("train", "held_out", "new")}
    meanings = {split: {meaning(prompt.spec) for prompt in drawn} for split, drawn in by_split.items()}
    assert not meanings["train"] & meanings["held_out"] and not meanings["train"] & meanings["new"]
    pairs = {split: {(t.colour, t.shape) for p in drawn for t in p.spec.things} for split, drawn in by_split.items()}
    assert not pairs["train"] & NEW_PAIRS and not pairs["held_out"] & NEW_PAIRS and NEW_PAIRS <= pairs["new"]
    shares = Counter(split_of(prompt.spec) for prompt in prompts(4000))
    assert 0.08 < shares["held_out"] / 4000 < 0.16 and 0.08 < shares["new"] / 4000 < 0.2


def test_scenes_of_training_hold_no_new_pair():
    rng = np.random.default_rng(0)
    scenes = [training_sample(rng)[1] for _ in range(2000)]
    seen = {(thing.colour, thing.shape) for scene in scenes for thing in scene.things}
    assert len(seen) == len(COLOURS) * len(SHAPES) - len(NEW_PAIRS) and not seen & NEW_PAIRS


@pytest.mark.parametrize("split", ["held_out", "new"])
def test_held_out_prompts_are_distinct_and_repeatable(split):
    chosen = held_out_prompts(200, split=split)
    assert chosen == held_out_prompts(200, split=split) != held_out_prompts(200, 1, split)
    assert len({prompt.text for prompt in chosen}) == 200 and {split_of(prompt.spec) for prompt in chosen} == {split}
    assert max(Counter(meaning(prompt.spec) for prompt in chosen).values()) <= 6
    assert len({prompt.category for prompt in chosen}) == (8 if split == "held_out" else 6)


def test_sampled_scenes_show_the_prompt_clearly():
    rng = np.random.default_rng(0)
    for prompt in prompts(1500):
        scene, spec = sample_scene(rng, prompt), prompt.spec
        assert len(scene.things) == len(spec.things) and spec.tone in (None, scene.tone)
        for wanted, count in Counter(spec.things).items():
            fits = [
                thing
                for thing in scene.things
                if thing.shape == wanted.shape
                and wanted.colour in (None, thing.colour)
                and wanted.size in (None, thing.size)
            ]
            assert len(fits) >= count


def test_between_needs_the_middle_of_the_line():
    assert between((50, 52), (20, 52), (80, 52)) == 0
    assert between((50, 60), (20, 52), (80, 52)) == 8
    assert between((90, 52), (20, 52), (80, 52)) == np.inf
