"""Load what the tasks need: a model by name, and a verifier for keys with the calibration that fits."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from platformdirs import user_cache_dir
from safetensors.torch import save

from ringmark.data.files import read_tensors, write_atomic
from ringmark.errors import KeyFileError, ModelError, RingmarkError, SchemeError, StoreError
from ringmark.inversion.models.devices import placement
from ringmark.inversion.models.loading import EMBEDDED, resolve
from ringmark.inversion.models.lora import split_scale
from ringmark.inversion.models.model_files import locate
from ringmark.inversion.models.pipeline import LatentModel, empty_prompt
from ringmark.inversion.recover import STEPS, Recoverer
from ringmark.inversion.sizes import Size
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.detector import check_unranked
from ringmark.watermark.detect.search import Search
from ringmark.watermark.detect.verifier import Verifier, built_in_calibration
from ringmark.watermark.keys.folder import load_ring
from ringmark.watermark.keys.key import Key, distinct
from ringmark.watermark.schemes.base import scheme_of
from ringmark.watermark.statistics import ALPHA

__all__ = [
    "Keys",
    "Model",
    "Setup",
    "StrPath",
    "check_alpha",
    "load_calibration",
    "load_keys",
    "load_model",
    "load_verifier",
]

LOG = logging.getLogger(__name__)

MAX_BYTES = 64 << 20  # of an empty prompt; that of FLUX.1 has 8 MB
ROW = ".row"  # ends the name of the only row of a list

StrPath: TypeAlias = "str | PathLike[str]"
Keys: TypeAlias = "Key | StrPath | Iterable[Key | StrPath]"
"""One key or several, each a Key, a key file or a folder of keys."""
Model: TypeAlias = "str | LatentModel"
"""A loaded model, or the name of one: "pocket", a diffusers folder or a hub id."""


class Setup(NamedTuple):
    """A verifier, and why the model's own calibration is not used ("" if it is used or there is none)."""

    verifier: Verifier
    unchecked: str


@cache
def load_model(
    source: str = "pocket",
    device: str = "auto",
    dtype: str = "auto",
    *,
    loras: tuple[str, ...] = (),
    offload: str | None = None,
    text: bool = True,
) -> LatentModel:
    """The model of this name, with these LoRA files, loaded once: see `load_pipeline`.

    `device` is as in torch, `dtype` one of torch's floating-point types; "auto" is as in `LatentModel.from_pretrained`.
    Without `text`, the text encoders, which only drawing needs, are left out. Raises ModelError for a device that
    cannot be used and for a model that cannot be loaded.
    """
    if device != "auto":
        _check_device(device)
    started = time.perf_counter()
    kind = None if dtype == "auto" else getattr(torch, dtype)
    empty = None if text else load_empty_prompt(source, *placement(device, kind), loras=loras)
    model = LatentModel.from_pretrained(
        source, loras=loras, device=device, dtype=kind, text=text, empty=empty, offload=offload
    )
    seconds = time.perf_counter() - started
    LOG.info("loaded model %s on %s in %s (%.1f s)", model.name, model.device, model.dtype, seconds)
    return model


