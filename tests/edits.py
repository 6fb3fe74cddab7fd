"""Measure edits of the built-in system: `python tests/edits.py [-n 200]` prints the shares of the README.

Held-out scenes of two things are drawn; one thing's colour, shape, presence or place is changed by a mask over what is
concerned, and the checker says whether the image then shows the wanted scene and nothing else. Reconstruction counts
the things that no mask touched; variations must still show their caption. Wilson 95 % intervals.
"""

import argparse
from dataclasses import replace

import numpy as np
from PIL import Image

from bifrost_cli.data.png import contact_sheet
from bifrost_cli.generation.pipeline import BifrostPipeline
from bifrost_cli.shapes.captions import held_out, parse, phrase, sample_prompt, sample_scene
from bifrost_cli.shapes.checker import check, read_scene
from bifrost_cli.shapes.draw import draw
from bifrost_cli.shapes.scene import CELL, COLOURS, GRID, SHAPES, Scene, Thing
from bifrost_cli.stats import wilson

KINDS = ("colour", "shape", "add", "remove", "move")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int, default=200)
    parser.add_argument("--only", nargs="*", default=[*KINDS, "vary"])
    parser.add_argument("--sheet", help="write the first edits of each kind, before and after")
    args = parser.parse_args()
    pipe = BifrostPipeline.from_pretrained("builtin", device="cpu")
    sheet = []
    for kind in args.only:
        rng, right, kept, things, shown = np.random.default_rng(7), 0, 0, 0, []
        for index in range(args.n):
            if kind == "vary":
                prompt, scene = held_out_scene(rng)
                made = np.asarray(pipe.vary(draw(scene), prompt.text, num_images=1, seed=index).images[0])
                right += check(prompt, made).right
                continue
            scene, target, text, cells = case(kind, rng)
            before, mask = draw(scene), np.zeros((CELL * GRID,) * 2, bool)
            for row, column in cells:
                mask[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = True
            made = np.asarray(
                pipe.edit(
                    before, text, mask_image=np.repeat(mask[..., None], 3, -1) * np.uint8(255), seed=index
                ).images[0]
            )
            verdict = check(text, made).right and stays(target, made, set(cells))
            right += verdict
            found = read_scene(made).found
            for thing in (t for t in scene.things if (t.row, t.col) not in cells):
                kept += is_there(thing, found)
                things += 1
            if len(shown) < 6:
                shown += [before, made]
        low, high = wilson(right, args.n)
        also = f"; things that no mask touched {kept} / {things}" if things else ""
        print(f"{kind:8} {right:4} / {args.n:<4} {right / args.n:.3f}  [{low:.3f}, {high:.3f}]{also}", flush=True)
        sheet += shown
    if args.sheet and sheet:
        Image.fromarray(contact_sheet(sheet)).resize((900, 900), Image.Resampling.NEAREST).save(args.sheet)


def held_out_scene(rng):
    prompt = sample_prompt(rng, "held_out")
    return prompt, sample_scene(rng, prompt)


def two_things(rng):
    """A held-out scene of two things that differ in shape and colour, and the sentence that names them."""
    while True:
        prompt, scene = held_out_scene(rng)
        if len(scene.things) == 2 and len({t.shape for t in scene.things} | {t.colour for t in scene.things}) == 4:
            return scene


def sentence(scene):
    return " and ".join(phrase(thing.shape, thing.colour) for thing in scene.things)


def case(kind, rng):
    """A scene, the wanted scene, a held-out prompt of that, and the cells that are masked."""
    while True:
        scene = two_things(rng)
        one, other = (scene.things[i] for i in rng.permutation(2))
        cells = [(one.row, one.col)]
        if kind == "colour":
            new = replace(one, colour=str(rng.choice([c for c in COLOURS if c not in (one.colour, other.colour)])))
        elif kind == "shape":
            new = replace(one, shape=str(rng.choice([s for s in SHAPES if s not in (one.shape, other.shape)])))
        elif kind == "move":  # to the other side of the thing that stays
            below = one.row < other.row
            rows = [r for r in range(GRID) if (r > other.row if below else r < other.row)]
            if not rows or one.row == other.row:
                continue
            relation = "below" if below else "above"
            text = f"{phrase(one.shape, one.colour)} {relation} {phrase(other.shape, other.colour)}"
            if not held_out(text):
                continue
            new = Thing(one.shape, one.colour, int(rng.choice(rows)), other.col)
            cells = [(one.row, one.col), (new.row, new.col)]  # where it was, and where it is to go
            return scene, Scene(scene.tone, (new, other)), text, cells
        elif kind == "remove":
            text = phrase(other.shape, other.colour)
            return scene, Scene(scene.tone, (other,)), text, cells
        else:  # add: the image begins with one thing
            target, start = scene, Scene(scene.tone, (other,))
            return start, target, sentence(target), cells
        target = Scene(scene.tone, (new, other))
        return scene, target, sentence(target), cells


def is_there(thing, found):
    x, y = thing.centre
    return any(f.shape == thing.shape and f.colour == thing.colour and np.hypot(f.x - x, f.y - y) < 3 for f in found)


def stays(target, made, cells):
    """Whether what lies outside of the mask is where it was."""
    found = read_scene(made).found
    return all(is_there(thing, found) for thing in target.things if (thing.row, thing.col) not in cells)


if __name__ == "__main__":
    assert parse("a red circle").category == "colors"
    main()
