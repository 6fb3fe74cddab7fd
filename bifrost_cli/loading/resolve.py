"""Names of models to local folders, and names of devices to devices.

Every model becomes a local folder first, so that each trouble with a hub has one place and one message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import dynamic_module_utils

from bifrost_cli.artifacts import Artifact, resolve
from bifrost_cli.artifacts.workspace import BUILTIN
from bifrost_cli.errors import ArtifactError, BifrostError, EnvironmentProblem, memory_errors
from bifrost_cli.loading.hub import HUB_ERRORS, first_line, hub_problem

dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # seconds that transformers waits for a y on stdin before it refuses code
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one. EnvironmentProblem BF-ENV-001 for a device that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EnvironmentProblem(f"there is no device {name} here", at=first_line(error),
                                 fix="--device cpu, or bifrost doctor", code="BF-ENV-001") from error  # fmt: skip
    return device


def builtin(kind: str) -> Artifact:
    """The branch or the ControlNet that ships with the package."""
    return resolve("", f"builtin:{kind}", kind)


def resolve_model(ref: str, *, revision: str | None = None, patterns: Sequence[str] = MODEL_FILES) -> str:
    """The local folder of a frozen base; a hub id is downloaded (safetensors and text files alone) or taken from cache.

    Raises what `model_errors` does.
    """
    folder = BUILTIN / ref.removeprefix("builtin:") if ref.startswith("builtin:") else Path(ref).expanduser()
    if folder.is_dir():
        return str(folder)
    if ref.startswith(("builtin:", ".", "/", "~")):
        raise EnvironmentProblem(f"there is no model folder {folder}", fix="give a folder, builtin:NAME or a hub id",
                                 code="BF-ENV-020")  # fmt: skip
    with model_errors(ref, revision):
        # A hub repository may keep a second copy of its weights in half precision, under such names.
        return snapshot_download(ref, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*.fp16*"])


@contextmanager
def model_errors(ref: str, revision: str | None = None) -> Iterator[None]:
    """Turn a library's complaint about a model into one of ours.

    EnvironmentProblem: BF-ENV-020 not a model, or those of `hub_problem`. ArtifactError BF-ART-008: damaged weights.
    OutOfMemory.
    """
    try:
        with memory_errors(f"loading {ref}", "--set generate.offload=model --set models.weights=nf4"):
            yield
    except BifrostError:
        raise
    except HUB_ERRORS as error:
        raise hub_problem(ref, error, revision) from error
    except Exception as error:  # a config.json that contradicts itself can end in any exception of a library
        if damage := _damage(error):
            raise ArtifactError(f"{ref} holds damaged weights: {damage}", at=first_line(error),
                                fix="fetch the model again", code="BF-ART-008") from error  # fmt: skip
        if "trust_remote_code" in str(error):
            raise EnvironmentProblem(f"{ref} brings code of its own, which is never run",
                                     fix="give a model of a family that transformers has itself", code="BF-ENV-020",
                                     ) from error  # fmt: skip
        raise EnvironmentProblem(f"{ref} is not a model of the kind that is needed", at=_told(error),
                                 fix="check the recipe's models section", code="BF-ENV-020") from error  # fmt: skip


def _told(error: Exception) -> str:
    """The first line that says something: some errors begin with a heading."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _damage(error: BaseException | None) -> SafetensorError | None:
    """What safetensors said; diffusers hides it behind two errors of its own."""
    while error is not None and not isinstance(error, SafetensorError):
        error = error.__context__
    return error
