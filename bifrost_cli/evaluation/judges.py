"""Judges of single images: a Mask2Former for objects, a CLIP for their colours, a multimodal LLM for questions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from math import isnan
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from bifrost_cli.data.safetensors_io import weights_hash
from bifrost_cli.errors import ArtifactError, DataError
from bifrost_cli.evaluation.metrics.geneval import COLORS, THRESHOLD, Detection
from bifrost_cli.evaluation.networks import ClipScorer
from bifrost_cli.models.mllm.frozen_mllm import Mllm

# What GenEval calls some of COCO's classes, by the names that checkpoints give them.
NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard", "motorbike": "motorcycle",
         "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant", "diningtable": "dining table",
         "tvmonitor": "tv"}  # fmt: skip
PREPROCESSING = ("size", "size_divisor", "image_mean", "image_std", "resample", "rescale_factor")
GREY = 0x99  # what is behind an object when its colour is asked for
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
ANSWERS = {"yes": ("yes", "Yes", " yes", " Yes", "YES"), "no": ("no", "No", " no", " No", "NO")}
INSTRUCTION = "{question} Answer yes or no."


class Detector:
    """`model`: Mask2FormerForUniversalSegmentation with COCO's labels; `processor`: its image processor."""

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        self._model, self._processor = model.eval().requires_grad_(False), processor
        self.classes = {number: NAMES.get(label, label) for number, label in model.config.id2label.items()}
        self.device, settings = str(model.device), processor.to_dict()
        self.identity: dict[str, Any] = {
            "name": name, "family": "mask2former", "weights": weights_hash(model.state_dict()),
            "preprocessing": {key: settings.get(key) for key in PREPROCESSING},
        }  # fmt: skip

    @torch.inference_mode()
    def objects(self, rgb_HWc: np.ndarray) -> dict[str, list[Detection]]:
        """Every object whose score reaches GenEval's lower bar, by class; boxes are those of the masks."""
        inputs = self._processor(images=np.array(rgb_HWc), input_data_format="channels_last", return_tensors="pt")
        outputs = self._model(**inputs.to(self._model.device))
        _require_numbers(outputs.class_queries_logits.cpu().numpy(), self.identity["name"])
        (result,) = self._processor.post_process_instance_segmentation(
            outputs, threshold=THRESHOLD, target_sizes=[rgb_HWc.shape[:2]], return_binary_maps=True
        )
        objects: dict[str, list[Detection]] = defaultdict(list)
        for mask_HW, segment in zip(result["segmentation"], result["segments_info"], strict=False):
            mask_HW = mask_HW.cpu().numpy() > 0.5
            rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
            box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
            objects[self.classes[segment["label_id"]]].append(Detection(box, float(segment["score"]), mask_HW))
        return dict(objects)


class ColourNamer:
    """The colour of an object among COLORS: its crop, all else grey, against three phrases a colour, in a CLIP."""

    def __init__(self, scorer: ClipScorer) -> None:
        self._scorer, self.identity = scorer, scorer.identity
        self._directions = cache(self._directions_of)

    def colours(self, rgb_HWc: np.ndarray, objects: Sequence[Detection], name: str) -> list[str]:
        """One of COLORS an object of the class `name`. DataError: embeddings that are not finite."""
        crops = []
        for found in objects:
            left, top, right, bottom = map(round, found.box)
            shown = rgb_HWc if found.mask_HW is None else np.where(found.mask_HW[..., None], rgb_HWc, np.uint8(GREY))
            crops.append(self._scorer.prepare(shown[top : max(bottom, top + 1), left : max(right, left + 1)]))
        scores_BK = self._scorer.features(np.stack(crops)).astype(np.float64) @ self._directions(name).T
        _require_numbers(scores_BK, self.identity["name"])
        return [COLORS[index] for index in scores_BK.argmax(1)]

    def _directions_of(self, name: str) -> np.ndarray:
        """One a colour (10, D): the mean of its phrases' directions."""
        phrases = [phrase.format(colour=colour, name=name) for colour in COLORS for phrase in TEMPLATES]
        unit_TD = normalize(torch.from_numpy(self._scorer.texts(phrases)))
        return normalize(unit_TD.unflatten(0, (len(COLORS), -1)).mean(1)).numpy()


def _require_numbers(scores: np.ndarray, name: str) -> None:
    if not np.isfinite(scores).all():
        raise DataError(f"{name} gives scores that are not finite (NaN or infinity)", code="BF-DATA-009",
                        fix="its weights are damaged; fetch them again")  # fmt: skip


class VqaJudge:
    """The probability that the answer to a question about an image is yes: the first word's probabilities decide, so
    that an answer in many words, or in none, is still one of the two."""

    def __init__(self, mllm: Mllm, name: str) -> None:
        self._mllm, tokenizer, first = mllm, mllm.tokenizer, {}
        for answer, words in ANSWERS.items():
            ids = [tokenizer(word, add_special_tokens=False)["input_ids"][:1] for word in words]
            first[answer] = {token for tokens in ids for token in tokens} - {tokenizer.unk_token_id}
        self._yes, self._no = sorted(first["yes"] - first["no"]), sorted(first["no"] - first["yes"])
        if not (self._yes and self._no):
            raise ArtifactError(f"{name} has no words for yes and no, so it cannot judge", fix="give another --judge",
                                code="BF-ART-009")  # fmt: skip
        self.device = str(mllm.device)
        self.identity: dict[str, Any] = {"name": name, "weights": mllm.weights_hash(), "instruction": INSTRUCTION}

    def yes(self, rgb_HWc: np.ndarray, question: str) -> float:
        """P(yes) / (P(yes) + P(no)) of the first token, over the ways to write them. DataError: that is no number."""
        inputs = self._mllm.question(rgb_HWc, INSTRUCTION.format(question=question))
        last_V = self._mllm.logits(**inputs)[0, -1].double()
        share = float((last_V[self._yes].logsumexp(0) - last_V[self._no].logsumexp(0)).sigmoid())
        if isnan(share):
            raise DataError(f"{self.identity['name']} gives no number for {question!r}", code="BF-DATA-009",
                            fix="damaged weights, or a dtype too small: --set models.dtype=float32")  # fmt: skip
        return share
