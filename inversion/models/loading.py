"""Load diffusers pipelines, from safetensors only: nothing is unpickled, and no code of a model is run."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ringmark.errors import ModelError
from ringmark.inversion.models.families import family_of
from ringmark.inversion.models.lora import fuse_lora
from ringmark.inversion.models.model_files import (
    EMBEDDED,
    INDEX,
    POCKET,
    UNUSED,
    ModelFiles,
    download,
    is_text,
    locate,
    resolve,
)

__all__ = ["EMBEDDED", "POCKET", "check_tokenizer", "load_pipeline", "quiet", "resolve", "text_pairs"]

FLOW_SCHEDULER = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
DENOISERS = ("unet", "transformer")
VAE_IN_FILE = ("first_stage_model.", "vae.")
TEXT_IN_FILE = ("cond_stage_model.", "conditioner.", "text_encoders.")


class Part(NamedTuple):
    """A part of a pipeline: its class, and where its weights are if it has any."""

    kind: Any
    stored: torch.dtype = torch.float32
    variant: str | None = None
    in_file: bool = False

    @property
    def is_module(self) -> bool:
        return issubclass(self.kind, torch.nn.Module)


class Plan(NamedTuple):
    """A pipeline's class and its arguments: a Part, None or a plain value each."""

    kind: Any
    arguments: dict[str, Any]


def load_pipeline(
    source: str | Path,
    *,
    loras: Iterable[str | Path] = (),
    text: bool = True,
    network: bool = True,
    dtype: torch.dtype = torch.float32,
    stored: bool = False,
) -> Any:
    """The diffusers pipeline of one of EMBEDDED, a diffusers folder, a hub id or a single safetensors file, on the CPU.

    Files in the hub's cache are used as they are, and only missing ones are downloaded. For a single file, see
    `locate`. Each of `loras` is a safetensors file or "file:scale" and is fused into the weights. Without `text`, text
    encoders and tokenizers are None; without `network`, all other modules are None. If `stored`, all modules except
    text encoders keep the dtype of their files instead of `dtype`. Prints nothing. Raises ModelError.
    """
    with quiet():
        model = locate(source, dtype)
        try:
            plan = _plan(model, text, dtype)
        except ModelError as error:
            if error.code != "model.incomplete" or Path(model.source).exists():
                raise
            model = download(model.source, dtype)  # the rest of an interrupted download
            plan = _plan(model, text, dtype)
        if not network:
            modules = [name for name, part in plan.arguments.items() if isinstance(part, Part) and part.is_module]
            plan.arguments.update({name: None for name in modules if not is_text(name)})
        pipe = _assemble(model, plan, dtype, stored)
        for lora in loras:
            fuse_lora(pipe, lora, text=text, network=network)
    return pipe


def _plan(model: ModelFiles, text: bool, dtype: torch.dtype) -> Plan:
    """What to load. Nothing is loaded yet, but what is missing is found. Raises ModelError."""
    index = model.index()
    kind = _pipeline_class(model, index)
    optional, held = getattr(kind, "_optional_components", ()), _held(model)
    arguments: dict[str, Any] = {}
    for name, parameter in signature(kind).parameters.items():
        if name == "requires_safety_checker":
            arguments[name] = False
        elif name in UNUSED or (is_text(name) and not text):
            arguments[name] = None
        elif name in index:
            arguments[name] = _part(model, name, index[name], dtype, held)
        elif parameter.default is parameter.empty:
            arguments[name] = None
        needed = parameter.default is parameter.empty and name not in (*UNUSED, *optional)
        spared = is_text(name) and (name in index or not text)  # Stable Diffusion 3 does without one of three
        if needed and not spared and arguments[name] is None:
            fact = f"its {INDEX} names no {name}, which a {kind.__name__} needs"
            raise model.refusal("model.incomplete", fact)
    return Plan(kind, arguments)


def _pipeline_class(model: ModelFiles, index: dict[str, Any]) -> Any:
    """The pipeline's class. diffusers has none for a UNet with velocity, which is stored as Stable Diffusion is."""
    import diffusers

    from ringmark.inversion.models.flow import RectifiedFlowPipeline

    name = index["_class_name"]
    kind = RectifiedFlowPipeline if name == RectifiedFlowPipeline.__name__ else getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        fact = f"is a {name}, which diffusers {diffusers.__version__} does not have"
        raise model.refusal("model.family", fact)
    if kind is diffusers.StableDiffusionPipeline and index.get("scheduler") == FLOW_SCHEDULER:
        return RectifiedFlowPipeline
    try:
        family_of(kind)
    except ModelError as error:
        raise model.refusal(error.code, f"is a {kind.__name__}, which {error.fact}") from error
    return kind


def _part(model: ModelFiles, name: str, entry: Any, dtype: torch.dtype, held: list[str]) -> Any:
    """An entry of model_index.json: a Part for [library, class], None for [null, null], and other values as they are.

    `held` are the names of tensors in the single file.
    """
    if not isinstance(entry, list):
        return entry
    if entry == [None, None]:
        return None
    kind = _class(model, name, entry)
    if not Part(kind).is_module:
        if not (model.folder / name).is_dir():
            raise model.refusal("model.incomplete", f"lacks its {name}")
        return Part(kind)
    begin = VAE_IN_FILE if name == "vae" else TEXT_IN_FILE
    if model.file and (name in DENOISERS or any(key.startswith(begin) for key in held)):
        return Part(kind, model.stored(model.file), in_file=True)
    weights = model.weights(name, dtype)
    return Part(kind, weights.dtype, weights.variant)


