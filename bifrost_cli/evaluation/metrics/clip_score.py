"""CLIPScore as a measure: how near each image is to its prompt, in a named CLIP.

Comes in: images with prompts, a scorer. Goes out: the two numbers that go by this name, each under its own. The
standard error is clustered by prompt, because images of one prompt are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bifrost_cli.data.image_sets import EvalImage, ImageSet
from bifrost_cli.errors import DataError
from bifrost_cli.evaluation.metrics.metric import Line, Metric
from bifrost_cli.evaluation.networks.clip_scorer import HESSEL_PREFIX, HESSEL_WEIGHT, ClipScorer
from bifrost_cli.evaluation.networks.feature_network import BATCH
from bifrost_cli.runtime.ui import Ui
from bifrost_cli.stats import clustered_error


class ClipScoreMetric(Metric):
    """Both numbers that go by the name of CLIPScore."""

    name = "clipscore"

    def __init__(self, scorer: ClipScorer) -> None:
        self._scorer, self.identity = scorer, scorer.identity

    def results(self, images: ImageSet, lines: Sequence[Line], ui: Ui) -> list[dict[str, Any]]:
        return clip_score_results(images, self._scorer, ui)

    def settings(self) -> dict[str, str]:
        return {"CLIP": self.identity["name"], "CLIP, sha256": self.identity["weights"]}


def clip_score_results(images: ImageSet, scorer: ClipScorer, ui: Ui) -> list[dict[str, Any]]:
    """`clip_cosine_x100` and `clipscore_hessel`. DataError BF-DATA-007: images without a prompt."""
    entries = images.entries
    if bare := [entry.name for entry in entries if not entry.prompt]:
        raise DataError(
            f"{len(bare)} of {len(entries)} images have no prompt to compare with",
            at=", ".join(bare[:5]),
            fix="give a samples artifact, or a folder with captions; or leave out --clipscore",
            code="BF-DATA-007",
        )
    plain_N, prefixed_N = _cosines(entries, scorer, ui)
    prompts = [str(entry.prompt) for entry in entries]
    cut = scorer.cut(sorted(set(prompts)))
    details = [f"{cut} prompts are longer than this CLIP reads, and are cut"] if cut else []
    values = {
        "clip_cosine_x100": ("CLIP cosine x 100", 100 * np.maximum(plain_N, 0)),
        "clipscore_hessel": ("CLIPScore (Hessel)", HESSEL_WEIGHT * np.maximum(prefixed_N, 0)),
    }
    return [_result(name, label, scores_N, prompts, scorer, details) for name, (label, scores_N) in values.items()]


def _cosines(entries: tuple[EvalImage, ...], scorer: ClipScorer, ui: Ui) -> tuple[np.ndarray, np.ndarray]:
    plain, prefixed = [], []
    with ui.progress(len(entries), "CLIPScore") as bar:
        for start in range(0, len(entries), BATCH):
            batch = entries[start : start + BATCH]
            filled = [*batch, *[batch[0]] * (BATCH - len(batch))]  # one batch size: bits that do not depend on N
            pixels_BHWc = np.stack([scorer.prepare(entry.load()) for entry in filled])
            texts = [str(entry.prompt) for entry in filled]
            plain.append(scorer.cosines(pixels_BHWc, texts)[: len(batch)])
            prefixed.append(scorer.cosines(pixels_BHWc, [HESSEL_PREFIX + text for text in texts])[: len(batch)])
            bar.advance(len(batch))
    return np.concatenate(plain), np.concatenate(prefixed)


def _result(
    name: str, label: str, scores_N: np.ndarray, prompts: list[str], scorer: ClipScorer, details: list[str]
) -> dict[str, Any]:
    error, clusters = clustered_error(scores_N.tolist(), prompts), len(set(prompts))
    rule = "2.5 max(cos, 0) on 'A photo depicts ' + prompt" if name == "clipscore_hessel" else "100 max(cos, 0)"
    return {
        "metric": name,
        "label": label,
        "format": "number",
        "value": float(scores_N.mean()),
        "standard_error": error,
        "spread": f"standard error {error:.2g}, {clusters} prompts",
        "details": details,
        "n_gen": len(scores_N),
        "extractor": scorer.identity,
        "sentence": f"Mean of {rule} over {len(scores_N)} images, by {scorer.identity['name']} (weights "
        f"{scorer.identity['weights'][:12]}). Compare only with numbers of the same CLIP and rule.",
    }
