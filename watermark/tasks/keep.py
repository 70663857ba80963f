"""What the kept noise of an audit needs to be tested, in files next to it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ringmark.data.files import read_tensors, write_atomic
from ringmark.data.reader import read_settings
from ringmark.data.settings import typed
from ringmark.data.tensor_files import TensorFiles
from ringmark.errors import StoreError
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.kept import Context
from ringmark.watermark.detect.verifier import Verifier
from ringmark.watermark.null import Null

__all__ = ["keep_context", "load_context"]

CONTEXT, HEADER = "context.safetensors", "ringmark noise"
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class _Description:
    """The metadata of a context."""

    kind: dict[str, Any]
    latent_shape: list[int]
    side: int
    name: str


def keep_context(results: Path, verifier: Verifier) -> None:
    """Write what kept noise needs to be tested: the model's null, and the calibration with its unmarked images."""
    from safetensors.numpy import save

    folder, model = TensorFiles(results).folder, verifier.recoverer.model
    null = Null.of_model(model)
    about = _Description(kind=model.kind, latent_shape=list(model.latent_shape), side=null.side, name=null.name)
    tensors = {"covariance": np.ascontiguousarray(null.covariance)} if model.recovery else {}
    write_atomic(folder / CONTEXT, save(tensors, {HEADER: json.dumps(asdict(about))}), 0o600)
    if verifier.calibration:
        verifier.calibration.save(folder / Calibration.FILE)


def load_context(results: Path) -> Context:
    """What `keep_context` has written.

    Raises StoreError (noise.none) for results without noise, noise.damaged, noise.calibration if the calibration is not
    that of the audit; and CalibrationError.
    """
    settings, folder = read_settings(results), TensorFiles(results).folder
    if settings.get("noise") != "kept":
        raise StoreError("noise.none", "keeps no noise", subject=results)
    tensors, metadata = read_tensors(folder / CONTEXT, max_bytes=MAX_BYTES, room="noise")
    try:
        about = typed(_Description, json.loads(metadata[HEADER]))
        channels, height, width = about.latent_shape
    except (ValueError, LookupError) as error:
        raise StoreError("noise.damaged", "is damaged or of another kind", subject=folder / CONTEXT) from error
    calibration = Calibration.load(folder / Calibration.FILE) if settings["calibration"] else None
    if calibration and calibration.fingerprint != settings["calibration"]:
        raise StoreError("noise.calibration", "is not that of the audit", subject=folder / Calibration.FILE)
    return Context(
        identity=settings["model"],
        kind=about.kind,
        latent_shape=(channels, height, width),
        weights=settings.get("stages", {}),
        thorough=settings.get("thorough", False),
        null=Null(tensors["covariance"], about.side, name=about.name) if tensors else None,
        calibration=calibration,
    )
