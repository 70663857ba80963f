"""Where the files of a model are: a diffusers folder, a repository on the hub, or a single file and its configs.

Only names and headers are read here; what is missing or pickled is found before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch

from ringmark.errors import ModelError, counted

__all__ = ["EMBEDDED", "INDEX", "POCKET", "UNUSED", "ModelFiles", "download", "is_text", "locate", "resolve"]

EMBEDDED = {name: Path(__file__).resolve().parents[2] / "data" / name for name in ("pocket", "pocket_flow")}
"""The folders of the models that ship with ringmark, by name."""
POCKET = EMBEDDED["pocket"]

INDEX = "model_index.json"
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of diffusers pipelines that drawing from a prompt does not need."""
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
CONFIGS = (".json", ".txt", ".model", ".jinja")
WEIGHTS = re.compile(  # model.fp16-00001-of-00002.safetensors, model.safetensors.index.fp16.json; older: …-of-2.fp16.…
    r"(?:diffusion_pytorch_model|model)(?:\.(\w+))?(?:-\d+-of-\d+)?(?:\.(\w+))?"
    r"\.safetensors(?:\.index(?:\.(\w+))?\.json)?"
)
VARIANTS: dict[torch.dtype | None, str] = {torch.float16: "fp16", torch.bfloat16: "bf16"}
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PATIENCE = 2.0  # seconds for the hub's first answer, which takes a tenth of that
WHOLE, BLOCK, BLOCKS = 1 << 20, 1 << 12, 64  # bytes; see ModelFiles.text_digest


class Weights(NamedTuple):
    """A variant of a part's weights, such as "fp16", None for the one without a name; and their dtype."""

    variant: str | None
    dtype: torch.dtype


@dataclass(frozen=True)
class ModelFiles:
    """A model's name as it was given, its diffusers folder, and the single file that holds its weights, if any."""

    source: str
    folder: Path
    file: Path | None = None

    def refusal(self, code: str, fact: str, **details: object) -> ModelError:
        """An error about this model."""
        return ModelError(code, fact, subject=self.source, **details)

    def index(self) -> dict[str, Any]:
        """The content of model_index.json. Raises ModelError."""
        index = self.json(INDEX)
        if not isinstance(index.get("_class_name"), str):
            raise self.refusal("model.damaged", f"its {INDEX} names no pipeline")
        return index

    def json(self, name: str) -> dict[str, Any]:
        """The content of a JSON file in the folder. Raises ModelError unless it is a JSON object."""
        try:
            content = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise self.refusal("model.damaged", f"its {name} cannot be read ({error})") from error
        if not isinstance(content, dict):
            raise self.refusal("model.damaged", f"its {name} is not a JSON object")
        return content

    def weights(self, part: str, dtype: torch.dtype | None) -> Weights:
        """The weights of `part` to load. Raises ModelError unless their files are there, safetensors and whole."""
        folder = self.folder / part
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        variant, files = choose(names, dtype)
        if not files:
            raise self.without(part, names)
        listed = {name for file in files if file.endswith(".json") for name in self._listed(f"{part}/{file}")}
        if missing := sorted(listed.difference(names)):
            fact = f"{len(missing)} of {counted(len(listed), 'file')} with weights of its {part} are missing"
            raise self.refusal("model.incomplete", f"{fact}, the first is {missing[0]}")
        kinds = [self.stored(folder / name) for name in sorted(listed) or files]
        return Weights(variant, kinds[0])

    def _listed(self, name: str) -> set[str]:
        """The files with weights that an index lists."""
        listed = self.json(name).get("weight_map")
        if not isinstance(listed, dict):
            raise self.refusal("model.damaged", f"its {name} lists no weights")
        return set(map(str, listed.values()))

    def without(self, part: str, names: Iterable[str]) -> ModelError:
        """The error for a part in whose folder, with files of these names, there are no weights."""
        if any(name.endswith(PICKLES) for name in names):
            fact = f"the weights of its {part} are pickled, and pickled weights are never loaded"
            return self.refusal("model.pickled", fact)
        return self.refusal("model.incomplete", f"lacks the weights of its {part}")

    def stored(self, path: Path) -> torch.dtype:
        """The dtype of most tensors of a safetensors file, bfloat16 for dtypes to compute with which it is widened.

        Raises ModelError if the file's size does not fit its header, as after an interrupted download.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                kinds = Counter(file.get_slice(key).get_dtype() for key in file.keys())
        except (SafetensorError, OSError) as error:
            name = path.relative_to(self.folder) if self.folder in path.parents else path.name
            raise self.refusal("model.damaged", f"{name} is truncated or damaged ({error})") from error
        most = kinds.most_common(1)
        return STORED.get(most[0][0] if most else "F32", torch.bfloat16)

    def text_digest(self, loras: Sequence[Path] = ()) -> str:
        """32 hex digits of a hash over everything that determines how a prompt is encoded.

        These are the files of text encoders and tokenizers, the single file and LoRA files, with their names and sizes.
        Of a file of more than 1 MiB, the first MiB, which holds the header of a safetensors file, and 64 blocks of
        4 KiB at equal distances are hashed, so that gigabytes take milliseconds.
        """
        files = [path for path in sorted(self.folder.glob("*/*")) if is_text(path.parent.name) and path.is_file()]
        digest = hashlib.sha256(str(self.index()["_class_name"]).encode())
        for path in (*files, *([self.file] if self.file else []), *loras):
            size = path.stat().st_size
            digest.update(f"{path.parent.name}/{path.name} {size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(WHOLE))
                for block in range(BLOCKS if size > WHOLE else 0):
                    file.seek(WHOLE + (size - WHOLE) * block // BLOCKS)
                    digest.update(file.read(BLOCK))
        return digest.hexdigest()[:32]


def is_text(part: str) -> bool:
    """Whether a part of a pipeline, by its name, serves to encode prompts."""
    return part.startswith(("text_encoder", "tokenizer"))


def choose(names: Iterable[str], dtype: torch.dtype | None) -> tuple[str | None, list[str]]:
    """The variant to load and its files, of files of these names: the full weights if there are any.

    Otherwise the variant of this dtype, or any. A model is then the same one on every device.
    """
    groups: dict[str | None, list[str]] = {}
    for name in sorted(names):
        if found := WEIGHTS.fullmatch(name):
            groups.setdefault(found[1] or found[2] or found[3], []).append(name)
    variant = min(groups, key=lambda v: (v is not None, v != VARIANTS.get(dtype), v or ""), default=None)
    return variant, groups.get(variant, [])


def resolve(source: str | Path) -> str:
    """The path or hub id of one of EMBEDDED, a folder, a file or a hub id. Raises ModelError for another path."""
    path = EMBEDDED.get(str(source)) or Path(source).expanduser()
    if (path / INDEX).is_file() or (path.is_file() and path.suffix == ".safetensors"):
        return str(path)
    if path.is_file() and path.suffix in PICKLES:
        raise ModelError("model.pickled", "is a pickle, and pickled weights are never loaded", subject=source)
    if path.exists() or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        fact = f"not a diffusers model (it has no {INDEX})"
        raise ModelError("model.not-one", fact, subject=source)
    return str(source)


def locate(source: str | Path, dtype: torch.dtype | None = None) -> ModelFiles:
    """Where this model is. The network is used only for a hub id of which nothing is in the hub's cache.

    The configs of a single file are in the folder that holds it or in the folder beside it with the same stem. A hub
    id may end in "@revision". Raises ModelError.
    """
    where = resolve(source)
    path = Path(where)
    if path.is_dir():
        return ModelFiles(where, path)
    if path.is_file():
        folders = [folder for folder in (path.with_suffix(""), path.parent) if (folder / INDEX).is_file()]
        if folders:
            return ModelFiles(where, folders[0], path)
        fact = f"a single file does not hold the model's configs: a diffusers folder with them is needed ({INDEX} …)"
        raise ModelError("model.no-configs", fact, subject=source, folder=path.with_suffix(""))
    return cached(where) or download(where, dtype)


def split_revision(source: str) -> tuple[str, str | None]:
    """The hub id and the revision of "id@revision"."""
    repository, _, revision = source.partition("@")
    return repository, revision or None


def cached(source: str) -> ModelFiles | None:
    """Where the hub's cache has this model, perhaps not all of it."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repository, revision = split_revision(source)
    try:
        found = try_to_load_from_cache(repository, INDEX, revision=revision)
    except HFValidationError:
        return None
    return ModelFiles(source, Path(found).parent) if isinstance(found, str) else None


