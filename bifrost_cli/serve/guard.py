"""What every request passes before it is understood: who asks, from which page, how much, and how slowly."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from bifrost_cli.serve.answers import Limits, Refusal, body_of

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
OPEN = ("/", "/health")  # they tell nothing that needs a token
_LOCAL = ("127.0.0.1", "localhost", "[::1]")
_DISCARDED = 16  # bodies of the allowed size that are read, and dropped, before a client hears that its own is too long
_TOGETHER = 16  # bodies of the allowed size that may be on their way at once
_CLOSE = {"Connection": "close"}
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Guard:
    """ASGI middleware: refuses, or hands on a request with its whole body.

    Args:
        app: the application inside.
        limits: of the body, in bytes and seconds.
        token: that a request has to show; None for a server that only this machine reaches. Then the address that a
            browser was given has to be one of this machine, so that no page of another site comes in by its own name.
        on_answer: called with the path and the status of each answer.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        limits: Limits,
        token: str | None = None,
        on_answer: Callable[[str, int], None] = lambda path, status: None,
    ) -> None:
        self.app, self.limits, self.token, self.on_answer = app, limits, token, on_answer
        self._held = 0  # bytes of bodies that are not whole yet

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.on_answer(scope["path"], message["status"])
                given = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(pair for pair in _HEADERS if pair[0] not in given)]
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check(scope["path"], headers)
            body = await self._body(headers, receive)
        except Refusal as refusal:
            return await _refuse(refusal, send_more)
        if body is None:  # the client has gone
            return None
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        del body  # whoever reads it has it alone: a request can wait for long

        async def receive_body() -> Message:
            return unread.pop() if unread else await receive()

        await self.app(scope, receive_body, send_more)

    def _check(self, path: str, headers: MutableMapping[str, str]) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self.token is None and name.lower() not in _LOCAL:
            raise Refusal(
                403,
                f"{host or 'no host'} is not the address of this server",
                code="BF-SERVE-007",
                fix="ask for http://127.0.0.1:PORT",
            )
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise Refusal(
                403, "pages of other sites are not answered", code="BF-SERVE-007", fix="open / of this server"
            )
        if self.token is not None and path not in OPEN:
            kind, _, shown = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(shown.strip().encode(), self.token.encode())
            if kind.lower() != "bearer" or not right:
                raise Refusal(
                    401,
                    "no token, or a wrong one",
                    code="BF-SERVE-001",
                    fix="Authorization: Bearer TOKEN",
                    headers={"WWW-Authenticate": "Bearer"},
                )

    async def _body(self, headers: MutableMapping[str, str], receive: Receive) -> bytes | None:
        """The whole body; None when the client goes before its end. Refusal: too long, or too late."""
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > _DISCARDED * self.limits.body_bytes:
            raise self._too_long()
        try:
            async with asyncio.timeout(self.limits.seconds):
                return await self._whole(receive)
        except TimeoutError:
            what = f"the body did not come within {self.limits.seconds:g} s"
            raise Refusal(408, what, code="BF-SERVE-004", fix="send it again", headers=_CLOSE) from None

    async def _whole(self, receive: Receive) -> bytes | None:
        """A body that is too long is read to its end and dropped as it comes, up to a bound: a client that is still
        sending would not read the refusal."""
        limit, parts, size, more = self.limits.body_bytes, list[bytes](), 0, True
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                more = message.get("more_body", False)
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                self._held += len(parts[-1])
                if size > limit:
                    self._drop(parts)
                if size > _DISCARDED * limit:
                    raise self._too_long()
                if self._held > _TOGETHER * limit:
                    again = {"Retry-After": "1", **_CLOSE}
                    raise Refusal(429, "too much is being sent at once", code="BF-SERVE-002", fix="wait", headers=again)
            if size > limit:
                raise self._too_long()
            return b"".join(parts)
        finally:
            self._drop(parts)

    def _drop(self, parts: list[bytes]) -> None:
        self._held -= sum(map(len, parts))
        parts.clear()

    def _too_long(self) -> Refusal:
        what = f"the body has more than {self.limits.body_bytes:,} bytes"
        return Refusal(413, what, code="BF-SERVE-003", fix="send less", headers=_CLOSE)


async def _refuse(refusal: Refusal, send: Send) -> None:
    body = json.dumps(body_of(refusal)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
