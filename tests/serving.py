"""A service on the model whose every map is the identity, which answers in milliseconds."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from identity import MODEL, key, samples, verifier
from PIL import Image
from starlette.testclient import TestClient

from ringmark.watermark.embed import initial_noise
from ringmark.watermark.schemes.tree_ring import TreeRing
from ringmark.watermark.service.access import Access, Caller
from ringmark.watermark.service.app import make_app
from ringmark.watermark.service.service import Service

KEY = key(1)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


_NOISE = initial_noise([1, 2], MODEL.latent_shape)
_NOISE[:1] = TreeRing(KEY).embed(_NOISE[:1])
MARKED, PLAIN = (png(sample.image) for sample in samples(_NOISE))
FLAT = png(Image.new("RGB", (32, 32), (90, 120, 30)))


class Known(Access):
    """Callers by the text of their tokens."""

    def __init__(self, **callers: Caller) -> None:
        super().__init__([])
        self.callers = callers

    def caller(self, authorization: str) -> Caller | None:
        return self.callers.get(authorization.removeprefix("Bearer "))


def service(**options: Any) -> Service:
    """A service that looks for KEY."""
    return Service(verifier([KEY], steps=2), **{"access": Access(), **options})


@contextmanager
def client(**options: Any) -> Iterator[TestClient]:
    """A client of a running service."""
    app = make_app(service(**options))
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as found:
        yield found


def verify(client: TestClient, picture: bytes, name: str = "picture.png", **headers: str) -> Any:
    """The response to a picture."""
    return client.post("/v1/verify", files={"file": (name, picture)}, headers=headers)
