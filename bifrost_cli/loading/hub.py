"""What a hub answered instead of a model, as one of our errors: each cause has its own message and its own fix.

In: the name of a model and what huggingface_hub raised. Out: an EnvironmentProblem. Asks nothing of the network.
"""

from __future__ import annotations

from huggingface_hub import get_token, is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from bifrost_cli.errors import EnvironmentProblem

# The hub's own errors stand on those of its HTTP library, whose name changes between its releases.
_HTTP = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError" and issubclass(kind, Exception))
_NO_NETWORK = ("ConnectError", "ConnectTimeout", "ProxyError")
HUB_ERRORS: tuple[type[Exception], ...] = (
    HfHubHTTPError,
    _HTTP,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    HFValidationError,
)


def hub_problem(ref: str, error: Exception, revision: str | None = None) -> EnvironmentProblem:
    """BF-ENV-020 no such model or revision; 021 gated and no token; 022 licence not accepted; 023 not in the cache and
    no network; 024 the hub failed, and may not fail again."""
    message, at, fix, code = _explained(ref, error, revision)
    return EnvironmentProblem(message, at=at, fix=fix, code=code)


def _explained(ref: str, error: Exception, revision: str | None) -> tuple[str, str, str, str]:
    page = f"https://huggingface.co/{ref}"
    if isinstance(error, GatedRepoError):
        if get_token() is None:
            return f"{ref} is gated, and there is no token", page, "hf auth login, or set HF_TOKEN", "BF-ENV-021"
        message = f"{ref} is gated, and your account has not accepted its licence"
        return message, page, f"accept it at {page}", "BF-ENV-022"
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{ref} has no revision {revision}",
            page,
            "check its revision in the recipe's models section; null is the newest",
            "BF-ENV-020",
        )
    if isinstance(error, RepositoryNotFoundError):
        message = f"there is no model {ref} that you may see"
        return message, page, "check the name; a private one needs HF_TOKEN", "BF-ENV-020"
    if isinstance(error, HFValidationError):
        return f"{ref} is neither a folder nor a hub id", first_line(error), "check the recipe's models", "BF-ENV-020"
    if isinstance(error, OfflineModeIsEnabled) or is_offline_mode():
        at = first_line(error) if "incomplete" in str(error) else page
        return f"{ref} is not whole in the cache, and this run is offline", at, _LOCAL, "BF-ENV-023"
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
    answer = getattr(cause, "response", None) if isinstance(cause, HfHubHTTPError) else None
    if answer is not None and answer.status_code in (401, 403):
        return f"your token may not read {ref}", page, "give it the right to read this model", "BF-ENV-022"
    if answer is not None:
        return f"the hub cannot serve {ref} now: it answers {answer.status_code}", page, _AGAIN, "BF-ENV-024"
    if isinstance(error, LocalEntryNotFoundError) or type(error).__name__ in _NO_NETWORK:
        return f"{ref} is not in the cache, and the hub cannot be reached", first_line(error), _LOCAL, "BF-ENV-023"
    return f"the download of {ref} broke off", first_line(error), _AGAIN, "BF-ENV-024"


_LOCAL = "go online once, or give a local folder"
_AGAIN = "give the same command again in a few minutes; what has arrived is kept"


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
