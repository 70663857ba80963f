"""Test single pictures for keys and draw the evidence for a verdict."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from ringmark.data.images import Sample, read_samples, samples_of
from ringmark.errors import ImageError, one_line
from ringmark.inversion.recover import STEPS
from ringmark.inversion.sizes import Size
from ringmark.watermark.calibration import Calibration
from ringmark.watermark.detect.verdict import Judged, Verdict
from ringmark.watermark.detect.verifier import Verifier
from ringmark.watermark.figures import explain, save_figure
from ringmark.watermark.statistics import ALPHA
from ringmark.watermark.tasks.load import Keys, Model, StrPath, load_verifier

__all__ = ["Outcome", "Picture", "explain_outcome", "verify", "verify_files"]

LOG = logging.getLogger(__name__)

Picture: TypeAlias = "StrPath | Image.Image"


def verify(
    pictures: Picture | Iterable[Picture],
    keys: Keys,
    *,
    model: Model = "pocket",
    device: str = "auto",
    dtype: str = "auto",
    method: str = "operator",
    max_steps: int | None = None,
    steps: int = STEPS,
    alpha: float = ALPHA,
    calibration: StrPath | Calibration | None = None,
    search: bool = False,
    sizes: Sequence[Size] = (),
    thorough: bool = False,
    batch: int | None = None,
) -> list[Verdict]:
    """Test whether pictures carry a key: one verdict per picture, in order, on the key that fits best.

    Args:
        pictures: One picture or several, each a file or a PIL image.
        keys: One key or several, each a `Key`, a key file or a folder of keys.
        model: A loaded `LatentModel`, or "pocket", a diffusers folder or a hub id.
        device: Of a model given by name: "auto", "cpu", "cuda", …
        dtype: Of a model given by name: "auto", "float32", "float16" or "bfloat16".
        method: The decoder inversion: a name of `ringmark.inversion.decoder.INVERTERS`.
        max_steps: Maximum steps of the decoder inversion, at least 0; None is the method's default.
        steps: Steps of the sampler inversion, at least 1.
        alpha: Significance level in (0, 1). A key is present at p ≤ alpha, corrected for the number of keys.
        calibration: A `Calibration` or its file; None is the model's own, if it fits these settings.
        search: Also search for rotation, cropping, enlargement, mirroring, stretching and shifts.
        sizes: Sizes (H, W) at which the pictures may have been drawn; by default those that fit each picture.
        thorough: Run all stages of the inversion on every picture, even once a key is found.
        batch: Pictures processed at a time; None is 8, and on a GPU as many as half of its free memory holds.

    Raises:
        ImageError: A picture cannot be read. To process many files, some of which may be damaged, use `audit`.
        KeyFileError, CalibrationError, ModelError, SchemeError: Keys, calibration and model do not match.

    Example:
        >>> [verdict] = ringmark.verify("picture.png", "my.key")
        >>> verdict.present, verdict.p_value
    """
    verifier, _ = load_verifier(
        keys,
        model=model,
        device=device,
        dtype=dtype,
        method=method,
        max_steps=max_steps,
        steps=steps,
        alpha=alpha,
        calibration=calibration,
        search=search,
        sizes=sizes,
        thorough=thorough,
    )
    given = [pictures] if isinstance(pictures, (str, PathLike, Image.Image)) else pictures
    views = (_views(picture, i, verifier) for i, picture in enumerate(given))
    return [judged.best for judged in verifier.scan(views, batch)]


def _views(picture: Picture, number: int, verifier: Verifier) -> list[Sample]:
    """The picture at the sizes at which it is tried; a PIL image is named by its number."""
    if not isinstance(picture, Image.Image):
        return read_samples(picture, verifier.sizes_of)
    return samples_of(picture, verifier.sizes_of, id=f"image {number}")


@dataclass(frozen=True)
class Outcome:
    """The verdicts on one file, or the error that prevented them."""

    path: Path
    judged: Judged | None = None
    error: ImageError | None = None

    @property
    def present(self) -> bool | None:
        """Whether the file carries a key; None if that is inconclusive."""
        return self.judged.best.present if self.judged else None

    def sentence(self) -> str:
        """The outcome as one line of text."""
        return one_line(f"{self.path}: {self.judged.sentence()}" if self.judged else self.error)

    def record(self) -> dict[str, Any]:
        """The outcome as plain values: the best verdict and `carries`, all keys that are present; or the `error`."""
        name = {"sample_id": str(self.path)}
        if not self.judged:
            return name | {"error": str(self.error), "code": self.error.code if self.error else ""}
        return self.judged.best.record() | name | {"carries": [v.key for v in self.judged.present]}


def verify_files(verifier: Verifier, paths: list[Path], *, batch: int | None = None) -> Iterator[Outcome]:
    """The outcome of each file, in the order given, once it is known. One that cannot be read does not stop the run."""
    outcomes: dict[int, Outcome] = {}

    def readable() -> Iterator[list[Sample]]:
        for i, path in enumerate(paths):
            try:
                yield read_samples(path, verifier.sizes_of, id=str(i))
            except ImageError as error:
                outcomes[i] = Outcome(path, error=error)

    following = 0
    for judged in verifier.scan(readable(), batch):
        i = int(judged.sample.id)
        outcomes[i] = Outcome(paths[i], judged)
        LOG.info("%s", outcomes[i].sentence())
        while following in outcomes:
            yield outcomes.pop(following)
            following += 1
    yield from (outcomes[i] for i in range(following, len(paths)))


def explain_outcome(verifier: Verifier, outcome: Outcome, output: Path, *, force: bool = False) -> None:
    """Draw the evidence for the verdict on a file that could be read.

    The figure shows the key, so only the owner can read it. Raises StoreError if, without `force`, it would replace a
    file that ringmark did not write.
    """
    assert outcome.judged
    figure = explain(verifier.detector_of(outcome.judged), outcome.judged, outcome.path.name)
    save_figure(figure, output, 0o600, force=force)
