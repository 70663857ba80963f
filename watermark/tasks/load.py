"""What the tasks start from: the model, by name."""

from __future__ import annotations

from functools import cache

import torch

from ringmark.errors import ModelError
from ringmark.inversion.models.pipeline import LatentModel

__all__ = ["load_model"]


@cache
def load_model(source: str = "pocket", device: str = "auto", dtype: str = "auto") -> LatentModel:
    """The model of this name ("pocket", a diffusers folder or a hub id), loaded once.

    `device` is as in torch, `dtype` one of torch's floating-point types; "auto" leaves either to the model. Raises
    ModelError for a device that cannot be used and for a model that cannot be loaded.
    """
    if device != "auto":
        check_device(device)
    return LatentModel.from_pretrained(source, device=device, dtype=None if dtype == "auto" else getattr(torch, dtype))


def check_device(device: str) -> None:
    """Raises ModelError unless a tensor can be put on this device."""
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:  # torch asserts that it was built with CUDA
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError("model.device", f"cannot be used ({reason})", subject=f"device {device}") from error
