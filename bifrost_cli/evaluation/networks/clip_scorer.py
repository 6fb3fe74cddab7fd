"""CLIPScore: the cosine between a CLIP's embedding of an image and of a text.

Comes in: an open_clip model, its tokenizer, images and texts. Goes out: one cosine a pair. Papers print two numbers
under one name: 100 * max(cos, 0), and Hessel et al. 2021's 2.5 * max(cos, 0) on "A photo depicts " + text; this file
gives the cosines and does not choose. Does not know where weights lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from bifrost_cli.evaluation.networks.feature_network import ClipFeatures

HESSEL_PREFIX, HESSEL_WEIGHT = "A photo depicts ", 2.5
_LONGER = 8  # a text is tokenized at this many context lengths to see whether it is cut


class ClipScorer:
    """`tokenize(texts, context_length)` is open_clip's own tokenizer."""

    def __init__(self, model: torch.nn.Module, tokenize: Callable, name: str) -> None:
        self._features, self._model, self._tokenize = ClipFeatures(model, name), model, tokenize
        self.identity, self.prepare = self._features.identity, self._features.prepare

    def cosines(self, pixels_BHWc: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """Prepared images uint8 (B, S, S, 3) and as many texts -> cosines (B,) float64."""
        image_BD, text_BD = self.images(pixels_BHWc), self.texts(texts)
        norms_B = np.linalg.norm(image_BD, axis=1) * np.linalg.norm(text_BD, axis=1)
        return (image_BD * text_BD).sum(axis=1) / norms_B

    def cut(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than the model reads (77 tokens for most)."""
        length = self._tokenize(["a"]).shape[1]
        ids_BT = torch.cat([self._tokenize([text], _LONGER * length) for text in texts])
        return int((ids_BT[:, length:] != ids_BT[:, -1:]).any(dim=1).sum())

    def images(self, pixels_BHWc: np.ndarray) -> np.ndarray:
        """Embeddings (B, D) float32 of prepared images, not normalised."""
        return self._features.features(pixels_BHWc)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings (B, D) float64 of texts, not normalised."""
        ids_BT = self._tokenize(list(texts)).to(self._features.device)
        return self._model.encode_text(ids_BT).double().cpu().numpy()
