"""Every word of the toy world: what its tiny tokenizers know as single tokens, the same on every machine."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from bifrost_cli.shapes.captions import sample_prompt, sample_scene
from bifrost_cli.shapes.questions import sample_question
from bifrost_cli.shapes.scene import TONES
from bifrost_cli.shapes.scene_plan import EMPTY, cell_words, thing_words

SAMPLES = 4000


def words(texts: Iterable[str] = ()) -> list[str]:
    """Words of plans, of `texts`, and of enough sampled prompts, questions and answers to have met them all."""
    rng = np.random.default_rng(0)
    seen = [*cell_words(), *thing_words(), *TONES, EMPTY, *texts]
    for _ in range(SAMPLES):
        prompt = sample_prompt(rng, split="all")
        seen += [prompt.text, *sample_question(rng, sample_scene(rng, prompt))]
    return sorted(set(re.findall(r"[A-Za-z]+", " ".join(seen))))
