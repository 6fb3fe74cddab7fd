"""The toy worlds by name: what sources, checkers and pretraining need of one, whichever it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

WORLDS = {"shapes": "bifrost_cli.shapes", "shapes-2": "bifrost_cli.shapes.second"}


@dataclass(frozen=True)
class World:
    """One world. A prompt has `text`, `category` and `spec`; a scene is what `draw` draws.

    Attributes:
        size: side of its images, px.
        categories: of its prompts, in the order of tables.
        splits: of its prompts: "train", and those that training never sees.
        training_sample: a prompt of the training split and a scene that shows it.
        held_out_prompts: (n, seed, split) -> distinct prompts of a split that is held out.
        sample_scene: (generator, prompt) -> a scene that shows it.
        draw: scene -> (size, size, 3) uint8 RGB.
        write_plan: (scene, prompt) -> the scene as an MLLM's plan.
        parse: text -> prompt; ValueError: it is none of this world.
        check: (prompt, RGB) -> whether an image shows it, and why not.
    """

    name: str
    size: int
    categories: Sequence[str]
    splits: Sequence[str]
    training_sample: Callable[[np.random.Generator], tuple[Any, Any]]
    held_out_prompts: Callable[..., list[Any]]
    sample_scene: Callable[[np.random.Generator, Any], Any]
    draw: Callable[[Any], np.ndarray]
    write_plan: Callable[[Any, Any], str]
    parse: Callable[[str], Any]
    check: Callable[[Any, np.ndarray], Any]


@cache
def world(name: str) -> World:
    """The world of this name, one of `WORLDS`."""
    captions, checker, draw, scene, words = (
        import_module(f"{WORLDS[name]}.{part}") for part in ("captions", "checker", "draw", "scene", "words")
    )
    return World(
        name, scene.SIZE, tuple(captions.CATEGORIES), captions.SPLITS, captions.training_sample,
        captions.held_out_prompts, captions.sample_scene, draw.draw, words.write_plan, captions.parse, checker.check,
    )  # fmt: skip


def world_of_size(side: int) -> World:
    """The world whose images have this side, px; the first for any other."""
    return next((found for found in map(world, WORLDS) if found.size == side), world("shapes"))
