"""Packages that a library imports only because they are installed, and that the command at hand never uses.

transformers and diffusers import peft, bitsandbytes and scipy wherever these are installed: a fourth of all that a
first picture takes. For the command line alone: as a library, this package leaves the process of its user as it is.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points

OPTIONAL = ("bitsandbytes", "peft", "scipy")  # each has a way around it in both libraries
_GENERATION = ("bifrost_cli.generation.pipeline", "bifrost_cli.generation.generate", "transformers.modeling_utils")
_OWN = "_BIFROST_PROCESS"  # the number of the process that the console script started
_GROUPS = ("bifrost.diffusion_models", "bifrost.mllm_families")  # whose plug-ins may use what is left out


def in_own_process() -> None:
    """Called by the console script: nobody else's code runs in this process."""
    os.environ[_OWN] = str(os.getpid())


def import_generation(weights: str) -> None:
    """Import what generates images; `weights` is `models.weights`."""
    with lightly(weights):
        for module in _GENERATION:
            importlib.import_module(module)


@contextmanager
def lightly(weights: str = "dtype") -> Iterator[None]:
    """In a process of the console script, without `OPTIONAL` packages; where plug-ins are installed, which may use
    them, as always. bitsandbytes is there unless `weights` is `dtype`."""
    if os.environ.get(_OWN) != str(os.getpid()) or any(entry_points(group=group) for group in _GROUPS):
        yield
        return
    with without([name for name in OPTIONAL if name != "bitsandbytes" or weights == "dtype"]):
        yield


@contextmanager
def without(packages: Sequence[str]) -> Iterator[None]:
    """Inside, packages that are not imported yet count as not installed; afterwards they can be imported as always."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: what Python takes for "not to be found"
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name, ...) is None:
                del sys.modules[name]