def _class(model: ModelFiles, name: str, entry: list[Any]) -> Any:
    """The class that model_index.json names, if it is one of diffusers or transformers that can be loaded."""
    import diffusers
    import transformers

    library = {"diffusers": diffusers, "transformers": transformers}.get(str(entry[0]))
    kind = getattr(library, str(entry[-1]), None)
    if not (isinstance(kind, type) and hasattr(kind, "from_pretrained")):
        versions = f"diffusers {diffusers.__version__} nor transformers {transformers.__version__}"
        fact = f"its {name} is a {'.'.join(map(str, entry))}, which neither {versions} has"
        raise model.refusal("model.part", fact)
    return kind


def _held(model: ModelFiles) -> list[str]:
    """The names of the tensors in the single file."""
    from safetensors import safe_open

    if model.file is None:
        return []
    model.stored(model.file)  # checks that it is whole
    with safe_open(model.file, framework="pt") as file:
        return list(file.keys())


def _assemble(model: ModelFiles, plan: Plan, dtype: torch.dtype, stored: bool) -> Any:
    """The pipeline of this plan. Raises ModelError for parts that are damaged or do not fit together."""
    parts = {
        name: _load(model, name, value, value.stored if stored and not is_text(name) else dtype)
        if isinstance(value, Part)
        else value
        for name, value in plan.arguments.items()
    }
    try:
        for tokenizer, encoder in text_pairs(parts):
            _fit(tokenizer, encoder)
        return plan.kind(**parts)
    except Exception as error:
        raise model.refusal("model.damaged", f"its parts do not fit together: {_reason(error)}") from error


def text_pairs(parts: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Each tokenizer of a pipeline with its text encoder, where there are both."""
    for name, tokenizer in parts.items():
        encoder = parts.get(name.replace("tokenizer", "text_encoder"))
        if name.startswith("tokenizer") and None not in (tokenizer, encoder):
            yield getattr(tokenizer, "tokenizer", tokenizer), encoder  # a processor has a tokenizer


def _fit(tokenizer: Any, encoder: Any) -> None:
    """Limit the tokenizer, which may have no limit, to the encoder's positions. Raises ValueError."""
    check_tokenizer(tokenizer, encoder)
    longest = getattr(encoder.config, "max_position_embeddings", None)
    if longest and tokenizer.model_max_length > longest:
        tokenizer.model_max_length = longest


def _load(model: ModelFiles, name: str, part: Part, dtype: torch.dtype) -> Any:
    """A part of a pipeline. Raises ModelError."""
    try:
        if part.in_file:
            return _from_file(model, name, part, dtype)
        if not part.is_module:
            return part.kind.from_pretrained(str(model.folder), subfolder=name, local_files_only=True)
        return _module(model, name, part, dtype)
    except Exception as error:  # three libraries raise all kinds of errors for damaged or wrong files
        raise model.refusal("model.damaged", f"its {name} cannot be loaded: {_reason(error)}") from error


def _module(model: ModelFiles, name: str, part: Part, dtype: torch.dtype) -> Any:
    """A module with all of its weights; the libraries would fill missing ones with random numbers."""
    from diffusers import ModelMixin

    module, info = part.kind.from_pretrained(
        str(model.folder),
        subfolder=name,
        variant=part.variant,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **{"torch_dtype" if issubclass(part.kind, ModelMixin) else "dtype": dtype},
    )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{len(missing)} tensors are missing, the first is {missing[0]}")
    return module.eval()


def _from_file(model: ModelFiles, name: str, part: Part, dtype: torch.dtype) -> Any:
    """A module whose weights are in the single file, in the layout of its authors or in that of diffusers."""
    import diffusers.pipelines
    from diffusers.loaders.single_file import load_single_file_sub_model
    from safetensors.torch import load_file

    module = load_single_file_sub_model(
        library_name=part.kind.__module__.partition(".")[0],
        class_name=part.kind.__name__,
        name=name,
        checkpoint=load_file(str(model.file)),  # mapped into memory; conversions change the dictionary
        pipelines=diffusers.pipelines,
        is_pipeline_module=False,
        cached_model_config_path=str(model.folder),
        local_files_only=True,
        torch_dtype=dtype,
    )
    if missing := sorted(key for key, tensor in module.state_dict().items() if tensor.is_meta):
        raise ValueError(f"{len(missing)} tensors are missing, the first is {missing[0]}")
    return module.eval()


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def check_tokenizer(tokenizer: Any, text_encoder: Any) -> None:
    """Raises ValueError if the tokenizer has no vocabulary, or tokens for which the text encoder has no embedding."""
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError("the tokenizer has no vocabulary")
    needed, rows = max(tokenizer.get_vocab().values()) + 1, text_encoder.get_input_embeddings().num_embeddings
    if needed > rows:
        raise ValueError(f"the tokenizer has {needed} tokens, but the text encoder embeds only {rows}")


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
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, verbosity, bars in before:
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()
