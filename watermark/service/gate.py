"""What happens to every request before and after its route: identification, limits, headers, metrics and a log line."""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ringmark.watermark.service.answers import Refusal

if TYPE_CHECKING:
    from ringmark.watermark.service.service import Service

__all__ = ["Gate"]

LOG = logging.getLogger(__name__)

LOCAL = ("localhost", "127.0.0.1", "::1")
JUDGED = ("/v1/verify", "/m/lookup")
OPEN = ("/", "/page.js", "/page.css", "/icon.svg", "/healthz", "/openapi.json")
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Gate:
    """ASGI middleware around the routes.

    A caller is identified, and counted against its rate, before any part of the body is parsed. The body must arrive
    within `limits.body_seconds` and have at most `limits.max_body` bytes, or `limits.max_job` for a job. The log and
    the metrics name routes, not paths, since a path or a query can hold anything.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 500
        limits = self.service.limits
        body = _Body(receive, limits.max_job if scope["path"] == "/v1/batch" else limits.max_body, limits.body_seconds)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            await self._admit(scope, Headers(scope=scope), body)
            await self.app(scope, body.receive, answer)
        except Refusal as refusal:  # raised here: the application answers its own
            if refusal.status_code != 413:
                await body.drain()
            await _send(refusal, answer)
        finally:
            self._record(scope, status, time.monotonic() - started)

    async def _admit(self, scope: Scope, headers: Headers, body: _Body) -> None:
        """Identify the caller, and refuse what can be refused before the body is read. Raises Refusal.

        Without tokens, a web page that has pointed its own name at this machine must not read answers.
        """
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > body.left:
            raise too_large(body.left)
        if self.service.access.tokens is None and _host(headers) not in LOCAL:
            raise Refusal(400, "request.host", "without tokens, only requests addressed to localhost are answered")
        if scope["path"] in OPEN:
            return
        caller = self.service.access.caller(headers.get("authorization", ""))
        if caller is None:
            raise Refusal(401, "token.required", "a valid token is required")
        scope.setdefault("state", {})["caller"] = caller
        if scope["path"] in JUDGED:
            self.service.check_room()
        if scope["method"] == "POST" or scope["path"] in JUDGED:
            self.service.charge(caller, 1)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD") else "other"
        self.service.metrics.requests.labels(method, route, status).inc()
        self.service.metrics.request_seconds.labels(route).observe(seconds)
        caller = scope.get("state", {}).get("caller")
        LOG.info("%s %s %d in %.3f s for %s", method, route, status, seconds, caller.name if caller else "anyone")


def _host(headers: Headers) -> str | None:
    """The name of the host that a request is for, without the port; None if it is malformed."""
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname
    except ValueError:
        return None


class _Body:
    """The body of a request, of at most `left` bytes more, before a point in time."""

    def __init__(self, receive: Receive, max_bytes: int, seconds: float) -> None:
        self._receive, self.left, self._max_bytes = receive, max_bytes, max_bytes
        self._until = anyio.current_time() + seconds
        self._more = True

    async def receive(self) -> Message:
        """The next message. Raises Refusal if the body is too large or too slow."""
        if not self._more:
            return await self._receive()
        try:
            with anyio.fail_after(self._until - anyio.current_time()):
                message = await self._receive()
        except TimeoutError:
            self._more = False
            raise Refusal(408, "request.slow", "the request did not arrive in time") from None
        self.left -= len(message.get("body", b""))
        self._more = bool(message.get("more_body")) and self.left >= 0
        if self.left < 0:
            raise too_large(self._max_bytes)
        return message

    async def drain(self) -> None:
        """Read the rest, so that a client that is still sending can read the answer."""
        try:
            while self._more:
                await self.receive()
        except Refusal:
            pass


def too_large(max_bytes: int) -> Refusal:
    """The refusal of a body of more than `max_bytes`."""
    return Refusal(413, "request.too-large", f"the request has more than {max_bytes >> 20} MB")


async def _send(refusal: Refusal, send: Send) -> None:
    body = json.dumps({"code": refusal.code, "message": refusal.detail}).encode()
    headers: list[tuple[bytes, bytes]] = [(b"content-type", b"application/json")]
    headers += [(name.lower().encode(), value.encode()) for name, value in (refusal.headers or {}).items()]
    headers.append((b"content-length", str(len(body)).encode()))
    start: dict[str, Any] = {"type": "http.response.start", "status": refusal.status_code, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body})
