"""Drawing and reading back: true images are read, also spoilt a little; wrong ones are refused."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from bifrost_cli.shapes.captions import Prompt, parse, sample_prompt, sample_scene
from bifrost_cli.shapes.checker import UNCLEAR, Reading, check, read_scene
from bifrost_cli.shapes.draw import crowded_scene, draw, sprite
from bifrost_cli.shapes.scene import CELL, COLOURS, SHAPES, TONES, Scene, Thing

RED_ABOVE = "a red circle above a blue square"
RED, BLUE = Thing("circle", "red", 0, 1), Thing("square", "blue", 2, 1)


def prompted(n: int, seed: int) -> list[tuple[Prompt, Scene]]:
    rng = np.random.default_rng(seed)
    prompts = [sample_prompt(rng, "all") for _ in range(n)]
    return [(prompt, sample_scene(rng, prompt)) for prompt in prompts]


def spoilt(rgb: np.ndarray, rng: np.random.Generator, noise: float = 8.0, blur: float = 0.7) -> np.ndarray:
    soft = ndimage.gaussian_filter(rgb.astype(np.float32), (blur, blur, 0))
    return np.clip(np.rint(soft + rng.normal(0, noise, soft.shape)), 0, 255).astype(np.uint8)


def faded(scene: Scene, share: float) -> np.ndarray:
    return np.rint(share * draw(scene) + (1 - share) * draw(Scene(scene.tone, ()))).astype(np.uint8)


def matches(scene: Scene, reading: Reading, reach: float = 1.0) -> bool:
    """Whether every thing was read where it stands, and nothing else was."""
    if reading.tone != scene.tone or len(reading.found) != len(scene.things):
        return False
    return all(
        any(
            (it.shape, it.colour) == (thing.shape, thing.colour)
            and max(abs(it.x - thing.centre[0]), abs(it.y - thing.centre[1])) <= reach
            for it in reading.found
        )
        for thing in scene.things
    )


def test_a_drawing_is_the_same_every_time_and_keeps_to_its_cells():
    scene = Scene("cream", (Thing("star", "orange", 0, 0, -1, -1), Thing("cross", "green", 3, 3, 1, 1)))
    rgb = draw(scene)
    assert rgb.shape == (64, 64, 3) and rgb.dtype == np.uint8 and np.array_equal(rgb, draw(scene))
    drawn = (rgb != TONES["cream"]).any(-1)
    assert drawn[:CELL, :CELL].any() and drawn[-CELL:, -CELL:].any()
    assert not drawn[CELL:, :-CELL].any() and not drawn[:-CELL, CELL:].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sprite_fits_its_box_and_has_a_solid_middle(shape):
    mask = sprite(shape)
    assert mask.max() == 1.0 and mask.min() == 0.0 and mask[6:8, 6:8].min() == 1.0
    assert 45 < mask.sum() < 125
    assert np.isclose(sprite(shape, size=20).sum(), mask.sum())  # nothing is cut off


def test_the_palette_is_far_apart():
    palette = np.array([*COLOURS.values(), *TONES.values()], float)
    apart = np.linalg.norm(palette[:, None] - palette[None], axis=-1)[~np.eye(len(palette), dtype=bool)]
    assert apart.min() > 50


def test_every_thing_on_every_tone_is_read_exactly():
    for tone in TONES:
        for colour in COLOURS:
            for index, shape in enumerate(SHAPES):
                scene = Scene(tone, (Thing(shape, colour, index % 4, 3 - index % 4, 1, -1),))
                assert matches(scene, read_scene(draw(scene)), reach=0.5), (tone, colour, shape)


def test_true_pictures_are_right():
    assert np.mean([check(prompt, draw(scene)).right for prompt, scene in prompted(1200, 1)]) >= 0.999


def test_slightly_spoilt_pictures_are_right():
    rng = np.random.default_rng(2)
    assert np.mean([check(p, spoilt(draw(s), rng)).right for p, s in prompted(800, 2)]) >= 0.99


def test_crowded_pictures_are_read():
    rng = np.random.default_rng(3)
    scenes = [crowded_scene(rng) for _ in range(150)]
    assert {len(scene.things) for scene in scenes} == set(range(1, 17))
    assert np.mean([matches(scene, read_scene(draw(scene))) for scene in scenes]) >= 0.99
    assert np.mean([matches(scene, read_scene(spoilt(draw(scene), rng))) for scene in scenes]) >= 0.98


def test_larger_pictures_are_read():
    scene = Scene("grey", (RED, BLUE))
    assert matches(scene, read_scene(draw(scene).repeat(8, 0).repeat(8, 1)))


@pytest.mark.parametrize(
    "things",
    [
        (RED, Thing("square", "green", 2, 1)),
        (RED, Thing("triangle", "blue", 2, 1)),
        (Thing("circle", "blue", 0, 1), Thing("square", "red", 2, 1)),
        (RED,),
        (RED, BLUE, Thing("star", "green", 3, 3)),
        (RED, BLUE, Thing("square", "blue", 3, 3)),
        (Thing("circle", "red", 3, 1), BLUE),
        (Thing("circle", "red", 2, 3), BLUE),
        (),
    ],
    ids=["colour", "shape", "swapped", "missing", "extra", "doubled", "below", "beside", "empty"],
)
def test_wrong_pictures_are_refused(things):
    assert check(RED_ABOVE, draw(Scene("white", (RED, BLUE)))).right
    verdict = check(RED_ABOVE, draw(Scene("white", things)))
    assert not verdict.right and verdict.why


@pytest.mark.parametrize("count", [1, 2, 4])
def test_wrong_counts_are_refused(count):
    scene = Scene("white", tuple(Thing("star", "red", i, i) for i in range(count)))
    assert not check("three stars", draw(scene)).right


def test_touching_things_of_two_colours_stay_two():
    scene = Scene("white", (Thing("square", "red", 1, 1, 1, 0), Thing("square", "orange", 1, 2, -1, 0)))
    gap = draw(scene)
    rgb = np.concatenate([gap[:, :31], gap[:, 33:], gap[:, :2]], axis=1)
    assert check("a red square left of an orange square", rgb).right


def test_the_tone_counts_only_when_named():
    rgb = draw(Scene("grey", (RED,)))
    assert check("a red circle", rgb).right and check("a red circle on a grey background", rgb).right
    assert check("a red circle on a cream background", rgb).why == "the background is grey, not cream"


def test_a_prompt_of_another_scene_is_refused():
    pairs = prompted(200, 4)
    for (prompt, _), (other, scene) in zip(pairs, pairs[1:], strict=False):
        if not check(prompt, draw(scene)).right:
            continue
        asked, shown = prompt.spec, other.spec  # rightly so only where the other prompt asks for nothing else
        assert {w.shape for w in asked.things} == {w.shape for w in shown.things}


def test_half_faded_things_are_refused():
    assert not any(check(prompt, faded(scene, 0.5)).right for prompt, scene in prompted(200, 5))
    extra = draw(Scene("white", (RED, BLUE)))
    extra[45:64, 45:64] = faded(Scene("white", (Thing("square", "green", 3, 3),)), 0.5)[45:64, 45:64]
    assert not check(RED_ABOVE, extra).right


@pytest.mark.parametrize("shape", SHAPES)
def test_half_a_thing_is_refused(shape):
    rgb = draw(Scene("white", (Thing(shape, "purple", 1, 1),)))
    rgb[24:] = TONES["white"]
    assert not check(f"a purple {shape}", rgb).right


@pytest.mark.parametrize("scale", [0.6, 1.4, 3.0])
def test_things_of_another_size_are_refused(scale):
    y, x = np.mgrid[:64, :64] + 0.5
    inside = (x - 30) ** 2 + (y - 30) ** 2 < (6.2 * scale) ** 2
    rgb = np.where(inside[..., None], COLOURS["red"], TONES["white"]).astype(np.uint8)
    assert not check("a red circle", rgb).right


def test_pictures_of_nothing_are_refused():
    rng = np.random.default_rng(6)
    noise = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    pale = rng.integers(180, 256, (64, 64, 3)).astype(np.uint8)
    flat = [np.full((64, 64, 3), value, np.uint8) for value in (0, 128, 255, COLOURS["red"])]
    for rgb in (noise, pale, *flat):
        assert not check("a red circle", rgb).right
    assert read_scene(flat[0]) == Reading(UNCLEAR, ())


def test_what_is_no_picture_is_named():
    for wrong in (np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3), np.float32)):
        with pytest.raises(ValueError, match="uint8"):
            read_scene(wrong)


def test_a_prompt_may_be_text_or_parsed():
    rgb = draw(Scene("white", (RED, BLUE)))
    assert check(RED_ABOVE, rgb) == check(parse(RED_ABOVE), rgb)
