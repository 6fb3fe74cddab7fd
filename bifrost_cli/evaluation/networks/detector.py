"""Objects in an image, by a Mask2Former of transformers, and their colours, by an open_clip model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from bifrost_cli.data.safetensors_io import weights_hash
from bifrost_cli.errors import DataError
from bifrost_cli.evaluation.benchmarks.geneval_rules import COLORS, THRESHOLD, Detection
from bifrost_cli.evaluation.networks.feature_network import ClipScorer

# What GenEval calls some of COCO's classes, by the names that checkpoints give them.
NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard", "motorbike": "motorcycle",
         "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant", "diningtable": "dining table",
         "tvmonitor": "tv"}  # fmt: skip
GREY = 0x99  # what is behind an object when its colour is asked for
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")


class Detector:
    """`model`: Mask2FormerForUniversalSegmentation with COCO's labels; `processor`: its image processor."""

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        self._model, self._processor = model.eval().requires_grad_(False), processor
        self.classes = {number: NAMES.get(label, label) for number, label in model.config.id2label.items()}
        self.device = str(model.device)
        self.identity: dict[str, Any] = {
            "name": name, "family": "mask2former", "weights": weights_hash(model.state_dict()),
            "preprocessing": _plain(processor.to_dict()),
        }  # fmt: skip

    @torch.inference_mode()
    def objects(self, rgb_HWc: np.ndarray) -> dict[str, list[Detection]]:
        """Every object whose score reaches GenEval's lower bar, by class; boxes are those of the masks.

        DataError: scores that are not finite, which would read as an image of nothing.
        """
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
        self._classes = cache(self._of_class)

    def colours(self, rgb_HWc: np.ndarray, objects: Sequence[Detection], name: str) -> list[str]:
        """One of COLORS an object. DataError: embeddings that are not finite."""
        crops = [self._scorer.prepare(_crop(rgb_HWc, found)) for found in objects]
        images_BD = self._scorer.images(np.stack(crops)).astype(np.float64)
        scores_BK = images_BD @ self._classes(name).T
        _require_numbers(scores_BK, self.identity["name"])
        return [COLORS[index] for index in scores_BK.argmax(1)]

    def _of_class(self, name: str) -> np.ndarray:
        """One direction a colour (10, D): the mean of its phrases' directions."""
        rows = []
        for colour in COLORS:
            texts_3D = self._scorer.texts([phrase.format(colour=colour, name=name) for phrase in TEMPLATES])
            mean_D = (texts_3D / np.linalg.norm(texts_3D, axis=1, keepdims=True)).mean(0)
            rows.append(mean_D / np.linalg.norm(mean_D))
        return np.stack(rows)


def _crop(rgb_HWc: np.ndarray, found: Detection) -> np.ndarray:
    left, top, right, bottom = (round(edge) for edge in found.box)
    shown = rgb_HWc if found.mask_HW is None else np.where(found.mask_HW[..., None], rgb_HWc, np.uint8(GREY))
    return shown[top : max(bottom, top + 1), left : max(right, left + 1)]


def _require_numbers(scores: np.ndarray, name: str) -> None:
    if not np.isfinite(scores).all():
        raise DataError(f"{name} gives scores that are not finite (NaN or infinity)", code="BF-DATA-009",
                        fix="its weights are damaged; fetch them again")  # fmt: skip


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings.get(name) for name in ("size", "size_divisor", "image_mean", "image_std", "resample",
                                                  "rescale_factor")}  # fmt: skip
