"""CLIPScore: the cosine open_clip itself gives, its two names, clustered errors, texts that are cut, refusals."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch

from bifrost_cli.data.image_sets import EvalImage, ImageSet, drawn
from bifrost_cli.errors import DataError
from bifrost_cli.evaluation.metrics.image_metrics import ClipScore
from bifrost_cli.evaluation.networks import ClipScorer
from bifrost_cli.loading.open_clip_models import load_open_clip, load_tokenizer
from bifrost_cli.loading.resolve import BUILTIN
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.stats import clustered_error

REF = "builtin:open_clip"


@pytest.fixture(scope="module")
def scorer():
    return ClipScorer(load_open_clip(REF, "cpu"), load_tokenizer(REF), REF)


def test_the_cosine_is_open_clips(scorer):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{BUILTIN / 'open_clip'}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{BUILTIN / 'open_clip'}")
    entries = drawn(5).entries
    pixels = torch.from_numpy(np.stack([entry.load() for entry in entries])).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        image = model.eval().encode_image((pixels - 0.5) / 0.25, normalize=True)
        text = model.encode_text(tokenize([entry.prompt for entry in entries]), normalize=True)
    found = scorer.cosines(
        scorer.features(np.stack([entry.load() for entry in entries])), [entry.prompt for entry in entries]
    )
    np.testing.assert_allclose(found, (image * text).sum(1).numpy(), atol=2e-6)


def test_two_numbers_under_two_names(scorer):
    results = ClipScore(scorer).compute(drawn(40), [], Ui())
    plain, hessel = results
    assert (plain["metric"], hessel["metric"]) == ("clip_cosine_x100", "clipscore_hessel")
    assert plain["n_gen"] == 40 and 0 < plain["value"] <= 100 and plain["standard_error"] > 0
    assert plain["value"] != pytest.approx(40 * hessel["value"], rel=1e-3), "the prefix changes the cosine"


def test_own_prompts_score_above_others(scorer):
    """The tiny CLIP was trained on drawings and words: it must prefer an image's own prompt."""
    images = drawn(40)
    others = [entry.prompt for entry in images.entries[1:]] + [images.entries[0].prompt]
    swapped = tuple(
        EvalImage(entry.name, entry.digest, entry.load, other)
        for entry, other in zip(images.entries, others, strict=True)
    )
    own, other = (ClipScore(scorer).compute(some, [], Ui())[0] for some in (images, ImageSet("swapped", swapped)))
    assert own["value"] > other["value"] + 2 * other["standard_error"]


def test_the_value_does_not_depend_on_order(scorer):
    images = drawn(40)
    turned = ImageSet("turned", images.entries[::-1])
    one, other = (ClipScore(scorer).compute(some, [], Ui())[0]["value"] for some in (images, turned))
    assert one == pytest.approx(other, rel=1e-9)


def test_long_prompts_are_counted(scorer):
    assert scorer.cut(["a red circle", "a red circle " * 60, "a blue square " * 90]) == 2


def test_pictures_without_prompts_are_refused(scorer):
    bare = ImageSet("bare", tuple(EvalImage(e.name, e.digest, e.load) for e in drawn(4).entries))
    with pytest.raises(DataError, match="4 of 4 images have no prompt") as caught:
        ClipScore(scorer).compute(bare, [], Ui())
    assert caught.value.code == "BF-DATA-007"


def test_clustered_error():
    draw = np.random.default_rng(0)
    alone = draw.standard_normal(50).tolist()
    assert clustered_error(alone, range(50)) == pytest.approx(np.std(alone, ddof=1) / np.sqrt(50))
    fourfold = [value for value in alone for _ in range(4)]
    assert clustered_error(fourfold, [i // 4 for i in range(200)]) == pytest.approx(clustered_error(alone, range(50)))
    assert clustered_error([1.0, 2.0], "aa") == 0.0
    with pytest.raises(ValueError):
        clustered_error([], [])
