"""The checker of the second world: it reads true drawings, bears blur and noise, and refuses wrong ones."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter

from bifrost_cli.shapes.second.captions import parse, sample_prompt, sample_scene
from bifrost_cli.shapes.second.checker import UNCLEAR, check, read_scene
from bifrost_cli.shapes.second.draw import crowded_scene, draw
from bifrost_cli.shapes.second.scene import COLOURS, RADII, SHAPES, SIZE, TONES, Scene, Thing


def read_as(scene, rgb):
    """Whether the reading has the scene's things where they are."""
    reading = read_scene(rgb)
    found = Counter((f.shape, f.colour, f.size) for f in reading.found)
    near = all(min(np.hypot(f.x - t.x, f.y - t.y) for f in reading.found) < 2 for t in scene.things) if found else True
    return reading.tone == scene.tone and near and found == Counter((t.shape, t.colour, t.size) for t in scene.things)


def spoilt(rgb, rng):
    soft = np.asarray(Image.fromarray(rgb).filter(ImageFilter.GaussianBlur(0.7)), np.float32)
    return np.clip(soft + rng.normal(0, 6, soft.shape), 0, 255).astype(np.uint8)


def test_every_thing_is_read_on_every_background():
    for tone in TONES:
        for size in RADII:
            for index, colour in enumerate(COLOURS):
                things = [
                    Thing(SHAPES[(index + k) % 8], colour, size, 30 + 65 * (k % 2), 30 + 65 * (k // 2))
                    for k in range(4)
                ]
                scene = Scene(tone, tuple(things), index % 4)
                assert read_as(scene, draw(scene)), (tone, size, colour)


def test_drawings_show_their_prompts_and_bear_blur_and_noise():
    rng = np.random.default_rng(0)
    drawn = [(prompt, sample_scene(rng, prompt)) for prompt in (sample_prompt(rng, "all") for _ in range(150))]
    assert all(check(prompt, draw(scene)).right for prompt, scene in drawn)
    assert np.mean([check(prompt, spoilt(draw(scene), rng)).right for prompt, scene in drawn]) >= 0.98
    crowded = [crowded_scene(rng) for _ in range(30)]
    assert np.mean([read_as(scene, draw(scene)) for scene in crowded]) >= 0.99


def test_other_sizes_are_read():
    scene = Scene("cream", (Thing("heart", "pink", "large", 40, 50), Thing("ring", "blue", "small", 90, 90)))
    assert read_as(scene, draw(scene).repeat(4, 0).repeat(4, 1))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a red circle and a blue square", "shows what was asked"),
        ("a red circle above a blue square", "shows what was asked"),
        ("a blue box below a red disc on a white background", "shows what was asked"),
        ("a large circle and a small square", "shows what was asked"),
        ("a red circle", "1 wanted"),
        ("a red circle and a blue diamond", "the picture shows a large red circle, a small blue square"),
        ("a blue circle and a red square", "the picture shows"),
        ("a small circle and a large square", "the picture shows"),
        ("a red circle below a blue square", r"does not stand as named \(below\)"),
        ("a red circle and a blue square on a mint background", "the background is white, not mint"),
    ],
)
def test_a_wrong_picture_is_refused_with_a_reason(text, why):
    scene = Scene("white", (Thing("circle", "red", "large", 40, 30), Thing("square", "blue", "small", 60, 90)))
    verdict = check(text, draw(scene))
    assert verdict.right == (why == "shows what was asked")
    assert __import__("re").search(why, verdict.why), verdict.why


def test_between():
    things = [
        Thing("star", "green", "small", 64, 60),
        Thing("ring", "red", "small", 20, 60),
        Thing("heart", "blue", "small", 110, 64),
    ]
    rgb = draw(Scene("grey", tuple(things)))
    assert (
        check("a star between a ring and a heart", rgb).right and check("a star between a heart and a ring", rgb).right
    )
    assert not check("a ring between a star and a heart", rgb).right


def test_what_is_no_thing_of_the_world_is_unclear():
    rgb = draw(Scene("white", (Thing("circle", "red", "large", 40, 40),)))
    blob = rgb.copy()
    blob[80:110, 20:100] = COLOURS["green"]
    assert UNCLEAR in {found.shape for found in read_scene(blob).found}
    half = rgb.copy()
    half[:, 40:60] = np.where((rgb[:, 40:60] < 200).all(-1, keepdims=True), COLOURS["blue"], rgb[:, 40:60])
    half[25:56, 40:60][np.linalg.norm(rgb[25:56, 40:60].astype(float) - COLOURS["red"], axis=-1) < 80] = COLOURS["blue"]
    assert not check("a red circle", half).right
    assert read_scene(np.full((SIZE, SIZE, 3), 128, np.uint8)).tone == UNCLEAR


def test_a_picture_of_another_prompt_is_refused():
    rng = np.random.default_rng(3)
    drawn = [draw(sample_scene(rng, sample_prompt(rng, "all"))) for _ in range(40)]
    asked = parse("a purple heart between a green ring and a black star on a mint background")
    assert not any(check(asked, rgb).right for rgb in drawn)
