"""CLIPScore: how near each image is to its prompt, in a named CLIP. Two numbers go by this name; both are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bifrost_cli.errors import DataError
from bifrost_cli.evaluation.metrics.metric import Line, Metric, MetricInputs, row

if TYPE_CHECKING:
    from bifrost_cli.data.image_sets import ImageSet
    from bifrost_cli.evaluation.networks.feature_network import ClipScorer
    from bifrost_cli.runtime.ui import Ui

# label, factor of max(cos, 0), what stands before the prompt, the rule in words
_RULES = {"clip_cosine_x100": ("CLIP cosine x 100", 100, "", "100 max(cos, 0)"),
          "clipscore_hessel": ("CLIPScore (Hessel)", 2.5, "A photo depicts ",
                               "2.5 max(cos, 0) on 'A photo depicts ' + prompt")}  # fmt: skip


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

        from bifrost_cli.evaluation.networks.feature_network import BATCH

        entries, scorer = images.entries, self._scorer
        if bare := [entry.name for entry in entries if not entry.prompt]:
            raise DataError(
                f"{len(bare)} of {len(entries)} images have no prompt to compare with", at=", ".join(bare[:5]),
                fix="give a samples artifact, or a folder with captions; or leave out --clipscore", code="BF-DATA-007",
            )  # fmt: skip
        cosines: dict[str, list[float]] = {name: [] for name in _RULES}
        with ui.progress(len(entries), "CLIPScore") as bar:
            for start in range(0, len(entries), BATCH):
                batch = entries[start : start + BATCH]
                filled = [*batch, *[batch[0]] * (BATCH - len(batch))]  # one batch size: bits that do not depend on N
                image_BD = scorer.features(np.stack([scorer.prepare(entry.load()) for entry in filled]))
                for name, (_, _, prefix, _) in _RULES.items():
                    found = scorer.cosines(image_BD, [f"{prefix}{entry.prompt}" for entry in filled])
                    cosines[name] += found[: len(batch)].tolist()
                bar.advance(len(batch))
        prompts = [str(entry.prompt) for entry in entries]
        cut = scorer.cut(sorted(set(prompts)))
        details = [f"{cut} prompts are longer than this CLIP reads, and are cut"] if cut else []
        return [self._row(name, np.array(values), prompts, details) for name, values in cosines.items()]

    def _row(self, name: str, cosine_N: Any, prompts: list[str], details: list[str]) -> dict[str, Any]:
        from bifrost_cli.stats import clustered_error

        (label, factor, _, rule), identity, count = _RULES[name], self.identity, len(set(prompts))
        scores_N = factor * cosine_N.clip(0)
        error = clustered_error(scores_N.tolist(), prompts)
        known: dict[str, Any] = {"standard_error": error} if count > 1 else {}
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
