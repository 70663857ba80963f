"""Fetch pictures and call webhooks, at public addresses only."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import BinaryIO
from urllib.parse import urljoin, urlsplit

import anyio
import httpcore2 as httpcore

from ringmark.errors import ServiceError

__all__ = ["Fetcher", "checked_url", "is_public"]

FAILURES = (
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
    OSError,
    TypeError,
    ValueError,
)
"""What a request to a strange URL or server can raise."""
MAX_REDIRECTS = 3
SECONDS = 10
TIMEOUT = {"timeout": {"connect": SECONDS, "read": SECONDS, "write": SECONDS, "pool": SECONDS}}
HEADERS: Mapping[bytes | str, bytes | str] = {"User-Agent": "ringmark", "Accept-Encoding": "identity"}
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
EMBEDDING = (NAT64, ipaddress.IPv6Network("::/96"))


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet, and does not stand for an IPv4 address that is not."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if not inner and any(ip in network for network in EMBEDDING):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


class _Checked(httpcore.AsyncNetworkBackend):
    """Connects to the address that was checked, so that a name cannot point elsewhere a moment later."""

    def __init__(self, allowed: Callable[[str], bool]) -> None:
        self.allowed, self._network = allowed, httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))
        if not addresses or not all(map(self.allowed, addresses)):
            raise ServiceError("url.private", "leads to an address that is not public", subject="the URL")
        return await self._network.connect_tcp(addresses[0], port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)


class Fetcher:
    """Sends requests to addresses that `allowed` accepts, also after a redirect; proxies are not used."""

    def __init__(self, allowed: Callable[[str], bool] = is_public) -> None:
        self._backend = _Checked(allowed)

    async def fetch(self, url: str, into: BinaryIO, max_bytes: int) -> None:
        """Write the body of a GET into a file. Raises ServiceError.

        The codes are url.scheme, url.private, url.unreachable (also after SECONDS in all), url.status and
        url.too-large. At most MAX_REDIRECTS redirects are followed.
        """
        await self._timed(self._fetch(url, into, max_bytes))

    async def post(self, url: str, body: bytes) -> None:
        """POST a JSON body; redirects are not followed. Raises ServiceError unless the answer's status is 2xx."""
        await self._timed(self._post(url, body))

    async def _timed(self, work: Awaitable[None]) -> None:
        try:
            with anyio.fail_after(SECONDS):
                await work
        except FAILURES as error:
            if isinstance(error, ServiceError):
                raise
            raise ServiceError("url.unreachable", "cannot be fetched", subject="the URL") from error

    async def _fetch(self, url: str, into: BinaryIO, max_bytes: int) -> None:
        async with httpcore.AsyncConnectionPool(network_backend=self._backend) as pool:
            for _ in range(1 + MAX_REDIRECTS):
                request = pool.stream("GET", checked_url(url), headers=_headers(url), extensions=TIMEOUT)
                async with request as response:
                    location = {name.lower(): value for name, value in response.headers}.get(b"location")
                    if 300 <= response.status < 400 and location:
                        url = urljoin(url, location.decode("latin-1"))
                        continue
                    _check_status(response.status)
                    async for chunk in response.aiter_stream():
                        into.write(chunk)
                        if into.tell() > max_bytes:
                            raise ServiceError("url.too-large", f"has over {max_bytes >> 20} MB", subject="the URL")
                    return
        raise ServiceError("url.unreachable", f"redirects more than {MAX_REDIRECTS} times", subject="the URL")

    async def _post(self, url: str, body: bytes) -> None:
        headers = {**_headers(url), "Content-Type": "application/json"}
        async with httpcore.AsyncConnectionPool(network_backend=self._backend) as pool:
            request = pool.stream("POST", checked_url(url), headers=headers, content=body, extensions=TIMEOUT)
            async with request as response:
                _check_status(response.status)


def checked_url(url: str) -> str:
    """The URL if it is a plain http or https one. Raises ServiceError (url.scheme)."""
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise ServiceError("url.scheme", "is not a plain http or https URL", subject="the URL")
    return url


def _headers(url: str) -> Mapping[bytes | str, bytes | str]:
    return {**HEADERS, "Host": urlsplit(url).netloc}


def _check_status(status: int) -> None:
    if not 200 <= status < 300:
        raise ServiceError("url.status", f"was answered with status {status}", subject="the URL")
