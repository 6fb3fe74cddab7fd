"""uvicorn with deadlines: for the head of a request, and for whoever does not read the answer."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from bifrost_cli.errors import EnvironmentProblem
from bifrost_cli.serve.answers import Limits


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. EnvironmentProblem BF-SERVE-008: the address is in use, or none of this machine."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        why = error.strerror or str(error)
        raise EnvironmentProblem(
            f"cannot listen at {host} port {port}: {why}", fix=f"--port {port % 65535 + 1}", code="BF-SERVE-008"
        ) from error


class Server(uvicorn.Server):
    """A server that a signal ends quietly.

    Args:
        app: the ASGI application.
        limits: of connections.
        on_stop: called when it is to end, before it waits for the answers that are under way.
    """

    def __init__(self, app: Any, limits: Limits, on_stop: Callable[[], None] = lambda: None) -> None:
        protocol = type("Protocol", (_Protocol,), {"limits": limits, "waiting": {}})
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=max(1, int(limits.seconds / 2)),
                timeout_graceful_shutdown=10,
            )
        )
        self._on_stop = on_stop

    def handle_exit(self, sig: int, frame: Any) -> None:
        """The first signal ends it when the answers are out, the second at once; neither is an error."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End what waits, then what is under way."""
        self._on_stop()
        await super().shutdown(sockets)


class _Protocol(H11Protocol):
    """A connection; `waiting` holds those that have not sent a whole request head, the oldest first."""

    limits: Limits
    waiting: dict[_Protocol, asyncio.TimerHandle]
    unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()
        if len(self.waiting) > self.limits.connections:
            oldest = next(iter(self.waiting))
            self.waiting.pop(oldest).cancel()
            oldest.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            if self not in self.waiting and not self.transport.is_closing():
                self._await_head()
        else:
            self._head_came()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The peer does not read: its connection ends unless it goes on in time."""
        super().pause_writing()
        self.unread = self.loop.call_later(self.limits.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self.unread is not None:
            self.unread.cancel()
            self.unread = None
        super().resume_writing()

    def _await_head(self) -> None:
        self.waiting[self] = self.loop.call_later(self.limits.seconds, self.transport.abort)

    def _head_came(self) -> None:
        if (deadline := self.waiting.pop(self, None)) is not None:
            deadline.cancel()
