"""Tell whether a picture carries the watermark of your latent diffusion model, planted in its initial noise."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ringmark.errors import (
        AttackError,
        CalibrationError,
        EvaluationError,
        ImageError,
        KeyFileError,
        MarkWarning,
        ModelError,
        RingmarkError,
        SchemeError,
        StoreError,
    )
    from ringmark.inversion.decoder import invert_decoder
    from ringmark.inversion.models.pipeline import LatentModel
    from ringmark.watermark.calibration import Calibration
    from ringmark.watermark.detect.detector import Detector
    from ringmark.watermark.detect.verdict import Verdict
    from ringmark.watermark.embed import Marking, mark
    from ringmark.watermark.keys.key import Key
    from ringmark.watermark.tasks.audit import audit
    from ringmark.watermark.tasks.keygen import new_key
    from ringmark.watermark.tasks.verify import verify

__all__ = [
    "AttackError",
    "Calibration",
    "CalibrationError",
    "Detector",
    "EvaluationError",
    "ImageError",
    "Key",
    "KeyFileError",
    "LatentModel",
    "MarkWarning",
    "Marking",
    "ModelError",
    "RingmarkError",
    "SchemeError",
    "StoreError",
    "Verdict",
    "audit",
    "invert_decoder",
    "mark",
    "new_key",
    "verify",
]

# Resolved on first use (PEP 562), so that the import takes milliseconds and does not load torch.
_HOMES = {
    "Calibration": "watermark.calibration",
    "Detector": "watermark.detect.detector",
    "Key": "watermark.keys.key",
    "LatentModel": "inversion.models.pipeline",
    "Marking": "watermark.embed",
    "Verdict": "watermark.detect.verdict",
    "audit": "watermark.tasks.audit",
    "invert_decoder": "inversion.decoder",
    "mark": "watermark.embed",
    "new_key": "watermark.tasks.keygen",
    "verify": "watermark.tasks.verify",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return __all__
