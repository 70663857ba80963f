"""The interface of watermarking schemes and their registry. Imports nothing heavy.

A new scheme is one class in one file and one call of `register`; nothing else in the project names a scheme or its
fields.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from ringmark.errors import SchemeError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ringmark.inversion.noise_recovery import NoiseRecovery
    from ringmark.watermark.keys.key import Key
    from ringmark.watermark.null import Array, Null

__all__ = [
    "DEFAULT",
    "REGISTRY",
    "Panel",
    "Parameter",
    "PublishedStatistic",
    "Scheme",
    "SchemeEntry",
    "SchemeTest",
    "TemplateTest",
    "Waves",
    "description",
    "make_key",
    "parameters_text",
    "published_statistics",
    "recommended",
    "register",
    "scheme_of",
]

DEFAULT = "tree-ring"


class Panel(NamedTuple):
    """A spectrum to draw: `values` (h, w) with DC in the middle, the mask of the mark (`inside`) and its `radii`.

    Radii are in cycles per `side` pixels of the latent.
    """

    title: str
    values: Array
    inside: np.ndarray[Any, np.dtype[np.bool_]]
    radii: tuple[int, int]
    side: int


class Waves(NamedTuple):
    """What a search looks for: values (c, n) of a key's plane waves in its `channels`, with phases about the middle.

    `frequencies` (n, 2) are in cycles per latent pixel, right and down, one of each conjugate pair; `ring` (n,) is
    theirs. The values must be independent, of random direction and of one variance.
    """

    channels: tuple[int, ...]
    frequencies: Tensor
    ring: Tensor
    values: Tensor


class SchemeTest(Protocol):
    """A scheme's test of one key under one null."""

    @property
    def template(self) -> Array | None:
        """The key (d,) whose cosine with what is observed decides; None if something else does."""
        ...

    def observe(self, noise: Tensor) -> Array:
        """Recovered noise (B, C, h, w) → the features (B, d) of the test, which are the same for all keys of a kind."""
        ...

    def score(self, observed: Array) -> Array:
        """Features (B, d) → scores (B,), larger for marked images; a vector of zeros scores lowest or neutral."""
        ...

    def log10_p(self, scores: Array, references: Array | None = None) -> Array:
        """log₁₀ of the one-sided p-values (B,) of scores; `references` (n,) are scores of unmarked images."""
        ...

    def density(self, scores: Array) -> Array | None:
        """The null density at these scores; None if it is not known."""
        ...


@runtime_checkable
class TemplateTest(SchemeTest, Protocol):
    """A test with a `template`, on which p depends only through the score, so that many keys are tested at once."""

    @property
    def template(self) -> Array:
        """The key (d,)."""
        ...

    def templates(self, schemes: Sequence[Any]) -> Array:
        """The templates (K, d) of keys of the same kind."""
        ...

    def scores(self, observed: Array, templates: Array) -> Array:
        """Features (B, d), templates (K, d) → scores (B, K)."""
        ...


class Scheme(Protocol):
    """A scheme with one key."""

    label: str
    """Short description of the key in tables, such as "rand"."""
    kind: Hashable
    """Keys of one kind share `observe`, and equal scores have equal p-values."""
    latent_shape: tuple[int, int, int]
    score_name: str
    free: int
    """The number of free numbers of a key; 0 if all keys are the same."""
    waves: Waves | None
    """What a search looks for; None if the key cannot be searched for."""

    def embed(self, noise: Tensor) -> Tensor:
        """Unit normal noise (B, C, h, w) → marked noise of the same shape, which still looks normal to the model."""
        ...

    def check_findable(self, alpha: float) -> None:
        """Raises SchemeError for a key with too few free numbers for any realistic image to reach p ≤ alpha."""
        ...

    def on(self, null: Null) -> SchemeTest:
        """The test of this key under `null`."""
        ...

    def published(self, noise: Tensor) -> dict[str, Array]:
        """Values (B,) of the entry's published statistics of noise (B, C, h, w), by name; may be empty."""
        ...

    def panels(self, noise: Tensor) -> list[Panel]:
        """Panels for figures: one channel of one noise (1, C, h, w), then of the key. May be empty."""
        ...

    def key_panels(self) -> list[Panel]:
        """Panels for figures: the key, one panel per latent channel. May be empty."""
        ...


@dataclass(frozen=True)
class Parameter:
    """A parameter of new keys; `parse` reads it from text, or raises ValueError with the expected form."""

    name: str
    help: str
    parse: Callable[[str], Any] = str
    default: Any = None
    choices: tuple[str, ...] = ()
    show: Callable[[Any], str] = str


@dataclass(frozen=True)
class PublishedStatistic:
    """A statistic of a scheme as published: `name` is its column in results, `label` its name in tables and plots.

    ROC curves, plots and gains compare it with the score if `compared`.
    """

    name: str
    label: str
    larger_if_marked: bool
    compared: bool = True

    @property
    def sign(self) -> int:
        """The sign that makes it larger for marked images."""
        return 1 if self.larger_if_marked else -1


