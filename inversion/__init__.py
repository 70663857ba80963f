"""From pixels back to noise: gradient-free decoder inversion and DDIM inversion of latent diffusion models."""

from __future__ import annotations

import importlib

# Looked up on first use (PEP 562), so that importing the package does not import torch. `inversion.solve` is
# the module: solve() is imported from there.
_HOMES = {
    "Adam": "methods",
    "Anderson": "methods",
    "ForwardStep": "methods",
    "InertialKM": "methods",
    "Grid": "grid",
    "LatentModel": "model",
    "ModelError": "errors",
    "Solution": "solve",
    "Status": "solve",
    "invert_decoder": "decoder",
    "invert": "diffusion",
    "sample": "diffusion",
    "transfer": "diffusion",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
