"""Files wherever fsspec reaches them: on this machine, in buckets, on web servers.

What an address keeps secret, a password or a signature, never appears in an id, a record, an error or the log: errors
of drivers are reported by their kind only, because their texts quote addresses.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, urlsplit

from ringmark.errors import ImageError

__all__ = ["MAX_BYTES", "Location", "filename", "has_scheme", "is_web", "public", "stamp_in", "too_many_bytes"]

MAX_BYTES = 512 << 20  # of one picture: 64 million pixels of 8 bytes
SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)  # two letters or more: C:/ is a drive
USER = re.compile(r"//[^/?#]*@")
SIGNERS = ("x-amz-", "x-goog-")
SIGNATURES = {
    name: set(others.split())
    for name, others in {
        "signature": "expires policy key-pair-id awsaccesskeyid googleaccessid ossaccesskeyid security-token",
        "sig": "sv ss srt sp st se spr sip sr si sdd ses skoid sktid skt ske sks skv saoid suoid scid",
        "x-oss-signature": "x-oss-signature-version x-oss-credential x-oss-date x-oss-expires x-oss-additional-headers "
        "x-oss-security-token",
        "q-signature": "q-sign-algorithm q-ak q-sign-time q-key-time q-header-list q-url-param-list "
        "x-cos-security-token",
    }.items()
}
"""The parameters with which an address is signed: how their names begin, or what their names are beside a signature.

Without one, such names may tell pictures apart. Those of AWS, Google and older OSS are followed by those of Azure, OSS
and Tencent.
"""
DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
STAMPS = ("mtime", "LastModified", "last_modified", "updated", "created")
REFUSED = re.compile("credential|forbidden|denied|unauthorized|gatedrepo|authentication", re.IGNORECASE)


def has_scheme(address: str) -> bool:
    """Whether this is an address such as s3://bucket/name, not a path."""
    return SCHEME.match(address) is not None


def is_web(address: str) -> bool:
    """Whether this is the address of a web server."""
    return address.lower().startswith(("http://", "https://"))


def filename(id: str) -> str:
    """An id in lower case and, on the web, without parameters: its suffix says what it is."""
    return (id.partition("?")[0] if is_web(id) else id).lower()


def public(address: str) -> str:
    """An address without user, password, signature and fragment; a path is returned unchanged.

    Parameters that sign it are dropped, so the same object has the same name under another signature; all others are
    replaced by a digest, because their names do not say whether they are secret.
    """
    if not has_scheme(address):
        return address
    address = USER.sub("//", address, count=1)
    if not is_web(address):  # elsewhere ? and # belong to the name
        return address
    parts = urlsplit(address)
    others = _unsigned(parse_qsl(parts.query, True))
    mark = f"?{hashlib.sha256(repr(others).encode()).hexdigest()[:12]}" if others else ""
    return f"{parts.scheme}://{parts.netloc}{parts.path}{mark}"