@dataclass(frozen=True)
class SchemeEntry:
    """A scheme by name. `home` is "module:Class", imported on first use, or the class itself.

    The class takes a key and the shape (C, h, w) of the latents to mark. Its `fields(latent_shape, *, recovery,
    **parameters)` are its own fields of a new key's description, for latents of the reference size: `recovery` is how
    well the model's noise is recovered, if known. Its `recommend(recovery, latent_shape)` gives the parameters that it
    recommends for new keys, by name; may be empty.
    """

    name: str
    home: str | type
    parameters: tuple[Parameter, ...] = ()
    published: tuple[PublishedStatistic, ...] = ()

    @property
    def kind(self) -> Any:
        """The class."""
        if not isinstance(self.home, str):
            return self.home
        module, _, name = self.home.partition(":")
        return getattr(importlib.import_module(module), name)


REGISTRY: dict[str, SchemeEntry] = {}


def register(entry: SchemeEntry) -> None:
    """Register a scheme. Raises SchemeError if its name, or that of one of its statistics, is taken."""
    if entry.name in REGISTRY:
        raise SchemeError("scheme.registered", "is registered already", subject=f"scheme {entry.name!r}")
    for new, old in product(entry.published, published_statistics().values()):
        if new != old and (new.name == old.name or new.label == old.label):
            raise SchemeError("scheme.registered", "is registered already", subject=f"statistic {new.name!r}")
    REGISTRY[entry.name] = entry


def published_statistics() -> dict[str, PublishedStatistic]:
    """The published statistics of all schemes, by name."""
    return {statistic.name: statistic for entry in REGISTRY.values() for statistic in entry.published}


def _entry(name: str) -> SchemeEntry:
    if name not in REGISTRY:
        known = ", ".join(sorted(REGISTRY))
        raise SchemeError(
            "scheme.unknown", f"unknown scheme; known schemes are {known}", subject=f"scheme {name!r}", known=known
        )
    return REGISTRY[name]


def scheme_of(key: Key, latent_shape: tuple[int, int, int] | None = None) -> Scheme:
    """The scheme of this key for latents (C, h, w), by default those of the key's reference size.

    Raises SchemeError for an unknown scheme, for a key that does not fit its scheme and for latents that it cannot
    mark.
    """
    shape = latent_shape or key.latent_shape
    entry = _entry(key.metadata["scheme"])
    if shape[0] != key.latent_shape[0] or (key.values is not None and shape != key.latent_shape):
        old = key.values is not None
        fits = "x".join(map(str, key.latent_shape)) if old else f"{key.latent_shape[0]} channels"
        raise SchemeError(
            "scheme.old-key" if old else "scheme.noise",
            f"marks only latents of {fits}, not {'x'.join(map(str, shape))}",
            subject=f"key {key.fingerprint[:8]}",
        )
    scheme: Scheme = entry.kind(key, shape)
    return scheme


def make_key(
    name: str,
    *,
    kind: Mapping[str, Any],
    reference: Sequence[int],
    model: Mapping[str, Any],
    recovery: NoiseRecovery | None = None,
    secret: bytes | None = None,
    **parameters: Any,
) -> Key:
    """A new key of a scheme, whose description is as in `Key`.

    Its secret comes from the operating system unless it is given (tests, experiments). `recovery` is how well noise of
    the reference size is recovered, if known. `parameters` are those of the scheme's entry; None means the default.
    Raises SchemeError for an unknown scheme or parameter and for a mark that does not fit the latents.
    """
    from ringmark.watermark.keys.key import Key

    entry = _entry(name)
    if unknown := sorted(parameters.keys() - {p.name for p in entry.parameters}):
        raise SchemeError("scheme.parameter", f"has no parameter {unknown[0]!r}", subject=f"scheme {name!r}")
    chosen = {p.name: p.default if (given := parameters.get(p.name)) is None else given for p in entry.parameters}
    common = {"kind": dict(kind), "reference": list(reference), "model": dict(model)}
    fields = entry.kind.fields(Key(common).latent_shape, recovery=recovery, **chosen)
    return Key.new(secret, scheme=name, **fields, **common)


def recommended(name: str, recovery: NoiseRecovery | None, latent_shape: tuple[int, int, int]) -> dict[str, Any]:
    """The parameters that a scheme recommends for new keys of latents (C, h, w), by name.

    `recovery` says how well the model's noise is recovered; None if not measured. Raises SchemeError for an unknown
    scheme.
    """
    parameters: dict[str, Any] = _entry(name).kind.recommend(recovery, latent_shape)
    return parameters


def parameters_text(name: str, parameters: Mapping[str, Any]) -> str:
    """Parameters of a scheme as text: "channels 0,2, radii 4-10"."""
    return ", ".join(map(" ".join, description({"scheme": name, **parameters}, ("scheme",)).items()))


def description(metadata: Mapping[str, Any], common: Collection[str]) -> dict[str, str]:
    """A key's scheme-specific fields as text: those of its metadata that are not `common` to all keys."""
    entry = REGISTRY.get(metadata["scheme"])
    show = {p.name: p.show for p in entry.parameters} if entry else {}
    return {name: _shown(show.get(name, str), value) for name, value in metadata.items() if name not in common}


def _shown(show: Callable[[Any], str], value: object) -> str:
    """A field as text; as it is if it makes no sense, as in a damaged key."""
    try:
        return show(value)
    except (TypeError, KeyError, IndexError):
        return str(value)
