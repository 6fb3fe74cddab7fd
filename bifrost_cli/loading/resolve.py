"""Names of models to local folders, and names of devices to devices.

Every model becomes a local folder first, so that each trouble with a hub has one place and its own message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import errors as hub
from huggingface_hub import get_token, is_offline_mode, snapshot_download
from safetensors import SafetensorError
from transformers import dynamic_module_utils

from bifrost_cli.artifacts import Artifact, resolve
from bifrost_cli.artifacts.workspace import BUILTIN
from bifrost_cli.errors import ArtifactError, BifrostError, EnvironmentProblem, memory_errors

dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # seconds that transformers waits for a y on stdin before it refuses code
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
# The hub's own errors stand on those of its HTTP library, whose name changes between its releases.
_HTTP = next(one for one in hub.HfHubHTTPError.__mro__ if one.__name__ == "HTTPError" and issubclass(one, Exception))
_NO_NETWORK = ("ConnectError", "ConnectTimeout", "ProxyError")
HUB_ERRORS = (hub.HfHubHTTPError, _HTTP, hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, hub.HFValidationError)
_LOCAL = "go online once, or give a local folder"
_AGAIN = "give the same command again in a few minutes; what has arrived is kept"


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one. EnvironmentProblem BF-ENV-001 for a device that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EnvironmentProblem(f"there is no device {name} here", at=_first_line(error),
                                 fix="--device cpu, or bifrost doctor", code="BF-ENV-001") from error  # fmt: skip
    return device


def builtin(kind: str) -> Artifact:
    """The branch or the ControlNet that ships with the package."""
    return resolve("", f"builtin:{kind}", kind)


def resolve_model(ref: str, *, revision: str | None = None, patterns: Sequence[str] = MODEL_FILES) -> str:
    """The local folder of a frozen base; a hub id is downloaded (safetensors and text files alone) or taken from cache.
    Raises what `model_errors` does."""
    folder = BUILTIN / ref.removeprefix("builtin:") if ref.startswith("builtin:") else Path(ref).expanduser()
    if folder.is_dir():
        return str(folder)
    if ref.startswith(("builtin:", ".", "/", "~")):
        raise _none(f"there is no model folder {folder}", fix="give a folder, builtin:NAME or a hub id")
    with model_errors(ref, revision):
        # A hub repository may keep a second copy of its weights in half precision, under such names.
        return snapshot_download(ref, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*.fp16*"])


@contextmanager
def model_errors(ref: str, revision: str | None = None) -> Iterator[None]:
    """Turn a library's complaint about a model into one of ours: EnvironmentProblem BF-ENV-020 not a model, or those of
    `hub_problem`; ArtifactError BF-ART-008 damaged weights; OutOfMemory."""
    try:
        with memory_errors(f"loading {ref}", "--set generate.offload=model --set models.weights=nf4"):
            yield
    except BifrostError:
        raise
    except HUB_ERRORS as error:
        raise hub_problem(ref, error, revision) from error
    except Exception as error:  # a config.json that contradicts itself can end in any exception of a library
        cause: BaseException | None = error  # diffusers hides what safetensors said behind two errors of its own
        while cause is not None and not isinstance(cause, SafetensorError):
            cause = cause.__context__
        if cause is not None:
            raise ArtifactError(f"{ref} holds damaged weights: {cause}", at=_first_line(error),
                                fix="fetch the model again", code="BF-ART-008") from error  # fmt: skip
        if "trust_remote_code" in str(error):
            fix = "give a model of a family that transformers has itself"
            raise _none(f"{ref} brings code of its own, which is never run", fix=fix) from error
        # All of it, since some errors begin with a heading.
        told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        fix = "check the recipe's models section"
        raise _none(f"{ref} is not a model of the kind that is needed", at=told, fix=fix) from error


def hub_problem(ref: str, error: Exception, revision: str | None = None) -> EnvironmentProblem:
    """What a hub answered instead of a model: BF-ENV-020 no such model or revision; 021 gated and no token; 022 licence
    not accepted; 023 not in the cache and no network; 024 the hub failed, and may not fail again."""
    message, at, fix, number = _explained(ref, error, revision)
    return EnvironmentProblem(message, at=at, fix=fix, code=f"BF-ENV-{number}")


def _explained(ref: str, error: Exception, revision: str | None) -> tuple[str, str, str, str]:
    page, said = f"https://huggingface.co/{ref}", _first_line(error)
    if isinstance(error, hub.GatedRepoError):
        if get_token() is None:
            return f"{ref} is gated, and there is no token", page, "hf auth login, or set HF_TOKEN", "021"
        return f"{ref} is gated, and your account has not accepted its licence", page, f"accept it at {page}", "022"
    if isinstance(error, hub.RevisionNotFoundError):
        fix = "check its revision in the recipe's models section; null is the newest"
        return f"{ref} has no revision {revision}", page, fix, "020"
    if isinstance(error, hub.RepositoryNotFoundError):
        fix = "check the name; a private one needs HF_TOKEN"
        return f"there is no model {ref} that you may see", page, fix, "020"
    if isinstance(error, hub.HFValidationError):
        return f"{ref} is neither a folder nor a hub id", said, "check the recipe's models", "020"
    if isinstance(error, hub.OfflineModeIsEnabled) or is_offline_mode():
        at = said if "incomplete" in str(error) else page
        return f"{ref} is not whole in the cache, and this run is offline", at, _LOCAL, "023"
    cause = error.__cause__ if isinstance(error, hub.LocalEntryNotFoundError) else error
    answer = getattr(cause, "response", None) if isinstance(cause, hub.HfHubHTTPError) else None
    if answer is not None and answer.status_code in (401, 403):
        return f"your token may not read {ref}", page, "give it the right to read this model", "022"
    if answer is not None:
        return f"the hub cannot serve {ref} now: it answers {answer.status_code}", page, _AGAIN, "024"
    if isinstance(error, hub.LocalEntryNotFoundError) or type(error).__name__ in _NO_NETWORK:
        return f"{ref} is not in the cache, and the hub cannot be reached", said, _LOCAL, "023"
    return f"the download of {ref} broke off", said, _AGAIN, "024"


def _none(message: str, *, fix: str, at: str | None = None) -> EnvironmentProblem:
    return EnvironmentProblem(message, at=at, fix=fix, code="BF-ENV-020")


def _first_line(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
