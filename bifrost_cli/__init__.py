"""Bifrost: a frozen multimodal LLM and a frozen diffusion model, joined by patch-level CLIP latents.

The five stages are plain functions that take a recipe and return an artifact; each is imported when it is first used,
so that `import bifrost_cli` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "extract_latents": "bifrost_cli.extraction.extract",
    "train_branch": "bifrost_cli.training.train_branch",
    "train_controlnet": "bifrost_cli.training.train_controlnet",
    "generate": "bifrost_cli.generation.generate",
    "evaluate": "bifrost_cli.evaluation.evaluate",
    "load_recipe": "bifrost_cli.config.load",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'bifrost_cli' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
