"""Facts about a model and this installation."""

from __future__ import annotations

import platform
from importlib.metadata import version

from ringmark.inversion.models.pipeline import LatentModel
from ringmark.watermark.schemes.base import DEFAULT, parameters_text, recommended

__all__ = ["facts"]


def facts(model: LatentModel) -> dict[str, str]:
    """Facts about a model and this installation, by name."""
    best = recommended(DEFAULT, model.recovery, model.latent_shape)
    return {
        "model": model.name,
        "fingerprint": model.identity["fingerprint"],
        "family": model.family.name,
        "image sizes": ", ".join(f"{width}x{height}" for height, width in model.sizes),
        "latent shape": "x".join(map(str, model.latent_shape)),
        "prediction": model.prediction,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "noise recovery": "measured" if model.recovery else "not measured",
        "default mark": parameters_text(DEFAULT, best),
        **{name: version(name) for name in ("ringmark", "torch", "diffusers", "transformers")},
        "python": platform.python_version(),
    }
