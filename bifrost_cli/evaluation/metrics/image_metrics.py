"""Metrics of single images: the built-in world's checker, CLIPScore, and reconstructions against their originals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bifrost_cli.errors import DataError, EnvironmentProblem, UsageError
from bifrost_cli.evaluation.metrics.metric import Line, Metric, MetricInputs, row

if TYPE_CHECKING:
    import numpy as np

    from bifrost_cli.data.image_sets import EvalImage, ImageSet
    from bifrost_cli.evaluation.networks import ClipScorer, Lpips
    from bifrost_cli.models.encoders import Encoder
    from bifrost_cli.runtime.ui import Ui

# label, factor of max(cos, 0), what stands before the prompt, the rule in words
_CLIP_RULES = {"clip_cosine_x100": ("CLIP cosine x 100", 100, "", "100 max(cos, 0)"),
          "clipscore_hessel": ("CLIPScore (Hessel)", 2.5, "A photo depicts ",
                               "2.5 max(cos, 0) on 'A photo depicts ' + prompt")}  # fmt: skip
PROTOCOL = "bifrost-reconstruction/1"
_PAIR_RULES = {
    "psnr": ("PSNR", "10 log10(255^2 / MSE) in dB"),
    "ssim": ("SSIM", "Wang et al. 2004: Gaussian windows of 11x11, deviation 1.5, the mean over channels"),
    "lpips": ("LPIPS", "Zhang et al. 2018, version 0.1 with AlexNet"),
    "latents_cosine": ("Cosine of latents", "the mean over patches of the cosine between the latents of both images"),
}


class ShapesAccuracy(Metric):
    """The share of images that show their prompts."""

    name, help = "shapes", "Accuracy by the built-in world's checker."
    protocol = (
        "The built-in world's checker: objects, colours, counts, places and a named background are all as the prompt "
        "says, with Wilson's 95 % intervals."
    )
    gates, needs_prompts = ("shapes_accuracy",), True
    identity = {"checker": "shapes"}

    def compute(self, images: ImageSet, lines: Sequence[Line], ui: Ui) -> list[dict[str, Any]]:
        from bifrost_cli.shapes.world import WORLDS, world

        with ui.progress(len(lines), "checking images") as bar:
            for line, entry in zip(lines, images.entries, strict=True):
                line.update(judge(entry))
                bar.advance(1)
        counted = [line for line in lines if line["right"] is not None]
        if not counted:
            why = "has a prompt of the built-in world, so the checker cannot judge them"
            fix = 'make some: bifrost generate "a red circle above a blue square" -o DIR; or leave out --shapes'
            raise DataError(f"none of {len(lines)} images {why}", fix=fix, code="BF-DATA-007")
        total = share("all", counted)
        low, high = total["interval95"]
        names = dict.fromkeys(name for known in map(world, WORLDS) for name in known.categories)
        by_category = [share(name, [line for line in counted if line["category"] == name]) for name in names]
        return [row(
            "shapes_accuracy", "Images that show their prompt", total.pop("value"), format="share", n_gen=len(counted),
            spread=f"{total['right']} of {total['count']}, 95 %: {low:.1%} to {high:.1%}", **total,
            categories=[found for found in by_category if found], not_judged=len(lines) - len(counted),
            sentence="By the programmatic checker: objects, colours, counts, places and a named background all as the "
            f"prompt says, {len(counted)} images of the built-in world, judged once each.",
        )]  # fmt: skip

    def warnings(self, images: ImageSet, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        found, prompts = [], [line["prompt"] for line in lines if line["right"] is not None]
        if len(set(prompts)) < len(prompts):
            found.append("Some prompts occur more than once; the intervals count each image as independent.")
        if unjudged := sum(line["right"] is None for line in lines):
            found.append(f"{unjudged} of {len(lines)} images were not judged: their prompts are not of the built-in "
                         "world.")  # fmt: skip
        return found


def judge(entry: EvalImage) -> dict[str, Any]:
    """The checker's verdict on an image; `right` is None when its prompt is not of the built-in world."""
    from bifrost_cli.shapes.world import world_of_size

    rgb = entry.load()
    shapes = world_of_size(rgb.shape[0])
    try:
        prompt = shapes.parse(entry.prompt or "")
    except ValueError:
        return {"category": None, "right": None, "why": "not judged: not a prompt of the built-in world"}
    verdict = shapes.check(prompt, rgb)
    return {"category": prompt.category, "right": bool(verdict.right), "why": verdict.why}