def _unsigned(parameters: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The parameters that do not sign the address."""
    found = SIGNATURES.keys() & {name.lower() for name, _ in parameters}
    signing = found.union(*(SIGNATURES[name] for name in found))
    return [pair for pair in parameters if not pair[0].lower().startswith(SIGNERS) and pair[0].lower() not in signing]


@dataclass(frozen=True)
class Location:
    """A file or folder: its fsspec filesystem, its path there, and the id by which it is known.

    `stamp` is its size and modification time, if a listing gave them.
    """

    files: Any
    path: str
    id: str
    stamp: dict[str, int | None] = field(default_factory=dict)

    @classmethod
    def at(cls, address: str) -> Location:
        """The location of an address or a path.

        Raises ImageError: source.no-driver or source.driver if a package for it is missing, source.scheme for an
        unknown scheme.
        """
        from fsspec import url_to_fs

        scheme = (SCHEME.match(address) or ["", "file"])[1].lower()
        try:
            with _reported(public(address)):
                files, path = url_to_fs(address)
        except ImportError:
            if not (package := DRIVERS.get(scheme)):
                fact = "needs a driver of fsspec, which is not installed"
                raise ImageError("source.driver", fact, subject=public(address), scheme=scheme) from None
            fact = f"needs {package}, which is not installed"
            raise ImageError("source.no-driver", fact, subject=public(address), package=package) from None
        return cls(files=files, path=path, id=public(address))

    def below(self, path: str, facts: dict[str, Any] | None = None) -> Location:
        """The location of another path of this filesystem, with the facts of its listing."""
        stamp = stamp_in(facts) if facts else {}
        return Location(files=self.files, path=path, id=self._id_of(path), stamp=stamp)

    def _id_of(self, path: str) -> str:
        scheme = SCHEME.match(self.id)
        if not scheme:
            return path
        whole = path if has_scheme(path) else f"{scheme[0]}{path.lstrip('/')}"
        return public(whole)

    def named(self, id: str) -> Location:
        """The same location by another name."""
        return replace(self, id=id)

    @property
    def is_local(self) -> bool:
        """Whether this is a file of this machine."""
        return not has_scheme(self.id)

    def may_name(self, address: str) -> bool:
        """Whether a list here may name this address: any if it is a local file, else the web and its own kind alone.

        Otherwise a list by a stranger could have local files read, or use credentials for another service. "::" puts
        one filesystem of fsspec into another.
        """
        own, other = SCHEME.match(self.id), SCHEME.match(address)
        alike = own and other and own[1].lower() == other[1].lower()
        return self.is_local or ("::" not in address and (is_web(address) or bool(alike)))

    def checked(self) -> Location:
        """The same location, stamped unless it is a prefix. Raises ImageError if nothing is there or below."""
        if hasattr(self.files, "call_s3") and next(self.walk(), None):
            return self
        return replace(self, stamp=stamp_in(self.facts()))

    def facts(self) -> dict[str, Any]:
        """Type, size and times as the filesystem gives them. Raises ImageError."""
        with _reported(self.id):
            found: dict[str, Any] = self.files.info(self.path)
            return found

    def read(self) -> bytes:
        """The bytes of a picture. Raises ImageError, image.too-many-bytes for more than MAX_BYTES."""
        with self.opened() as file:
            content: bytes = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise too_many_bytes(self.id)
        return content

    @contextmanager
    def opened(self, *, seekable: bool = False) -> Iterator[BinaryIO]:
        """The file, opened for reading, from its beginning to its end unless it is to be `seekable`.

        A file on the web is copied to a temporary one if it is to be seekable, because not every server sends parts.
        Raises ImageError, also for errors in the `with` block.
        """
        whole = {"block_size": 0} if is_web(self.id) else {}
        with _reported(self.id), self.files.open(self.path, "rb", **whole) as file:
            if not (seekable and whole):
                yield file
                return
            with tempfile.TemporaryFile() as copy:
                while piece := file.read(1 << 20):
                    copy.write(piece)
                copy.seek(0)
                yield copy

    def walk(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Paths and facts of all files below, page by page where the filesystem allows. Raises ImageError."""
        with _reported(self.id):
            if hasattr(self.files, "call_s3"):
                yield from self._pages()
                return
            for _, _, found in self.files.walk(self.path, detail=True, on_error="raise"):
                yield from ((facts["name"], facts) for _, facts in sorted(found.items()))

    def _pages(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The objects of a bucket, a thousand at a time; a walk would hold the listing of a whole level."""
        bucket, _, prefix = self.path.partition("/")
        more: dict[str, str] = {}
        while True:
            page = self.files.call_s3(
                "list_objects_v2", Bucket=bucket, Prefix=f"{prefix.rstrip('/')}/" if prefix else "", **more
            )
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):
                    yield f"{bucket}/{entry['Key']}", {"size": entry["Size"], "LastModified": entry["LastModified"]}
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def glob(self) -> list[tuple[str, dict[str, Any]]]:
        """Paths and facts of what this pattern matches. Raises ImageError."""
        with _reported(self.id):
            return sorted(self.files.glob(self.path, detail=True).items())


def too_many_bytes(id: str) -> ImageError:
    """The error for a picture of more than MAX_BYTES."""
    return ImageError("image.too-many-bytes", f"has more than {MAX_BYTES >> 20} MB", subject=id)


def stamp_in(facts: dict[str, Any]) -> dict[str, int | None]:
    """Size and modification time among the facts about a file."""
    when = next((facts[name] for name in STAMPS if facts.get(name)), None)
    seconds = when.timestamp() if isinstance(when, datetime) else when
    mtime = round(seconds * 1e9) if isinstance(seconds, (int, float)) else None
    return {"size": facts.get("size"), "mtime_ns": mtime}


@contextmanager
def _reported(id: str) -> Iterator[None]:
    """Turns what drivers raise into an ImageError that quotes nothing of theirs."""
    try:
        yield
    except (ImageError, ImportError):
        raise
    except Exception as error:
        chain = [error]
        while cause := chain[-1].__cause__:  # a driver may call every failure "not found"
            chain.append(cause)  # type: ignore[arg-type]
        kind, status = type(chain[-1]).__name__, getattr(chain[-1], "status", None)
        refusals = [one for one in chain if isinstance(one, PermissionError) or REFUSED.search(type(one).__name__)]
        if refusals or status in (401, 403):
            raise ImageError("source.denied", "may not be read, or needs credentials", subject=id) from None
        if isinstance(chain[-1 if is_web(id) else 0], (FileNotFoundError, NotADirectoryError)) or status in (404, 410):
            raise ImageError("source.missing", "does not exist", subject=id) from None
        if isinstance(error, ValueError) and "rotocol" in str(error):
            raise ImageError("source.scheme", "has an unknown scheme", subject=id) from None
        fact = f"cannot be read ({kind}{f' {status}' if isinstance(status, int) else ''})"
        raise ImageError("source.unreachable", fact, subject=id) from None
