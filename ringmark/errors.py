"""Errors, as facts with a code. Imports nothing, so that any module can use them."""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "AttackError",
    "CalibrationError",
    "EngineError",
    "EvaluationError",
    "ImageError",
    "KeyFileError",
    "MarkWarning",
    "ModelError",
    "RingmarkError",
    "SchemeError",
    "ServiceError",
    "StoreError",
    "counted",
    "one_line",
]


def one_line(text: object) -> str:
    """str(text) with line breaks and other unprintable characters escaped, for messages."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def counted(number: int, noun: str) -> str:
    """'1 image', '2 images'."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class RingmarkError(ValueError):
    """An error that the user can fix: `subject`, a file or a name, and the `fact` about it, in one line.

    `code` names the kind of fact ("key.exists") and is stable; `details` hold values that a remedy may mention. The
    fact says what is wrong, not what to do, which depends on the caller. The command line adds a remedy by the code.
    """

    def __init__(self, code: str, fact: str, *, subject: object = None, **details: object) -> None:
        self.code, self.fact, self.subject, self.details = code, fact, subject, details
        super().__init__(one_line(fact if subject is None else f"{subject}: {fact}"))

    def __reduce__(self) -> tuple[object, ...]:
        """Errors travel between processes, which Exception does by its arguments: only the text."""
        return _remade, (type(self), self.code, self.fact, self.subject, self.details)


def _remade(
    kind: type[RingmarkError], code: str, fact: str, subject: object, details: dict[str, object]
) -> RingmarkError:
    return kind(code, fact, subject=subject, **details)


class ModelError(RingmarkError):
    """A model that cannot be loaded or used."""


class ImageError(RingmarkError):
    """A file that cannot be used as a picture or as labels of pictures; the subject is the file."""

    @property
    def path(self) -> Path:
        """The file."""
        return Path(str(self.subject))


class StoreError(RingmarkError):
    """A results file or another output file that cannot be used."""


class KeyFileError(RingmarkError):
    """A key that cannot be read, written or used here."""


class SchemeError(RingmarkError):
    """A mark that does not fit its latents."""


class EvaluationError(RingmarkError):
    """Scores from which no curve or interval can be computed."""


class AttackError(RingmarkError):
    """An attack that does not exist, or that cannot be applied to this picture."""


class CalibrationError(RingmarkError):
    """A calibration that cannot be made, read, written or used here."""


class EngineError(RingmarkError):
    """An engine that cannot run here."""


class ServiceError(RingmarkError):
    """A service that cannot run here, its files, or a URL that it does not fetch."""


class MarkWarning(UserWarning):
    """A mark that will probably not be found."""
