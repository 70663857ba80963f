"""Run the service until it is told to stop."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from typing import TYPE_CHECKING

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ringmark.errors import ServiceError
from ringmark.watermark.service.app import make_app

if TYPE_CHECKING:
    from ringmark.watermark.service.service import Service

__all__ = ["bind", "serve"]

CONNECTIONS = 1000
HEAD_SECONDS = 10


class Protocol(H11Protocol):
    """uvicorn's HTTP, which also closes connections whose request line and headers take over HEAD_SECONDS."""

    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._head:
            self._head.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Start the clock where headers are incomplete, and stop it where they have arrived."""
        if self.conn.their_state is not h11.IDLE:
            if self._head:
                self._head.cancel()
            self._head = None
        elif not self._head:
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.close)


def bind(host: str, port: int, *, tokens: bool) -> socket.socket:
    """A socket at this address.

    Raises ServiceError if it is in use (service.port), if there is no such address (service.host), or if other machines
    could reach it and no `tokens` are required (service.open).
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ServiceError("service.host", "is not an address of this machine", subject=host) from error
    if not tokens and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise ServiceError("service.open", "would be open to other machines without tokens", subject=host)
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen()  # otherwise another process could bind the same port until the model is loaded
    except OSError as error:
        bound.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            fact = "is in use" if error.errno == errno.EADDRINUSE else "may not be used"
            raise ServiceError("service.port", fact, subject=f"port {port}") from error
        raise ServiceError("service.host", "is not an address of this machine", subject=host) from error
    return bound


def serve(service: Service, bound: socket.socket) -> None:
    """Answer requests at this socket until SIGTERM or SIGINT; requests in work are then answered first."""
    config = uvicorn.Config(
        make_app(service),
        http=Protocol,
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=round(service.limits.deadline) + 5,
    )
    uvicorn.Server(config).run(sockets=[bound])
