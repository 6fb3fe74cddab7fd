"""What the server refuses, what it allows, and how an error reads in OpenAI's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bifrost_cli.errors import BifrostError, DataError, OutOfMemory, RecipeError, UsageError, public

_FAILED = "the server failed; its log says more"
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may take.

    Attributes:
        body_bytes: of a request's body.
        prompt_chars: of a prompt or a plan.
        images: of one request.
        steps: of the branch, and of the diffusion model.
        side: px a side of an image that is asked for.
        pixels: of an uploaded image, before it is decoded.
        waiting: requests that wait for the pipeline.
        connections: that have not sent a whole request head; the oldest of more is closed.
        seconds: in which a request head, a request body, or the next part of an answer has to pass.
    """

    body_bytes: int = 10_000_000
    prompt_chars: int = 8_000
    images: int = 10
    steps: int = 100
    side: int = 2048
    pixels: int = 1 << 24
    waiting: int = 32
    connections: int = 256
    seconds: float = 30.0


class Refusal(UsageError):
    """A request that is not answered: with its HTTP status, the field it is about, and more headers."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str = "BF-USE-001",
        fix: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, fix=fix, code=code)
        self.status, self.param, self.headers = status, param, dict(headers or {})


def status_of(error: BifrostError) -> int:
    """The HTTP status of an error: 400 for what the request can mend, 503 for memory, else 500."""
    if isinstance(error, Refusal):
        return error.status
    if isinstance(error, (UsageError, RecipeError, DataError)):
        return 400
    return 503 if isinstance(error, OutOfMemory) else 500


def body_of(error: BaseException) -> dict[str, Any]:
    """The JSON object of an error, as OpenAI's clients read it. What the request cannot mend is not described: it may
    name a file of this machine."""
    known = error if isinstance(error, BifrostError) else BifrostError(_FAILED)
    status = status_of(known)
    parts = [known.message, known.at if status == 400 else None, known.fix]
    message = ". ".join(part for part in parts if part) if status != 500 else _FAILED
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    told = {"message": message, "type": kind, "param": getattr(known, "param", None), "code": known.code}
    return {"error": public(told)}
