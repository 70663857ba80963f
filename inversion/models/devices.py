"""On which device and in which dtype a pipeline computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ringmark.inversion.models.families import network_of
from ringmark.inversion.models.model_files import is_text

__all__ = ["dtype_of", "place", "placement", "remembered", "remembering", "weights"]

HOOKS = ("_hf_hook", "_diffusers_hook")  # of accelerate and diffusers, which move and cast weights when they are needed
_ANSWERS: WeakKeyDictionary[torch.nn.Module, dict[tuple[Any, ...], Any]] = WeakKeyDictionary()


def remembered(module: torch.nn.Module, question: str, ask: Callable[[], Any]) -> Any:
    """The answer of diffusers to a question about a module, asked again only once its first weight moved or got a hook.

    diffusers looks through all modules for the device and the dtype, at every call, which takes milliseconds. Leaf by
    leaf, offloading hooks only the modules that have weights of their own.
    """
    owner = next(part for part in module.modules() if any(True for _ in part.parameters(recurse=False)))
    first = next(owner.parameters())
    state = question, first.device, first.dtype, *(hasattr(part, hook) for part in (module, owner) for hook in HOOKS)
    answers = _ANSWERS.setdefault(module, {})
    if state not in answers:
        answers[state] = ask()
    return answers[state]


def dtype_of(module: Any) -> torch.dtype:
    """The dtype in which a module of diffusers computes."""
    dtype: torch.dtype = remembered(module, "dtype", lambda: module.dtype)
    return dtype


def remembering(pipe: Any) -> Any:
    """A shallow copy of a pipeline, of the same modules, that remembers its execution device."""
    plain = type(pipe)

    def device(self: Any) -> Any:
        return remembered(network_of(self), "device", lambda: plain._execution_device.fget(self))

    body = {"_execution_device": property(device), "__module__": plain.__module__, "__doc__": plain.__doc__}
    other = copy.copy(pipe)
    other.__class__ = type(plain.__name__, (plain,), body)
    return other


def placement(device: str, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    """The device, "auto" being CUDA if available, and the dtype, by default float16 on CUDA and float32 on a CPU."""
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    return place, dtype or (torch.float16 if place.type == "cuda" else torch.float32)


def place(pipe: Any, device: torch.device, dtype: torch.dtype, offload: str | None = None) -> None:
    """Put a pipeline's modules on a device, or prepare them to be put there when they are needed."""
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            # A text encoder has its dtype already; some of its weights and buffers keep a wider one.
            part.to("cpu" if offload else device, None if is_text(name) else dtype)
            part.requires_grad_(False).eval()
    if offload:
        getattr(pipe, f"enable_{offload}_cpu_offload")(device=device)


def weights(module: Any) -> Mapping[str, Tensor]:
    """A module's weights, wherever sequential offloading has put them."""
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    offloaded = any(p.is_meta for p in module.parameters())
    found: Mapping[str, Tensor] = get_state_dict_offloaded_model(module) if offloaded else module.state_dict()
    return found
