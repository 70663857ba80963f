"""Low-rank adapters (LoRA, arXiv 2106.09685), fused into the weights of a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ringmark.errors import ModelError

__all__ = ["fuse_lora", "split_scale"]

TEXT_KEYS = ("text_encoder", "lora_te", "te1.", "te2.", "text_model")


def fuse_lora(pipe: Any, lora: str | Path, *, text: bool = True, network: bool = True) -> None:
    """Add scale · B A to the weights of `pipe`, with the matrices A and B of a safetensors file or of "file:scale".

    Without `text`, matrices for text encoders are left out; without `network`, those for the network. Raises ModelError
    if the file is damaged or not a LoRA, or if one of its matrices does not fit the model.
    """
    from diffusers.utils import is_peft_available

    path, scale = split_scale(lora)
    if not is_peft_available():
        raise ModelError("model.no-peft", "a LoRA needs the package peft, which is not installed", subject=path)
    tensors = _read(path)
    chosen = {key: tensor for key, tensor in tensors.items() if (text if key.startswith(TEXT_KEYS) else network)}
    if tensors and not chosen:
        return
    try:
        expected = _matrices(_converted(pipe, chosen))
        pipe.load_lora_weights(chosen, adapter_name="fused")
    except Exception as error:  # of peft and of diffusers' conversions from a dozen layouts
        fact = f"is a LoRA for another base model, or not a LoRA ({' '.join(str(error).split())[:150]})"
        raise ModelError("model.lora", fact, subject=path) from error
    adapted = [part for part, names in pipe.get_list_adapters().items() if "fused" in names]
    found = sum(_matrices(dict(getattr(pipe, part).named_parameters())) for part in adapted)
    if not 0 < expected <= found:
        fact = f"is a LoRA for another base model: {expected - found} of its {expected} matrices do not fit this one"
        raise ModelError("model.lora", fact, subject=path)
    pipe.fuse_lora(components=adapted, lora_scale=scale)
    pipe.unload_lora_weights()


def split_scale(lora: str | Path) -> tuple[Path, float]:
    """The path and the scale of "file:0.8"; the scale is 1 if there is none."""
    name, _, number = str(lora).rpartition(":")
    try:
        return Path(name).expanduser(), float(number)
    except ValueError:
        return Path(lora).expanduser(), 1.0


def _read(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ModelError("model.lora-missing", "no such file", subject=path)
    try:
        return dict(load_file(str(path)))
    except (SafetensorError, OSError) as error:
        raise ModelError("model.lora", f"is not a safetensors file or is damaged ({error})", subject=path) from error


def _converted(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors by diffusers' names."""
    found = pipe.lora_state_dict(dict(tensors))
    return dict(found[0] if isinstance(found, tuple) else found)


def _matrices(tensors: dict[str, Any]) -> int:
    """How many of these tensors are matrices of a LoRA, by their names."""
    return sum("lora" in key and tensor.ndim > 1 for key, tensor in tensors.items())
