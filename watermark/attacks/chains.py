"""Attacks as text, such as "jpeg:25+blur:4", named presets from the literature, and how to apply them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ringmark.errors import AttackError
from ringmark.watermark.attacks.distortions import ATTACKS

if TYPE_CHECKING:
    from ringmark.inversion.models.pipeline import LatentModel

__all__ = ["PRESETS", "Chain", "Step", "apply", "expand", "listing", "parse", "seed_of"]

# Low end, middle and high end of the ranges of WAVES's distortions (arXiv 2401.08573), as its code applies them: crops
# and erasures are shares of the area, blur kernel sizes are Gaussian radii.
_WAVES = {
    "weak": "rotation:9 crop:0.9 erase:0.05 brighten:1.2 contrast:1.2 blur:4 noise:0.02 jpeg:90",
    "medium": "rotation:27 crop:0.7 erase:0.15 brighten:1.6 contrast:1.6 blur:12 noise:0.06 jpeg:50",
    "strong": "rotation:45 crop:0.5 erase:0.25 brighten:2 contrast:2 blur:20 noise:0.1 jpeg:10",
}
# Shares of the schedule to which noise is added: once, twice and four times over, at the ends and the middle of the
# ranges of WAVES's regenerations, 40-200, 20-100 and 10-50 of 1000 timesteps; one and four passes of the autoencoder.
_REGENERATIONS = (
    *("diffuse:0.04", "diffuse:0.12", "diffuse:0.2"),
    *("+".join([f"diffuse:{share}"] * 2) for share in (0.02, 0.06, 0.1)),
    *("+".join([f"diffuse:{share}"] * 4) for share in (0.01, 0.03, 0.05)),
    *("vae:1", "vae:4"),
)
PRESETS = {
    # The six attacks of arXiv 2305.20030 as its text describes them.
    "tree-ring": ("rotation:75", "jpeg:25", "crop:0.75", "blur:4", "noise:0.1", "brightness:6"),
    # As its code applies them (except that it rotates by nearest neighbours), to compare with published figures; its
    # ColorJitter(6) draws from [0, 7].
    "tree-ring-code": ("rotation:75", "jpeg:25", "widthcrop:0.75", "blur:4", "wrapnoise:0.1", "brightness:7"),
    "waves": tuple(spec for group in zip(*(s.split() for s in _WAVES.values()), strict=True) for spec in group),
    **{f"waves-{name}": tuple(specs.split()) for name, specs in _WAVES.items()},
    "waves-regeneration": _REGENERATIONS,
}


@dataclass(frozen=True)
class Step:
    """One attack by name, at a strength in its range.

    Raises AttackError: attack.unknown, attack.strength, attack.no-strength.
    """

    name: str
    strength: float | None

    def __post_init__(self) -> None:
        if self.name not in ATTACKS:
            raise AttackError(
                "attack.unknown",
                f"unknown attack {self.name!r}",
                known=", ".join(ATTACKS),
                presets=", ".join(PRESETS),
            )
        known = ATTACKS[self.name]
        if self.strength is not None and not known.unit:
            raise _no_strength(self.name)
        if not known.takes(self.strength):
            fact = "the strength is out of range"
            raise AttackError("attack.strength", fact, subject=self, name=self.name, range=known.range)

    def __str__(self) -> str:
        return self.name if self.strength is None else f"{self.name}:{str(self.strength).removesuffix('.0')}"

    def __call__(self, image: Image.Image, rng: np.random.Generator, model: LatentModel | None = None) -> Image.Image:
        """The attacked image. Raises AttackError: attack.model if the attack needs a model and none is given."""
        known = ATTACKS[self.name]
        if not known.needs_model:
            return known.function(image, self.strength, rng)
        if model is None:
            raise AttackError("attack.model", "needs a model", subject=self)
        return known.function(image, self.strength, rng, model)


@dataclass(frozen=True)
class Chain:
    """Attacks applied from left to right. `str` gives the text that `parse` reads, with all strengths."""

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return "+".join(map(str, self.steps))

    @property
    def slug(self) -> str:
        """The chain as a portable file name: "jpeg-25+blur-4"."""
        return str(self).replace(":", "-")

    @property
    def needs_model(self) -> bool:
        return any(ATTACKS[step.name].needs_model for step in self.steps)

    def __call__(self, image: Image.Image, rng: np.random.Generator, model: LatentModel | None = None) -> Image.Image:
        for step in self.steps:
            image = step(image, rng, model)
        return image


def parse(spec: str) -> Chain:
    """Parse "name", "name:strength", or several joined by "+"; a name alone has its default strength.

    Raises AttackError: attack.empty, attack.unknown, attack.strength, attack.no-strength.
    """
    return Chain(tuple(_step(part.strip(), spec) for part in spec.split("+")))


def _step(part: str, spec: str) -> Step:
    name, colon, strength = (piece.strip() for piece in part.partition(":"))
    if not name:
        raise AttackError("attack.empty", "a name is missing", subject=repr(spec))
    known = ATTACKS.get(name)
    if not (known and colon):
        return Step(name, known.default if known else None)
    if not known.unit:
        raise _no_strength(name)
    try:
        number = float(strength)
    except ValueError:
        fact = f"{strength!r} is not a number"
        raise AttackError("attack.strength", fact, subject=part, name=name, range=known.range) from None
    return Step(name, number)


def _no_strength(name: str) -> AttackError:
    return AttackError("attack.no-strength", "takes no strength", subject=name)


def expand(specs: Iterable[str]) -> list[Chain]:
    """The attacks of these specs and PRESETS, in order and without duplicates.

    Raises AttackError as `parse` does.
    """
    named = [spec for given in specs for spec in PRESETS.get(given.strip(), (given,))]
    return list(dict.fromkeys(map(parse, named)))


def apply(
    spec: str | Chain, image: Image.Image, seed: int | np.random.Generator, model: LatentModel | None = None
) -> Image.Image:
    """The attacked image, 8-bit RGB of the same size; deterministic in `seed`.

    Raises AttackError as `parse` does, and attack.model, attack.size, attack.nan.
    """
    chain = parse(spec) if isinstance(spec, str) else spec
    return chain(image.convert("RGB"), np.random.default_rng(seed), model)


def seed_of(seed: int, name: str) -> int:
    """The seed of one image, derived from its path below the folder; independent of order and of other images."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()[:8], "big")


def listing() -> str:
    """All attacks and presets as text."""
    presets = (f"{name}: {', '.join(specs)}" for name, specs in PRESETS.items())
    return "\n".join([*map(_entry, ATTACKS), "", *presets])


def _entry(name: str) -> str:
    known = ATTACKS[name]
    default = "" if known.default is None else f" [{known.default:g}]"
    needs = "; needs a model" if known.needs_model else ""
    return f"{name:11} {known.range}{default}{needs}\n{'':11} {known.summary}"
