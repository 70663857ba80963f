"""The detector: decoder inversion, noise recovery, a scheme's statistic and a verdict."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ringmark.errors import CalibrationError, KeyFileError, RingmarkError
from ringmark.inversion.decoder import INVERTERS, Inverter
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.noise_recovery import rings
from ringmark.inversion.recover import Recovered, Recoverer
from ringmark.inversion.solve import Solution
from ringmark.watermark.calibration import Calibration, Null, whitened_test
from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.tree_ring import TreeRing
from ringmark.watermark.statistics import conformal_p, published_distance, published_p_value, undecided

if TYPE_CHECKING:
    from ringmark.data.images import Sample

__all__ = [
    "ALPHA",
    "Detector",
    "Judged",
    "Recovered",
    "Verdict",
    "check_fit",
    "check_method",
    "detector",
    "null_covariance",
    "where_it_fits",
    "with_built_in",
]

ALPHA = 1e-3  # an unmarked image is called marked once in a thousand
FLAT = 1 / 255  # an image whose pixels vary less than half a grey level (of a range of 2) says nothing


@dataclass(frozen=True)
class Verdict:
    """What is said of one image and one key. `present` None is "inconclusive", and `notes` say why.

    `p_value` is already corrected for the number of keys tested; `score` the whitened cosine or, for *zeros*, the power
    ratio, `published_distance` and `published_p` the published statistics; `residual` the pixel RMS of the decoder
    inversion; `seconds` of computing. Where an image `shows` nothing, being of one flat colour, say, p is 1. With
    `by_search` the search found the key, and the score is the largest of many. `calibration` is the fingerprint of the
    calibration used, if any, and `conformal_p` then the p-value by rank among its unmarked images, corrected like
    `p_value`.
    """

    sample_id: str
    key: str
    present: bool | None
    p_value: float
    score: float
    published_distance: float
    published_p: float
    residual: float | None
    status: str
    seconds: float
    label: bool | None = None
    conformal_p: float | None = None
    calibration: str | None = None
    notes: tuple[str, ...] = field(default=())
    by_search: bool = False
    shows: bool = True

    def record(self) -> dict:
        """As plain values, for a store or JSON."""
        return asdict(self) | {"notes": list(self.notes)}

    def sentence(self) -> str:
        """In words: 'carries key 3f9a…, p = 2e-9'."""
        said = {True: "carries", False: "does not carry", None: "inconclusive for"}[self.present]
        return f"{said} key {self.key[:8]}, p = {self.p_value:.2g}" + "".join(f"; {note}" for note in self.notes)


class Judged(NamedTuple):
    """A sample, its verdicts, one a key, and its recovered noise (C, h, w)."""

    sample: Sample
    verdicts: list[Verdict]
    noise: Tensor

    @property
    def best(self) -> Verdict:
        """The verdict of the key that fits best: of those present, else of the inconclusive, else of all."""
        return min(self.verdicts, key=lambda v: ((True, None, False).index(v.present), v.p_value))

    @property
    def present(self) -> list[Verdict]:
        """The verdicts of the keys that are there, the best first."""
        return sorted((v for v in self.verdicts if v.present), key=lambda v: v.p_value)

    def sentence(self) -> str:
        """In words, of all keys: which one fits, that several do, or that none does and which comes nearest."""
        best, fitting = self.best, self.present
        notes = "".join(f"; {note}" for note in best.notes)
        if len(fitting) > 1:
            named = ", ".join(f"{v.key[:8]} (p = {v.p_value:.2g})" for v in fitting)
            return f"carries {len(fitting)} keys: {named}{notes}"
        if len(self.verdicts) > 1 and best.present is False:
            return f"carries none of {len(self.verdicts)} keys, nearest {best.key[:8]}, p = {best.p_value:.2g}{notes}"
        return best.sentence()


class Detector:
    """Looks for keys in images; every key is tested on one and the same inversion.

    `inverter` inverts the decoder; `steps` are those of naive DDIM inversion with the empty prompt. `alpha` is the
    corrected p-value at which a key is called present. A `calibration` gives the null that p-values are computed on and
    unmarked images to check them by. Raises KeyFileError for a key made for other latents or another model,
    CalibrationError for a calibration made with other settings or that holds too little for a key.
    """

    TESTS: ClassVar[int] = 1
    """Of each key, for which p-values are corrected."""

    def __init__(
        self,
        model: LatentModel,
        keys: list[Key],
        *,
        inverter: Inverter = INVERTERS["guarded"],
        steps: int = 25,
        alpha: float = ALPHA,
        calibration: Calibration | None = None,
    ) -> None:
        self.model, self.inverter, self.steps, self.alpha = model, inverter, steps, alpha
        self.keys, self.calibration = keys, calibration
        self.recoverer = Recoverer(model, inverter, steps)
        self.schemes = {}
        for key in keys:
            check_fit(key, model)
            self.schemes[key.fingerprint] = TreeRing(key)
        self._references: dict[str, np.ndarray] = {}
        if calibration:
            calibration.check(self.settings())
            for scheme in self.schemes.values():
                calibration.check_reach(scheme)

    def with_calibration(self, calibration: Calibration) -> Detector:
        """The same detector, on the null of a calibration. Raises CalibrationError where it does not fit."""
        return Detector(
            self.model, self.keys, inverter=self.inverter, steps=self.steps, alpha=self.alpha, calibration=calibration
        )

    def settings(self) -> dict:
        """What a result depends on."""
        return {
            **self.recoverer.settings.as_dict(),
            "keys": sorted(self.schemes),
            "alpha": self.alpha,
            "null": self.model.recovery.fingerprint if self.model.recovery else "white",
            "calibration": self.calibration.fingerprint if self.calibration else None,
        }

    @property
    def null(self) -> Null:
        """What recovered noise is without a mark: by the calibration, or else by what is known of the model."""
        return self.calibration.null if self.calibration else Null(null_covariance(self.model))

    def invert_decoder(self, images: Tensor) -> Solution:
        """Images (B, 3, H, W) in [-1, 1] → their latents, and what the solver did."""
        return self.recoverer.latents(images)

    def recover_noise(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) → the initial noise that they come from."""
        return self.recoverer.noise(latents)

    def recover(self, images: Tensor) -> Recovered:
        """Images (B, 3, H, W) in [-1, 1] → their latents and initial noise."""
        started = time.perf_counter()
        solution = self.invert_decoder(images)
        noise = self.recover_noise(solution.value)
        return Recovered(images, solution, noise, (time.perf_counter() - started) / len(images))

    def scan(self, samples: Iterable[Sample], batch: int = 8) -> Iterator[Judged]:
        """Every sample judged, batch by batch."""
        from ringmark.data.images import to_array

        samples = iter(samples)
        while some := list(islice(samples, batch)):
            recovered = self.recover(torch.from_numpy(np.stack([to_array(s.image) for s in some])))
            yield from map(Judged, some, self.judge(some, recovered), recovered.noise)

    def judge(self, samples: list[Sample], recovered: Recovered) -> list[list[Verdict]]:
        """For each recovered sample its verdicts, one a key."""
        per_key = [self._judge(name, scheme, samples, recovered) for name, scheme in self.schemes.items()]
        return list(map(list, zip(*per_key, strict=True)))

    def statistic(self, scheme: TreeRing, noise: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Score and p-value (B,) of recovered noise (B, C, h, w), uncorrected."""
        return self.calibration.test(scheme, noise) if self.calibration else whitened_test(scheme, noise, *self.null)

    def reference_scores(self, key: str) -> np.ndarray:
        """(n,): the scores of the calibration's unmarked images for the key of this fingerprint; computed once."""
        if key not in self._references:
            self._references[key] = self.calibration.reference_scores(self.schemes[key])
        return self._references[key]

    def _rank(self, key: str, scores: np.ndarray, p_values: np.ndarray) -> tuple[list[float | None], list[str]]:
        """Conformal p-values (B,), uncorrected, and why nothing can be said where they contradict `p_values`, or ""."""
        if not self.calibration:
            return [None] * len(scores), [""] * len(scores)
        n, conformal = self.calibration.n, conformal_p(scores, self.reference_scores(key))
        contradicted = undecided(p_values, conformal, n, self.alpha / (self.TESTS * len(self.schemes)))
        said = [
            f"{round(c * (n + 1)) - 1} of {n} unmarked images score as high, which an uncorrected p of {p:.2g} rules out"
            for c, p in zip(conformal, p_values, strict=True)
        ]
        return conformal.tolist(), [why if no else "" for no, why in zip(contradicted, said, strict=True)]

    def _judge(self, name: str, scheme: TreeRing, samples: list[Sample], recovered: Recovered) -> list[Verdict]:
        noise = torch.nan_to_num(recovered.noise, 0.0, 0.0, 0.0)
        scores, p_values = self.statistic(scheme, noise)
        doubts = list(map(self.doubt, recovered.images, recovered.noise))
        blank = np.array([bool(doubt) for doubt in doubts])
        p_values = np.where(blank, 1.0, p_values)
        conformal, contradictions = self._rank(name, np.where(blank, -np.inf, scores), p_values)
        published = [x.numpy() for x in scheme.masked(noise)]
        distances, published_p = published_distance(*published), published_p_value(*published)
        merits = _final_rms(recovered)
        verdicts = []
        corrected = lambda p: None if p is None else min(1.0, float(p) * len(self.schemes))
        for i, sample in enumerate(samples):
            p, doubt = corrected(p_values[i]), doubts[i] or contradictions[i]
            verdicts.append(
                Verdict(
                    sample.id,
                    name,
                    None if doubt else p <= self.alpha,
                    p,
                    float(scores[i]),
                    float(distances[i]),
                    float(published_p[i]),
                    merits[i],
                    recovered.solution.status[i].value,
                    recovered.seconds,
                    sample.label,
                    corrected(conformal[i]),
                    self.calibration.fingerprint if self.calibration else None,
                    (*sample.notes, *filter(None, [doubt])),
                    shows=not blank[i],
                )
            )
        return verdicts

    @staticmethod
    def doubt(image: Tensor, noise: Tensor) -> str:
        """Why nothing can be said of an image (3, H, W) with this noise; empty if something can."""
        if image.std((1, 2)).max() < FLAT:
            return "the image is one flat colour"
        return "" if noise.isfinite().all() else "the inversion left the range of numbers"


def null_covariance(model: LatentModel) -> np.ndarray:
    """(R, C, C): the null covariance of recovered bins by ring, channels apart: the model's own, or that of white noise."""
    channels, height, width = model.latent_shape
    if model.recovery is None:
        return np.tile(np.eye(channels), (int(rings(height, width).max()) + 1, 1, 1))
    return model.recovery.null.T.numpy()[:, :, None] * np.eye(channels)


def check_method(name: str) -> None:
    """Raises RingmarkError unless this names a decoder inversion: one of INVERTERS."""
    if name not in INVERTERS:
        raise RingmarkError(f"method {name!r}: choose from {', '.join(INVERTERS)}")


def detector(
    model: LatentModel, keys: list[Key], method: str, max_steps: int | None, steps: int, alpha: float = ALPHA
) -> Detector:
    """A detector by the name of its decoder inversion. Raises RingmarkError for an unknown one."""
    check_method(method)
    return Detector(model, keys, inverter=Inverter.named(method, max_steps), steps=steps, alpha=alpha)


def where_it_fits(plain: Detector, calibration: Calibration) -> tuple[Detector, str]:
    """The detector on this calibration; else as it is, and why the calibration does not fit."""
    try:
        return plain.with_calibration(calibration), ""
    except CalibrationError as error:
        return plain, str(error)


def with_built_in(plain: Detector, folder: Path) -> tuple[Detector, str]:
    """The detector with the calibration that its model's folder holds; else as it is, and why that does not fit, if any.

    Raises CalibrationError for a damaged file.
    """
    found = Calibration.built_in(folder)
    return where_it_fits(plain, found) if found else (plain, "")


def _final_rms(recovered: Recovered) -> list[float | None]:
    """Pixel RMS of each image's solution, in grey levels of 255; None where nothing, or nothing finite, was decoded."""
    error = recovered.solution.at_value(recovered.solution.merits)
    rms = (error / recovered.images[0].numel() ** 0.5 * 127.5).tolist()
    return [x if np.isfinite(x) else None for x in rms]


def check_fit(key: Key, model: LatentModel) -> None:
    """Raises KeyFileError for a key made for other latents or another model."""
    made_for = key.metadata["model"]
    if tuple(key.metadata["latent_shape"]) != tuple(model.latent_shape):
        raise KeyFileError(
            f"key {key.fingerprint[:8]}: made for latents of {key.metadata['latent_shape']}, {model.name} has {list(model.latent_shape)}; use --model {made_for.get('name')}"
        )
    if made_for.get("fingerprint") != model.identity["fingerprint"]:
        raise KeyFileError(
            f"key {key.fingerprint[:8]}: made for model {made_for.get('name')!r} ({made_for.get('fingerprint')}), not {model.name!r} ({model.identity['fingerprint']}); use that model, or make a key for this one"
        )
