"""Whether the packages of the extra `serve` are installed; imports none of them."""

from __future__ import annotations

from importlib.util import find_spec

from ringmark.errors import ServiceError

__all__ = ["check_installed"]

NEEDED = {
    "fastapi": "fastapi",
    "httpcore2": "httpx2",
    "prometheus_client": "prometheus-client",
    "python_multipart": "python-multipart",
    "uvicorn": "uvicorn",
}
"""Packages by the module that is imported."""


def check_installed() -> None:
    """Raises ServiceError if a package that the service needs is missing."""
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ServiceError("service.not-installed", f"{', '.join(missing)} {verb} not installed", subject="the service")
