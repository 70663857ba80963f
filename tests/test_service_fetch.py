"""Pictures are fetched from public addresses only."""

from __future__ import annotations

import asyncio
import io
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import anyio
import pytest

from ringmark.errors import ServiceError
from ringmark.watermark.service.fetch import Fetcher, is_public


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.9.1",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "169.254.169.254",
        "224.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "::7f00:1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:4136:e378:8000:63bf:f5ff:fffe",
    ],
)
def test_other_addresses(address: str) -> None:
    assert not is_public(address)


class Site(BaseHTTPRequestHandler):
    """Pages that answer in different ways."""

    posted: list[bytes] = []

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        pages: dict[str, tuple[int, str, bytes]] = {
            "/picture": (200, "", b"x" * 5000),
            "/away": (302, "/picture", b""),
            "/inside": (302, f"http://127.0.0.2:{port}/picture", b""),
            "/file": (302, "file:///etc/passwd", b""),
            "/loop": (302, "/loop", b""),
        }
        status, location, body = pages.get(self.path, (404, "", b""))
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.posted.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204 if self.path == "/hook" else 302)
        self.send_header("Location", "/hook")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


LOCAL = Fetcher(lambda address: address == "127.0.0.1")
"""As if this address, and no other, were public."""


def fetched(url: str, fetcher: Fetcher = LOCAL, max_bytes: int = 10_000) -> bytes:
    into = io.BytesIO()
    asyncio.run(fetcher.fetch(url, into, max_bytes))
    return into.getvalue()


def code_of(url: str, fetcher: Fetcher = LOCAL, max_bytes: int = 10_000) -> str:
    with pytest.raises(ServiceError) as error:
        fetched(url, fetcher, max_bytes)
    return error.value.code


def test_a_picture_is_fetched_also_after_a_redirect(site: str) -> None:
    assert fetched(f"{site}/picture") == fetched(f"{site}/away") == b"x" * 5000


def test_what_is_refused(site: str) -> None:
    assert code_of(f"{site}/picture", Fetcher()) == "url.private"
    assert code_of(f"{site}/inside") == "url.private", "a redirect is checked as well"
    assert code_of(f"{site}/file") == code_of("ftp://a/b") == code_of("x") == "url.scheme"
    assert code_of("http://user:secret@example.org/") == "url.scheme"
    assert code_of(f"{site}/loop") == code_of("http://127.0.0.1:9/") == "url.unreachable"
    assert code_of(f"{site}/none") == "url.status"
    assert code_of(f"{site}/picture", max_bytes=4999) == "url.too-large"
    for odd in ("http://[::1/", "http://a:b/", "http://a:99999/", "http://\x00/", "http://ä.invalid/", "http://a b/"):
        assert code_of(odd).startswith("url.")


def test_the_address_that_is_checked_is_the_one_that_is_connected_to(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that leads to a public address when it is checked, and to this machine the next time."""
    asked: list[str] = []

    async def resolve(host: str, port: int, **_: object) -> list:
        asked.append(host)
        address = "127.0.0.1" if len(asked) == 1 else "127.0.0.2"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(anyio, "getaddrinfo", resolve)
    assert fetched(site.replace("127.0.0.1", "rebound.example") + "/picture") == b"x" * 5000
    assert asked == ["rebound.example"]
    assert code_of(site.replace("127.0.0.1", "rebound.example") + "/picture") == "url.private"


def test_a_name_with_one_private_address_is_refused(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(host: str, port: int, **_: object) -> list:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in ("127.0.0.1", "10.0.0.1")]

    monkeypatch.setattr(anyio, "getaddrinfo", resolve)
    assert code_of(f"{site}/picture") == "url.private"


def test_a_webhook_is_called_and_not_redirected(site: str) -> None:
    Site.posted.clear()
    asyncio.run(LOCAL.post(f"{site}/hook", b'{"id": "1"}'))
    assert Site.posted == [b'{"id": "1"}']
    with pytest.raises(ServiceError) as error:
        asyncio.run(LOCAL.post(f"{site}/elsewhere", b"{}"))
    assert error.value.code == "url.status" and len(Site.posted) == 2
    with pytest.raises(ServiceError) as error:
        asyncio.run(Fetcher().post(f"{site}/hook", b"{}"))
    assert error.value.code == "url.private"