def share(name: str, lines: Sequence[Mapping[str, Any]], by_prompt: bool = False) -> dict[str, Any]:
    """How many of the lines are `right`, with Wilson's interval, or one clustered by prompt; {} for no lines."""
    from bifrost_cli.stats import clustered_interval

    if not lines:
        return {}
    right = [int(line["right"]) for line in lines]
    clusters = [line["prompt"] for line in lines] if by_prompt else range(len(lines))
    return {"name": name, "value": sum(right) / len(lines), "interval95": list(clustered_interval(right, clusters)),
            "right": sum(right), "count": len(lines)}  # fmt: skip


class ClipScore(Metric):
    """CLIP cosine x 100, and CLIPScore as Hessel et al. 2021 define it."""

    name, help = "clipscore", "Image against prompt, in a CLIP."
    protocol = (
        "Two numbers share this name and both are given: 100 max(cos, 0), and Hessel's 2.5 max(cos, 0) on 'A photo "
        "depicts ' + prompt. Errors are clustered by prompt."
    )
    rows, needs_prompts, keys = tuple(_CLIP_RULES), True, ("clip",)

    def __init__(self, scorer: ClipScorer) -> None:
        self._scorer, self.identity = scorer, scorer.identity

    @classmethod
    def load(cls, inputs: MetricInputs) -> ClipScore:
        return cls(load_scorer(inputs))

    def compute(self, images: ImageSet, lines: Sequence[Line], ui: Ui) -> list[dict[str, Any]]:
        import numpy as np

        from bifrost_cli.evaluation.networks import BATCH

        entries, scorer = images.entries, self._scorer
        if bare := [entry.name for entry in entries if not entry.prompt]:
            raise DataError(
                f"{len(bare)} of {len(entries)} images have no prompt to compare with", at=", ".join(bare[:5]),
                fix="give a samples artifact, or a folder with captions; or leave out --clipscore", code="BF-DATA-007",
            )  # fmt: skip
        cosines: dict[str, list[float]] = {name: [] for name in _CLIP_RULES}
        with ui.progress(len(entries), "CLIPScore") as bar:
            for start in range(0, len(entries), BATCH):
                batch = entries[start : start + BATCH]
                filled = [*batch, *[batch[0]] * (BATCH - len(batch))]  # one batch size: bits that do not depend on N
                image_BD = scorer.features(np.stack([scorer.prepare(entry.load()) for entry in filled]))
                for name, (_, _, prefix, _) in _CLIP_RULES.items():
                    found = scorer.cosines(image_BD, [f"{prefix}{entry.prompt}" for entry in filled])
                    cosines[name] += found[: len(batch)].tolist()
                bar.advance(len(batch))
        prompts = [str(entry.prompt) for entry in entries]
        cut = scorer.cut(sorted(set(prompts)))
        details = [f"{cut} prompts are longer than this CLIP reads, and are cut"] if cut else []
        return [self._row(name, np.array(values), prompts, details) for name, values in cosines.items()]

    def _row(self, name: str, cosine_N: Any, prompts: list[str], details: list[str]) -> dict[str, Any]:
        from bifrost_cli.stats import clustered_error

        (label, factor, _, rule), identity, count = _CLIP_RULES[name], self.identity, len(set(prompts))
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
    from bifrost_cli.evaluation.networks import ClipScorer
    from bifrost_cli.loading.open_clip_models import features_name, load_open_clip, load_tokenizer

    ref = inputs.settings.clip
    return inputs.share(
        ("clip", ref), lambda: ClipScorer(load_open_clip(ref, inputs.device), load_tokenizer(ref), features_name(ref))
    )