def load_empty_prompt(
    source: str, device: torch.device, dtype: torch.dtype, *, loras: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The embedding of the empty prompt, from the user's cache folder.

    It is stored there under a digest of everything that it depends on, so the text encoders are loaded only once. The
    folder, RINGMARK_CACHE or else the system's cache folder, need not exist or be writable. Raises ModelError.
    """
    file = _prompt_file(source, dtype, loras)
    try:
        kept = {
            name: torch.from_numpy(values) for name, values in read_tensors(file, max_bytes=MAX_BYTES).tensors.items()
        }
    except StoreError:  # not there, or damaged
        kept = _as_tensors(empty_prompt(source, loras=loras, device=str(device), dtype=dtype))
        try:
            write_atomic(file, save(kept))
        except OSError as error:
            LOG.info("the embedding of the empty prompt cannot be stored: %s", error)
    lists = {name.removesuffix(ROW): [values] for name, values in kept.items() if name.endswith(ROW)}
    return {name: values for name, values in kept.items() if not name.endswith(ROW)} | lists


def _prompt_file(source: str, dtype: torch.dtype, loras: tuple[str, ...]) -> Path:
    files, scales = zip(*map(split_scale, loras), strict=True) if loras else ((), ())
    versions = [metadata.version(name) for name in ("diffusers", "transformers")]
    key = repr([locate(source).text_digest(files), scales, dtype, *versions])
    folder = Path(os.environ.get("RINGMARK_CACHE") or user_cache_dir("ringmark", appauthor=False))
    return folder / "prompts" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def _as_tensors(rows: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Rows as a file holds them: in float32 or whole numbers, and the only row of a list under a name of its own."""
    named = {f"{name}{ROW}" if isinstance(values, list) else name: values for name, values in rows.items()}
    tensors = {name: values[0] if isinstance(values, list) else values for name, values in named.items()}
    return {name: (x.float() if x.is_floating_point() else x).contiguous() for name, x in tensors.items()}


def _check_device(device: str) -> None:
    """Raises ModelError unless a tensor can be put on this device."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:  # torch's message lists every kind that it was ever built for
        raise ModelError("model.device", "is not the name of a device", subject=f"device {device}") from error
    if kind == "meta":
        raise ModelError("model.device", "holds no values", subject=f"device {device}")
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:  # torch asserts that it was built with CUDA
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError("model.device", f"cannot be used ({reason})", subject=f"device {device}") from error


def load_keys(keys: Keys) -> list[Key]:
    """The keys without duplicates. Raises KeyFileError."""
    given = [keys] if isinstance(keys, (Key, str, PathLike)) else list(keys)
    paths = [Path(key) for key in given if not isinstance(key, Key)]
    loaded = [key for key in given if isinstance(key, Key)]
    ring = load_ring(paths) if paths else {}
    _check_descriptions(ring)
    return distinct([*loaded, *ring.values()])


def _check_descriptions(ring: Mapping[Path, Key]) -> None:
    """Raises KeyFileError for a file whose description makes no mark; among many keys, one must be named."""
    checked = set[str]()
    for path, key in ring.items():
        description = repr([value for name, value in key.metadata.items() if name not in ("created", "model")])
        if description not in checked:
            try:
                scheme_of(key)
            except SchemeError as error:
                fact = f"describes an impossible mark ({error})"
                raise KeyFileError("key.description", fact, subject=path) from error
            checked.add(description)


def load_calibration(calibration: StrPath | Calibration | None) -> Calibration | None:
    """The calibration, read if it is a file. Raises CalibrationError."""
    return Calibration.load(Path(calibration)) if isinstance(calibration, (str, PathLike)) else calibration


def check_alpha(alpha: float) -> None:
    """Raises RingmarkError for a significance level outside (0, 1)."""
    if not 0 < alpha < 1:
        raise RingmarkError("detector.alpha", "must lie strictly between 0 and 1", subject=f"alpha {alpha:g}")


def load_verifier(
    keys: Keys,
    *,
    model: Model = "pocket",
    device: str = "auto",
    dtype: str = "auto",
    offload: str | None = None,
    method: str = "operator",
    max_steps: int | None = None,
    steps: int = STEPS,
    alpha: float = ALPHA,
    calibration: StrPath | Calibration | None = None,
    search: bool = False,
    sizes: Sequence[Size] = (),
    thorough: bool = False,
) -> Setup:
    """A verifier for these keys, with this calibration or with the model's own if that fits.

    A loaded `model` is used as it is; `device`, `dtype` and `offload` are then ignored. Keys and calibration are read
    before the model is loaded, so that mistakes there show early. Raises KeyFileError, also if `keys` is empty,
    CalibrationError, ModelError, SchemeError for a key that cannot be searched for or whose p needs a calibration, and
    RingmarkError for an `alpha` outside (0, 1).
    """
    check_alpha(alpha)
    loaded = load_keys(keys)
    if not loaded:
        raise KeyFileError("key.not-given", "no key to look for")
    given = load_calibration(calibration)
    if given:
        given.check_level(alpha)
    latent_model = load_model(model, device, dtype, offload=offload, text=False) if isinstance(model, str) else model
    recoverer = Recoverer.named(latent_model, method, max_steps, steps)
    used, unchecked = (given, "") if given else _built_in(recoverer, loaded, model)
    finder = Search() if search else None
    verifier = Verifier(recoverer, loaded, alpha=alpha, calibration=used, search=finder, sizes=sizes, thorough=thorough)
    if not used:
        check_unranked(verifier.detector.schemes.values())
    return Setup(verifier, unchecked)


def _built_in(recoverer: Recoverer, keys: list[Key], model: Model) -> tuple[Calibration | None, str]:
    """The model's own calibration and "", or None and the reason if it does not fit."""
    source = model if isinstance(model, str) else model.name
    if not (isinstance(model, str) or source in EMBEDDED):  # a loaded model does not know its folder
        return None, ""
    calibration, error = built_in_calibration(recoverer, keys, Path(resolve(source)))
    if error:
        LOG.info("the model's calibration is not used: %s", error)
    return calibration, error.fact if error else ""
