"""A tiny open_clip model with random weights, in the folder that open_clip itself reads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from open_clip.model import CLIP
from safetensors.torch import save_file

WIDTH, SIZE = 12, 32
MODEL = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": "shortest"}


def save_tiny_clip(folder: Path, seed: int = 0, **changes: object) -> Path:
    """Write `open_clip_config.json` and `open_clip_model.safetensors`; `changes` go into the model's configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config = {**MODEL, **changes}
    save_file(CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    text = json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS})
    (folder / "open_clip_config.json").write_text(text)
    return folder