class Reconstruction(Metric):
    """Each image against its original, in the same order; `lpips` is the network, or why it is left out."""

    name, help = "reconstruction", "Generate --reference again; PSNR, SSIM, LPIPS, rFID."
    protocol = (
        f"{PROTOCOL}: each image of the reference becomes a square, patch latents, and an image again (the diffusion "
        "model reads no text; the recipe's steps and scale, seed 0). PSNR, SSIM and LPIPS compare uint8 with uint8, "
        "image by image; then means with standard errors. The cosine is that of both images' latents; rFID the "
        "Frechet distance to the originals."
    )
    rows, needs_reference, reconstructs, keys = tuple(_PAIR_RULES), True, True, ("lpips_weights",)

    def __init__(self, originals: ImageSet, encoder: Encoder, lpips: Lpips | str) -> None:
        self._originals, self._encoder, self._lpips = originals, encoder, lpips
        network = None if isinstance(lpips, str) else lpips.identity
        self.identity = {"originals": originals.digest, "encoder": encoder.identity, "lpips": network,
                         "protocol": PROTOCOL}  # fmt: skip
        self.packages = ("lpips",) if network else ()

    @classmethod
    def check(cls, request: Any) -> None:
        if request.samples is not None or request.prompts is not None:
            raise UsageError("--reconstruction generates the images of --reference again; it measures no others",
                             fix="leave out --samples and --prompts, or --reconstruction")  # fmt: skip

    @classmethod
    def load(cls, inputs: MetricInputs) -> Reconstruction:
        from bifrost_cli.evaluation.networks import load_lpips
        from bifrost_cli.loading.loaders import ModelLoader

        try:
            lpips: Lpips | str = load_lpips(inputs.settings, inputs.device)
        except EnvironmentProblem as error:
            if inputs.settings.lpips_weights:  # the recipe names a file, so that file must be there
                raise
            lpips = f"{error.message}. {error.at}; {error.fix}"
        encoder = ModelLoader(inputs.models, inputs.device).encoder(inputs.latents, inputs.rules)
        assert inputs.reference is not None and inputs.reference.images is not None  # `needs_reference`, `reconstructs`
        return cls(inputs.reference.images, encoder, lpips)

    def compute(self, images: ImageSet, lines: Sequence[Line], ui: Ui) -> list[dict[str, Any]]:
        with ui.progress(len(lines), "comparing with the originals") as bar:
            for line, made, true in zip(lines, images.entries, self._originals.entries, strict=True):
                line["numbers"] = self._numbers(made.load(), true.load())
                bar.advance(1)
        names = [name for name in _PAIR_RULES if any(line["numbers"].get(name) is not None for line in lines)]
        return [self._row(name, [line["numbers"][name] for line in lines]) for name in names]

    def _numbers(self, made_HWC: np.ndarray, true_HWC: np.ndarray) -> dict[str, float | None]:
        """Of one image; equal images have no finite PSNR: None, as JSON knows no infinity."""
        import torch

        from bifrost_cli.data.images import square
        from bifrost_cli.evaluation.formulas import psnr, ssim

        decibels, size = psnr(made_HWC, true_HWC), self._encoder.image_size
        numbers = {"psnr": decibels if math.isfinite(decibels) else None, "ssim": ssim(made_HWC, true_HWC)}
        if not isinstance(self._lpips, str):
            numbers["lpips"] = self._lpips.distance(made_HWC, true_HWC)
        with torch.no_grad():
            made_PC, true_PC = (self._encoder.encode(square(rgb_HWC, size)[None].copy())[0].double().cpu()
                                for rgb_HWC in (made_HWC, true_HWC))  # fmt: skip
        numbers["latents_cosine"] = float(torch.cosine_similarity(made_PC, true_PC, dim=-1).mean())
        return numbers

    def _row(self, name: str, values: Sequence[float | None]) -> dict[str, Any]:
        """The mean over the images that have a value, at least one; the others equal their originals."""
        import numpy as np

        label, rule = _PAIR_RULES[name]
        finite = np.array([value for value in values if value is not None], np.float64)
        count, equal = len(finite), len(values) - len(finite)
        deviation = float(finite.std(ddof=1)) if count > 1 else 0.0
        extractor = {"lpips": self.identity["lpips"], "latents_cosine": self._encoder.identity}.get(name)
        return row(
            name, label, float(finite.mean()), n_gen=count, sd=deviation, protocol=PROTOCOL, extractor=extractor,
            standard_error=deviation / math.sqrt(count), equal=equal,
            spread=f"standard deviation {deviation:.3g} over images",
            details=[f"{equal} images are equal to the last bit and not in the mean"] if equal else [],
            sentence=f"Mean over {count} images, each against its original as uint8: {rule}.",
        )  # fmt: skip

    def settings(self) -> dict[str, str]:
        height, width = self._encoder.grid
        return {"patch latents": f"{height}x{width} of {self._encoder.identity['name']}"}

    def warnings(self, images: ImageSet, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        found = [f"LPIPS is left out: {self._lpips}"] if isinstance(self._lpips, str) else []
        if all(line["numbers"]["psnr"] is None for line in lines):
            found.append("PSNR is left out: every image is equal to its original to the last bit.")
        return found
