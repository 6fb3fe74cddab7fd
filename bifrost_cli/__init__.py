"""Bifrost: a frozen multimodal LLM and a frozen diffusion model, joined by patch-level CLIP latents.

    from bifrost_cli import BifrostPipeline
    pipe = BifrostPipeline.from_pretrained("builtin")
    pipe("a red circle above a blue square", seed=0).images[0].save("out.png")

Every command is a function here with the command's words. Each is imported when it is first used, so that
`import bifrost_cli` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"

_WHERE = {
    "BifrostDecoderBlock": "bifrost_cli.generation.modular_block",
    "BifrostPipeline": "bifrost_cli.generation.pipeline",
    "LatentsStore": "bifrost_cli.data.latents.reader",
    "ask": "bifrost_cli.generation.ask",
    "decode": "bifrost_cli.generation.edit",
    "edit": "bifrost_cli.generation.edit",
    "evaluate": "bifrost_cli.evaluation.evaluate",
    "export": "bifrost_cli.interop.export",
    "extract_latents": "bifrost_cli.extraction.extract",
    "fetch": "bifrost_cli.evaluation.benchmark_files",
    "from_hub": "bifrost_cli.loading.hub_artifacts",
    "generate": "bifrost_cli.generation.generate",
    "import_checkpoint": "bifrost_cli.interop.import_checkpoint",
    "load_recipe": "bifrost_cli.config.load",
    "mix": "bifrost_cli.generation.edit",
    "plan": "bifrost_cli.planning.plan",
    "push": "bifrost_cli.interop.push",
    "reconstruct": "bifrost_cli.generation.reconstruct",
    "report": "bifrost_cli.reports.report",
    "train_branch": "bifrost_cli.training.train_branch",
    "train_controlnet": "bifrost_cli.training.train_controlnet",
    "vary": "bifrost_cli.generation.edit",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'bifrost_cli' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
