"""The library's one error and its few children; each message is one line that names the thing and the remedy."""

from __future__ import annotations

__all__ = ["AttackError", "CalibrationError", "EvaluationError", "KeyFileError", "RingmarkError", "SchemeError"]


class RingmarkError(ValueError):
    """Something that the user can put right."""


class KeyFileError(RingmarkError):
    """A key that cannot be read, written or used here."""


class SchemeError(RingmarkError):
    """A pattern that does not fit its latent."""


class EvaluationError(RingmarkError):
    """Scores from which no curve or interval can be computed."""


class AttackError(RingmarkError):
    """An attack that there is not, or that cannot be done to this image."""


class CalibrationError(RingmarkError):
    """A calibration that cannot be made, read, written or used here."""
