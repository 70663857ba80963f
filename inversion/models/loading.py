"""Find a model and load its parts, from safetensors only: nothing is unpickled."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ringmark.errors import ModelError

__all__ = ["POCKET", "check_tokenizer", "load_pipeline", "quiet", "resolve"]

POCKET = Path(__file__).resolve().parents[2] / "data" / "pocket"
"""The folder of the model that ships with ringmark."""


def resolve(source: str | Path) -> str:
    """The path or hub id of "pocket", a folder or a hub id. Raises ModelError for a path that is not a model."""
    folder = POCKET if str(source) == "pocket" else Path(source).expanduser()
    if (folder / "model_index.json").is_file():
        return str(folder)
    if folder.exists() or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise ModelError("model.not-one", "not a diffusers model (it has no model_index.json)", subject=source)
    return str(source)


def load_pipeline(source: str) -> Any:
    """The pipeline of a diffusers folder or hub id, in float32.

    Raises ModelError, with the code "model.unreachable" if there is no such model, otherwise "model.damaged".
    """
    try:
        return _assemble(_load_parts(source))
    except Exception as error:  # three libraries raise all kinds of errors for missing, damaged or wrong files
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if not Path(source).is_dir():
            fact = f"no such folder, and no model of this name in the cache or reachable on the hub ({reason})"
            raise ModelError("model.unreachable", fact, subject=source) from error
        fact = f"cannot be loaded as a latent diffusion model: {reason}"
        raise ModelError("model.damaged", fact, subject=source) from error


def _load_parts(source: str) -> dict[str, Any]:
    from diffusers import DDIMScheduler, ModelMixin, SchedulerMixin, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    vae = _class_of(UNet2DConditionModel.load_config(source, subfolder="vae"), ModelMixin)
    schedule = DDIMScheduler.load_config(source, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer")
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError("the tokenizer has no vocabulary")
    parts = {
        "vae": _whole(vae, source, "vae", torch_dtype=torch.float32),
        "unet": _whole(UNet2DConditionModel, source, "unet", torch_dtype=torch.float32),
        "text_encoder": _whole(CLIPTextModel, source, "text_encoder", dtype=torch.float32),
        "tokenizer": tokenizer,
        "scheduler": _class_of(schedule, SchedulerMixin).from_config(schedule),
    }
    check_tokenizer(tokenizer, parts["text_encoder"])
    return parts


def _assemble(parts: dict[str, Any]) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline

    from ringmark.inversion.models.flow import RectifiedFlowPipeline

    flows = isinstance(parts["scheduler"], FlowMatchEulerDiscreteScheduler)
    kind = RectifiedFlowPipeline if flows else StableDiffusionPipeline
    return kind(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def _whole(kind: Any, source: str, part: str, **dtype: torch.dtype) -> Any:
    """A module with all of its weights; the libraries would fill missing ones with random numbers."""
    module, info = kind.from_pretrained(source, subfolder=part, use_safetensors=True, output_loading_info=True, **dtype)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{part}: {len(missing)} tensors are missing, the first is {missing[0]}")
    return module


def check_tokenizer(tokenizer: Any, text_encoder: Any) -> None:
    """Raises ValueError if the tokenizer has tokens for which the text encoder has no embedding."""
    needed, rows = max(tokenizer.get_vocab().values()) + 1, text_encoder.get_input_embeddings().num_embeddings
    if needed > rows:
        raise ValueError(f"the tokenizer has {needed} tokens, but the text encoder embeds only {rows}")


def _class_of(config: dict[str, Any], base: Any) -> Any:
    """The class of diffusers that a config names."""
    import diffusers

    name = config.get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ValueError(f"{name!r} is not a {base.__name__} of diffusers {diffusers.__version__}")
    return kind


@contextmanager
def quiet() -> Iterator[None]:
    """Context in which diffusers and transformers print nothing; errors are still raised."""
    import diffusers.utils.logging as diffusers_log
    import transformers.utils.logging as transformers_log

    logs = (diffusers_log, transformers_log)
    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity(log.CRITICAL)
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        for log, verbosity, bars in before:
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()
