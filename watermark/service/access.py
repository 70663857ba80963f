"""Who may ask the service, what they are told, and how often: tokens, their file, and rates."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ringmark.data.files import open_regular, write_atomic
from ringmark.data.locks import lock
from ringmark.errors import ServiceError

__all__ = ["PUBLIC", "Access", "Caller", "Scope", "Token", "add_token", "load_tokens", "remove_token"]

Scope = Literal["verdict", "p"]
"""What a caller is told: "verdict" is yes, no or inconclusive; "p" is also the p-value and what it rests on."""

MAX_BYTES = 1 << 20  # of a file of tokens
SECRET_BYTES = 32


class Token(BaseModel):
    """A token as the file holds it: the SHA-256 of its text, whose 256 random bits need no slower hash."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=80)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    scope: Scope
    per_minute: int = Field(ge=1)


class TokenFile(BaseModel):
    """The contents of a file of tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ringmark_tokens: Literal[1] = 1
    tokens: tuple[Token, ...] = ()


class Caller(NamedTuple):
    """Who sends a request: the name of the token, its scope and its rate in pictures per minute (None: no limit)."""

    name: str
    scope: Scope
    per_minute: int | None


PUBLIC = Caller("public", "verdict", None)
"""A caller without a token, where none are required."""


def load_tokens(path: Path) -> list[Token]:
    """The tokens in a file. Raises ServiceError if it cannot be read or if other users can."""
    with open_regular(path, ServiceError, room="tokens") as file:
        if os.name == "posix" and os.fstat(file.fileno()).st_mode & 0o066:
            raise ServiceError("tokens.readable", "other users can read or write these tokens", subject=path)
        content = file.read(MAX_BYTES)
    try:
        return list(TokenFile.model_validate_json(content).tokens)
    except ValidationError:
        raise ServiceError("tokens.damaged", "is damaged or not a file of tokens", subject=path) from None


def add_token(path: Path, name: str, scope: Scope, per_minute: int) -> str:
    """Add a new token to a file, which is created with mode 0600 if it is missing, and return the token's text.

    Only its hash is stored. Raises ServiceError for a name in use and for a file that cannot be read.
    """
    text = f"rm_{secrets.token_urlsafe(SECRET_BYTES)}"
    try:
        token = Token(name=name, sha256=_digest(text), scope=scope, per_minute=per_minute)
    except ValidationError:
        raise ServiceError("tokens.name", "must have 1 to 80 characters", subject="the name of a token") from None
    with _locked(path):
        tokens = load_tokens(path) if path.exists() else []
        if name in {token.name for token in tokens}:
            raise ServiceError("tokens.exists", f"has a token named {name!r} already", subject=path)
        _save(path, [*tokens, token])
    return text


def remove_token(path: Path, name: str) -> None:
    """Remove the token of this name from a file. Raises ServiceError if there is none."""
    with _locked(path):
        tokens = load_tokens(path)
        if name not in {token.name for token in tokens}:
            raise ServiceError("tokens.unknown", f"has no token named {name!r}", subject=path)
        _save(path, [token for token in tokens if token.name != name])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Context in which no other process changes the file."""
    held = lock(path, wait=True) if path.parent.is_dir() else None
    try:
        yield
    finally:
        if held:
            held.release()


def _save(path: Path, tokens: list[Token]) -> None:
    write_atomic(path, TokenFile(tokens=tuple(tokens)).model_dump_json(indent=1) + "\n", 0o600)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class _Allowance:
    """A token bucket: `left` pictures of a minute's allowance, refilled continuously."""

    per_minute: int
    now: float
    left: float = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.per_minute

    def wait(self, number: int, now: float) -> float:
        """Take `number` pictures and return 0, or return the seconds until that many are allowed."""
        self.left = min(self.per_minute, self.left + (now - self.now) * self.per_minute / 60)
        self.now = now
        if self.left < min(number, self.per_minute):
            return (min(number, self.per_minute) - self.left) * 60 / self.per_minute
        self.left -= number  # below 0 after more than a minute's worth, which is paid for by waiting
        return 0.0


class Access:
    """Tells callers from tokens and limits their rates. Without tokens, everyone is PUBLIC."""

    def __init__(self, tokens: list[Token] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.tokens, self._clock = tokens, clock
        self._allowances: dict[str, _Allowance] = {}

    def caller(self, authorization: str) -> Caller | None:
        """The caller with this Authorization header; None if a token is required and this is none.

        The hash is compared with every token's in constant time.
        """
        if self.tokens is None:
            return PUBLIC
        kind, _, text = authorization.partition(" ")
        digest = _digest(text.strip())
        known = [token for token in self.tokens if hmac.compare_digest(token.sha256, digest)]
        if kind.lower() != "bearer" or not known:
            return None
        return Caller(known[0].name, known[0].scope, known[0].per_minute)

    def wait(self, caller: Caller, number: int = 1) -> float:
        """Count `number` pictures of a caller and return 0, or return the seconds to wait first.

        More pictures than a minute's allowance are accepted at once and paid for by waiting longer afterwards.
        """
        if caller.per_minute is None:
            return 0.0
        now = self._clock()
        allowance = self._allowances.setdefault(caller.name, _Allowance(caller.per_minute, now))
        return allowance.wait(number, now)