def download(source: str, dtype: torch.dtype | None = None) -> ModelFiles:
    """Download configs and safetensors of a model from the hub. Raises ModelError within two seconds without network.

    Weights of one variant are downloaded for each part, those for `dtype` if there are no full ones.
    """
    from huggingface_hub import HfApi, snapshot_download

    repository, revision = split_revision(source)
    try:
        info = HfApi().model_info(repository, revision=revision, timeout=PATIENCE)
        names = [file.rfilename for file in info.siblings or ()]
        chosen = wanted(ModelFiles(source, Path()), names, dtype)
        folder = snapshot_download(repository, revision=info.sha, allow_patterns=chosen)
    except ModelError:
        raise
    except Exception as error:  # of the hub's client, of its transport and of the network
        fact = "no such file or folder, and no model of this name is in the hub's cache or reachable on the hub"
        reason = (str(error).partition("\n")[0] or type(error).__name__).partition(". ")[0][:200]
        raise ModelError("model.unreachable", f"{fact} ({reason})", subject=source) from error
    return ModelFiles(source, Path(folder))


def wanted(model: ModelFiles, names: Sequence[str], dtype: torch.dtype | None) -> list[str]:
    """Which of a repository's files to download. Raises ModelError if the weights of a part are pickled only."""
    if INDEX not in names:
        raise model.refusal("model.not-one", f"not a diffusers model (it has no {INDEX})")
    folders: dict[str, list[str]] = {}
    for path in map(PurePosixPath, names):
        if len(path.parts) == 2 and path.parts[0] not in UNUSED:
            folders.setdefault(path.parts[0], []).append(path.name)
    chosen = [INDEX]
    for part, files in folders.items():
        weights = choose(files, dtype)[1]
        if not weights and any(name.endswith(PICKLES) for name in files):
            raise model.without(part, files)
        configs = [name for name in files if name.endswith(CONFIGS) and not WEIGHTS.fullmatch(name)]
        chosen += [f"{part}/{name}" for name in (*configs, *weights)]
    return chosen
