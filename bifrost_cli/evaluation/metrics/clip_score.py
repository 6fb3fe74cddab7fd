"""CLIPScore: how near each image is to its prompt, in a named CLIP. Two numbers go by this name; both are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bifrost_cli.errors import DataError
from bifrost_cli.evaluation.metrics.metric import Line, Metric, MetricInputs, row

if TYPE_CHECKING:
    import numpy as np

    from bifrost_cli.data.image_sets import EvalImage, ImageSet
    from bifrost_cli.evaluation.networks.feature_network import ClipScorer
    from bifrost_cli.runtime.ui import Ui

_RULES = {"clip_cosine_x100": ("CLIP cosine x 100", "100 max(cos, 0)"),
          "clipscore_hessel": ("CLIPScore (Hessel)", "2.5 max(cos, 0) on 'A photo depicts ' + prompt")}  # fmt: skip


class ClipScore(Metric):
    """CLIP cosine x 100, and CLIPScore as Hessel et al. 2021 define it."""

    name, help = "clipscore", "Image against prompt, in a CLIP."
    protocol = (
        "Two numbers share this name and both are given: 100 max(cos, 0), and Hessel's 2.5 max(cos, 0) on 'A photo "
        "depicts ' + prompt. Errors are clustered by prompt."
    )
    needs_prompts, keys = True, ("clip",)

    def __init__(self, scorer: ClipScorer) -> None:
        self._scorer, self.identity = scorer, scorer.identity

    @classmethod
    def load(cls, inputs: MetricInputs) -> ClipScore:
        return cls(load_scorer(inputs))

    def compute(self, images: ImageSet, lines: Sequence[Line], ui: Ui) -> list[dict[str, Any]]:
        import numpy as np

        entries, scorer = images.entries, self._scorer
        if bare := [entry.name for entry in entries if not entry.prompt]:
            raise DataError(
                f"{len(bare)} of {len(entries)} images have no prompt to compare with",
                at=", ".join(bare[:5]),
                fix="give a samples artifact, or a folder with captions; or leave out --clipscore",
                code="BF-DATA-007",
            )
        plain_N, prefixed_N = self._cosines(entries, ui)
        prompts = [str(entry.prompt) for entry in entries]
        cut = scorer.cut(sorted(set(prompts)))
        details = [f"{cut} prompts are longer than this CLIP reads, and are cut"] if cut else []
        scores = {"clip_cosine_x100": 100 * np.maximum(plain_N, 0), "clipscore_hessel": 2.5 * np.maximum(prefixed_N, 0)}
        return [self._row(name, scores_N, prompts, details) for name, scores_N in scores.items()]

    def _cosines(self, entries: Sequence[EvalImage], ui: Ui) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        from bifrost_cli.evaluation.networks.feature_network import BATCH, HESSEL_PREFIX

        scorer, plain, prefixed = self._scorer, [], []
        with ui.progress(len(entries), "CLIPScore") as bar:
            for start in range(0, len(entries), BATCH):
                batch = list(entries[start : start + BATCH])
                filled = batch + [batch[0]] * (BATCH - len(batch))  # one batch size: bits that do not depend on N
                pixels_BHWc = np.stack([scorer.prepare(entry.load()) for entry in filled])
                texts = [str(entry.prompt) for entry in filled]
                plain.append(scorer.cosines(pixels_BHWc, texts)[: len(batch)])
                prefixed.append(scorer.cosines(pixels_BHWc, [HESSEL_PREFIX + text for text in texts])[: len(batch)])
                bar.advance(len(batch))
        return np.concatenate(plain), np.concatenate(prefixed)

    def _row(self, name: str, scores_N: np.ndarray, prompts: list[str], details: list[str]) -> dict[str, Any]:
        from bifrost_cli.stats import clustered_error

        (label, rule), error, count = _RULES[name], clustered_error(scores_N.tolist(), prompts), len(set(prompts))
        known: dict[str, Any] = {"standard_error": error} if count > 1 else {}
        identity = self.identity
        return row(
            name, label, float(scores_N.mean()), n_gen=len(scores_N), extractor=identity, details=details, **known,
            spread=f"standard error {error:.2g}, {count} prompts" if known else "one prompt, so its error is unknown",
            sentence=f"Mean of {rule} over {len(scores_N)} images, by {identity['name']} (weights "
            f"{identity['weights'][:12]}). Compare only with numbers of the same CLIP and rule.",
        )  # fmt: skip

    def settings(self) -> dict[str, str]:
        return {"CLIP": self.identity["name"], "CLIP, sha256": self.identity["weights"]}


def load_scorer(inputs: MetricInputs) -> ClipScorer:
    """The recipe's CLIP (`evaluate.clip`), loaded once for all metrics that use it."""
    from bifrost_cli.evaluation.networks.feature_network import ClipScorer
    from bifrost_cli.loading.open_clip_models import features_name, load_open_clip, load_tokenizer

    ref = inputs.settings.clip
    return inputs.share(
        ("clip", ref), lambda: ClipScorer(load_open_clip(ref, inputs.device), load_tokenizer(ref), features_name(ref))
    )
